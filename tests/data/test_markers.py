"""scType's score, by hand and on real cells."""

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from helpers import STAGES, Workplace, simulated_dataset, split_only

from lib.data.markers import Markers, cell_scores, read_markers

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
