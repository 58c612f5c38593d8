"""scType's score, by hand and on real cells."""

import shutil

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from helpers import STAGES, Workplace

from lib.data.labels import Markers, cell_scores, cluster_types, read_markers


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


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('cell_type,positive,negative\nB,CD79A;MS4A1,CD3D\nT,"CD3D,CD3E",\n', None),
        ("type,genes\nB,CD79A\n", "columns type, genes; expected cellName, .* or cell_type, positive, negative"),
        ("cell_type,positive\nB,CD79A\nB,MS4A1\n", "'B' has two rows or no positive marker"),
    ],
)
def test_a_table_of_markers(tmp_path, text, message):
    (tmp_path / "a.csv").write_text(text)
    if message is None:
        assert read_markers(tmp_path / "a.csv") == B_AND_T
    else:
        with pytest.raises(ValueError, match=message):
            read_markers(tmp_path / "a.csv")


def test_sctypes_database_is_filtered_by_tissue(tmp_path):
    path, columns = tmp_path / "ScTypeDB_full.xlsx", ["tissueType", "cellName", "geneSymbolmore1", "geneSymbolmore2"]
    rows = [
        ("Immune system", "B", "CD79A, MS4A1", "CD3D"), ("Immune system", "T", "CD3D///CD3E", "NA"),
        ("Liver", "B", "ALB", None), ("Immune system", "Unicorns", "HORN1", None),
    ]  # fmt: skip
    pd.DataFrame(rows, columns=columns).assign(shortName="B").to_excel(path, index=False)
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
    with pytest.raises(ValueError, match="no positive marker of any type; expected genes such as CD79A"):
        cluster_types(cells, np.arange(90), clusters, {"absent": Markers(["HORN1"], [])})


@pytest.mark.slow
def test_clusters_of_blood_cells_get_their_names(pipeline, tmp_path):
    """On real cells, the types by markers agree with the labels of the source."""
    markers = "B,CD79A MS4A1 CD79B\nT,CD3D CD3E IL32 CD2\nMono,LYZ S100A9 CST3\nNK,GNLY NKG7 KLRD1\nDC,FCER1A CLEC10A\n"
    (tmp_path / "markers.csv").write_text(f"cell_type,positive\n{markers}")
    place = Workplace(tmp_path)
    place.data.mkdir()
    shutil.copy(pipeline.data / "counts.h5ad", place.data)
    place.main(STAGES[1], LABELS="markers", MARKERS_FILE=str(tmp_path / "markers.csv"))
    cells = ad.concat([ad.read_h5ad(place.data / f"{part}.h5ad") for part in ("train", "test")])
    truth = ad.read_h5ad(place.data / "counts.h5ad").obs["cell_type"][cells.obs_names].astype(str)
    short = {"CD19": "B", "CD14": "Mono", "Dendritic": "DC", "CD56": "NK"}
    expected = truth.map(lambda name: next((short[word] for word in short if word in name), "T"))
    known = ~truth.isin(["CD34+"])
    assert (cells.obs["cell_type"].astype(str)[known] == expected[known]).mean() > 0.7
    assert {"B", "T"} <= set(cells.obs["cell_type"]) and len(cells) > 500
