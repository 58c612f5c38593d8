"""scType's score, by hand and on real cells."""

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from helpers import STAGES, Workplace, simulated_dataset, split_only

from lib.data.markers import Markers, cell_scores, read_markers, with_genes_in

PBMC = {
    "B": "CD79A MS4A1 CD79B",
    "T": "CD3D CD3E IL32 CD2",
    "Mono": "LYZ S100A9 CST3",
    "NK": "GNLY NKG7 KLRD1",
    "DC": "FCER1A CLEC10A",
}


def test_scores_by_hand():
    """Two cells, three types; gene G marks two of the three types (sensitivity 1/2), A and B one each; N is a negative marker."""
    markers = {"x": Markers(["a", "g"], ["n"]), "y": Markers(["b", "G"], []), "z": Markers(["c"], [])}
    values = np.array([[1.0, 0.0, 2.0, 4.0], [0.0, 3.0, 0.0, 0.0]])
    z = np.array([[1, -1, 1, 1], [-1, 1, -1, -1]]) / np.sqrt(2)  # sample standard deviation of two cells
    found = cell_scores(values, ["A", "B", "G", "N"], markers)
    np.testing.assert_allclose(found[:, 0], (z[:, 0] + z[:, 2] / 2) / np.sqrt(2) - z[:, 3] * 1.0)
    np.testing.assert_allclose(found[:, 1], (z[:, 1] + z[:, 2] / 2) / np.sqrt(2))
    assert (found[:, 2] == 0).all()  # no marker among the genes


def test_both_forms_of_the_table_give_the_same_markers(tmp_path):
    plain, sctype = tmp_path / "a.csv", tmp_path / "b.tsv"
    plain.write_text('cell_type,positive,negative\nB,CD79A;MS4A1,CD3D\nT,"CD3D,CD3E",\n')
    sctype.write_text(
        "tissueType\tcellName\tgeneSymbolmore1\tgeneSymbolmore2\tshortName\nImmune\tB\tCD79A,MS4A1\tCD3D\tB\nImmune\tT\tCD3D, CD3E\t\tT\n"
    )
    assert (
        read_markers(plain)
        == read_markers(sctype)
        == {"B": Markers(["CD79A", "MS4A1"], ["CD3D"]), "T": Markers(["CD3D", "CD3E"], [])}
    )
    plain.write_text("type,genes\nB,CD79A\n")
    with pytest.raises(
        ValueError,
        match="has the columns type, genes; expected cellName, geneSymbolmore1, geneSymbolmore2 or cell_type, positive",
    ):
        read_markers(plain)
    plain.write_text("cell_type,positive\nB,CD79A\nB,MS4A1\n")
    with pytest.raises(ValueError, match="'B' has two rows or no positive marker"):
        read_markers(plain)


SCTYPE = pd.DataFrame(  # in the form of ScTypeDB_full.xlsx
    {
        "tissueType": ["Immune system", "Immune system", "Liver", "Immune system"],
        "cellName": ["B", "T", "B", "Unicorns"],
        "geneSymbolmore1": ["CD79A,MS4A1", "CD3D///CD3E", "ALB", "HORN1"],
        "geneSymbolmore2": ["CD3D", "NA", None, None],
        "shortName": ["B", "T", "B", "U"],
    }
)


@pytest.mark.parametrize("suffix", ["xlsx", "csv"])
def test_sctypes_database_is_filtered_by_tissue(tmp_path, capsys, suffix):
    path = tmp_path / f"ScTypeDB_full.{suffix}"
    SCTYPE.to_excel(path, index=False) if suffix == "xlsx" else SCTYPE.to_csv(path, index=False)
    immune = {"B": Markers(["CD79A", "MS4A1"], ["CD3D"]), "T": Markers(["CD3D", "CD3E"], [])}
    found = read_markers(path, "Immune system")
    assert found == immune | {"Unicorns": Markers(["HORN1"], [])}
    assert with_genes_in(found, pd.Index(["Cd79a", "CD3E"])) == immune
    assert "among the genes of the data, left out: Unicorns" in capsys.readouterr().out
    assert read_markers(path, "Liver") == {"B": Markers(["ALB"], [])}
    with pytest.raises(ValueError, match="several tissues; set MARKERS_TISSUE to one of Immune system, Liver"):
        read_markers(path)
    with pytest.raises(
        ValueError, match="no markers of the tissue 'Lung'; expected .* one of its tissues: Immune system, Liver"
    ):
        read_markers(path, "Lung")


