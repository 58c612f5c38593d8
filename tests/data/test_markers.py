"""scType's score, by hand and on real cells."""

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from helpers import STAGES, Workplace

from lib.data.labels import Markers, cell_scores, cluster_types, read_markers

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


B_AND_T = {"B": Markers(["CD79A", "MS4A1"], ["CD3D"]), "T": Markers(["CD3D", "CD3E"], [])}
SCTYPE = pd.DataFrame(
    {
        "tissueType": ["Immune system", "Immune system", "Liver", "Immune system"],
        "cellName": ["B", "T", "B", "Unicorns"],
        "geneSymbolmore1": ["CD79A, MS4A1", "CD3D///CD3E", "ALB", "HORN1"],
        "geneSymbolmore2": ["CD3D", "NA", None, None],
        "shortName": ["B", "T", "B", "U"],
    }
)


def test_a_table_of_markers(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text('cell_type,positive,negative\nB,CD79A;MS4A1,CD3D\nT,"CD3D,CD3E",\n')
    assert read_markers(path) == B_AND_T
    path.write_text("type,genes\nB,CD79A\n")
    with pytest.raises(ValueError, match="columns type, genes; expected cellName, .* or cell_type, positive, negative"):
        read_markers(path)
    path.write_text("cell_type,positive\nB,CD79A\nB,MS4A1\n")
    with pytest.raises(ValueError, match="'B' has two rows or no positive marker"):
        read_markers(path)


@pytest.mark.parametrize("suffix", ["xlsx", "csv"])
def test_sctypes_database_is_filtered_by_tissue(tmp_path, suffix):
    path = tmp_path / f"ScTypeDB_full.{suffix}"
    SCTYPE.to_excel(path, index=False) if suffix == "xlsx" else SCTYPE.to_csv(path, index=False)
    assert read_markers(path, "Immune system") == B_AND_T | {"Unicorns": Markers(["HORN1"], [])}
    assert read_markers(path, "Liver") == {"B": Markers(["ALB"], [])}
    for tissue in (None, "Lung"):
        with pytest.raises(ValueError, match=f"of Immune system, Liver; set MARKERS_TISSUE, now {tissue!r}"):
            read_markers(path, tissue)


def test_clusters_get_the_type_of_their_markers(capsys):
    counts = sp.csr_matrix(np.repeat([[9, 1, 5], [1, 9, 5], [1, 1, 9]], [40, 30, 20], axis=0).astype(np.float32))
    cells = ad.AnnData(counts, var=pd.DataFrame(index=["Cd79a", "CD3E", "ACTB"]))
    clusters = np.repeat(["0", "1", "2"], [40, 30, 20])
    types = cluster_types(cells, np.arange(10, 90), clusters[10:], B_AND_T | {"absent": Markers(["HORN1"], [])})
    assert types.tolist() == ["B"] * 30 + ["T"] * 30 + [None] * 20
    assert "left out: absent" in capsys.readouterr().out
    with pytest.raises(ValueError, match="no positive marker of any type; expected gene names such as CD79A"):
        cluster_types(cells, np.arange(90), clusters, {"absent": Markers(["HORN1"], [])})


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