@pytest.mark.slow
def test_stage_1_names_clusters_by_an_xlsx_database(tmp_path, capsys):
    cells = simulated_dataset(n_cells=300)
    truth = cells.obs["cell_type"]
    mean = pd.DataFrame(
        {name: np.asarray(cells.X[(truth == name).to_numpy()].mean(axis=0)).ravel() for name in truth.cat.categories}
    )
    top = {name: (mean[name] / mean.drop(columns=name).max(axis=1)).nlargest(3).index for name in mean}
    rows = [("A", name, ",".join(f"GENE{i}" for i in genes), "") for name, genes in top.items()]
    rows += [("A", "absent", "HORN1", ""), ("B", "type 0", "GENE0", "")]
    table = pd.DataFrame(rows, columns=["tissueType", "cellName", "geneSymbolmore1", "geneSymbolmore2"])
    table.to_excel(tmp_path / "db.xlsx", index=False)
    markers = {"LABELS": "markers", "MARKERS_FILE": str(tmp_path / "db.xlsx"), "MARKERS_TISSUE": "A"}
    place = split_only(tmp_path / "place", cells, MIN_CLUSTER_CELLS=4, **markers)
    found = ad.concat([ad.read_h5ad(place.data / f"{part}.h5ad") for part in ("train", "test")]).obs["cell_type"]
    assert (found.astype(str) == truth[found.index].astype(str)).mean() > 0.8
    assert "left out: absent" in capsys.readouterr().out


@pytest.mark.slow
def test_clusters_of_blood_cells_get_their_names(pipeline, tmp_path):
    """On real cells, the types by markers agree with the labels of the source."""
    place = Workplace(tmp_path)
    place.data.mkdir()
    (place.data / "counts.h5ad").write_bytes((pipeline.data / "counts.h5ad").read_bytes())
    pd.DataFrame({"cell_type": PBMC.keys(), "positive": PBMC.values()}).to_csv(tmp_path / "markers.csv", index=False)
    place.main(STAGES[1], LABELS="markers", MARKERS_FILE=str(tmp_path / "markers.csv"))
    cells = ad.concat([ad.read_h5ad(place.data / f"{part}.h5ad") for part in ("train", "test")])
    truth = ad.read_h5ad(place.data / "counts.h5ad").obs["cell_type"][cells.obs_names].astype(str)
    short = {"CD19": "B", "CD14": "Mono", "Dendritic": "DC", "CD56": "NK"}
    expected = truth.map(lambda name: next((short[word] for word in short if word in name), "T"))
    known = ~truth.isin(["CD34+"])
    assert (cells.obs["cell_type"].astype(str)[known] == expected[known]).mean() > 0.7
    assert {"B", "T"} <= set(cells.obs["cell_type"]) and len(cells) > 500


def test_a_type_whose_markers_are_missing_is_named(tmp_path):
    (tmp_path / "markers.csv").write_text("cell_type,positive\na,GENE1;GENE2\nb,CD3D\n")
    with pytest.raises(ValueError, match="the data have no positive marker of b"):
        split_only(
            tmp_path / "place", simulated_dataset(), LABELS="markers", MARKERS_FILE=str(tmp_path / "markers.csv")
        )
    with pytest.raises(ValueError, match="LABELS is markers and MARKERS_FILE is None"):
        split_only(tmp_path / "other", simulated_dataset(), LABELS="markers")
