"""mRNA per cell: published values on one scale, types recognised by name and markers, and what is refused."""

import numpy as np
import pandas as pd
import pytest

from lib.bulk.regression import Reference
from lib.bulk.rna_content import KINDS, TABLE, is_confirmed, kind_of, print_rna_per_cell, published_values, rna_per_cell

MARKERS = {"T": ["CD3D", "CD3E", "CD2"], "monocyte": ["LYZ", "CD14", "FCN1"], "B": ["MS4A1", "CD79A", "CD79B"]}
GENES = [gene for genes in MARKERS.values() for gene in genes] + [f"G{i}" for i in range(200)]


def reference_of(types: dict[str, str | None], counts: list[float]) -> Reference:
    """A reference in which each type (a name) expresses the markers of a kind, or of none; counts: per cell."""
    mean = np.full((len(types), len(GENES)), 1.0)
    mean[:, : len(GENES) - 200] = 0.001
    for k, kind in enumerate(types.values()):
        for gene in MARKERS.get(kind, []):
            mean[k, GENES.index(gene)] = 5.0
    mean *= np.array(counts)[:, None] / mean.sum(axis=1, keepdims=True)
    return Reference(GENES, list(types), mean, mean, np.full(len(types), 100))


def test_values_are_epics_and_others_are_brought_to_its_scale():
    values = published_values()["rna_per_cell"]
    assert set(values.index) == set(KINDS) and (values > 0).all()
    assert values["monocyte"] / values["T"] == pytest.approx(1.4196 / 0.3952)
    table = pd.read_csv(TABLE).pivot(index="cell_type", columns="source", values="value")
    both = table.loc[["B", "NK", "monocyte", "neutrophil"]]  # ABIS and EPIC
    factor = np.exp(np.log(both["EPIC"] / both["ABIS"]).mean())
    assert values["basophil"] == pytest.approx(8610.36 * factor)  # ABIS alone has it


NAMES = {
    "T": "Naive CD4 T, CD8+/CD45RA+ Naive Cytotoxic, CD4+/CD25 T Reg, NKT, Th17, T_cells_CD8, natural killer T cell, MAIT, "
    "immune system T cell, T leukocyte, CD8 Tcell",
    "NK": "CD56+ NK, Natural killer cells, NK_1",
    "monocyte": "CD14+ Mono, Monocytes, FCGR3A+ Mono, leukocyte: monocyte, Monocyte (system 2)",
    "B": "CD19+ B, Memory_B, B cells naive, B lymphocyte of the lymphatic system",
    "dendritic": "DC, cDC1, Dendritic cells",
    "plasmacytoid dendritic": "pDC, plasmacytoid dendritic cell",
    "macrophage": "Macrophages, nervous system macrophage",
    "neutrophil": "Neutrophils",
    "basophil": "basophil",
    None: "Plasma B, B plasmablasts, plasma cell (B), CD34+, CD34+ T, B progenitor, T cell progenitors, B precursor, pre-B, Pro-B cell, "
    "ProT, hematopoietic stem cell, Stem T, HSC/B, HSPCs mono, T-cell lymphoma, B leukemia, T leukaemic, Tumor1 T, tumour B, "
    "cancer macrophage, malignant B, Cycling T, NK Proliferating, Prolif. T, T/B doublets, "
    "Type 1, Basal, Beta, Platelet, Club, Mast cell, Leukocytes, oligodendritic, basophilic erythroblast, Unknown",
}


def test_types_are_recognised_by_whole_words_of_their_names():
    expected = {name: kind for kind, names in NAMES.items() for name in names.split(", ")}
    assert {name: kind_of(name) for name in expected} == expected


def test_a_name_is_believed_only_where_its_markers_are_expressed():
    reference = reference_of({"T cell": "T", "Monocytes": "monocyte", "B cells": None}, [1000, 1000, 1000])
    assert is_confirmed("T", 0, reference) and is_confirmed("monocyte", 1, reference)
    assert not is_confirmed("B", 2, reference) and not is_confirmed("monocyte", 0, reference)
    lower = reference._replace(gene_names=[name.capitalize() for name in GENES])  # as mouse genes are written
    assert is_confirmed("T", 0, lower)


def test_unknown_types_take_the_references_counts_on_the_scale_of_the_known(capsys):
    reference = reference_of({"T cell": "T", "Monocytes": "monocyte", "Fibroblast": None}, [1000, 1500, 4000])
    content = rna_per_cell("auto", reference)
    scale = np.sqrt(0.3952 / 1000 * 1.4196 / 1500)
    np.testing.assert_allclose(content["rna_per_cell"], [0.3952, 1.4196, 4000 * scale])
    print_rna_per_cell(content)
    out = capsys.readouterr().out
    assert "published, monocyte" in out and "WARNING: no published mRNA content was found for Fibroblast" in out
    nothing_known = reference._replace(cell_types=["H1975", "H2228", "HCC827"])
    for content in (rna_per_cell("reference", reference), rna_per_cell("auto", nothing_known)):
        np.testing.assert_allclose(content["rna_per_cell"], [1000, 1500, 4000])
        print_rna_per_cell(content)
        assert "WARNING" not in capsys.readouterr().out


def test_own_tables_must_have_every_type(tmp_path):
    reference = reference_of({"T cell": "T", "Fibroblast": None}, [1000, 2000])
    own = tmp_path / "own.csv"
    own.write_text("cell_type,rna_per_cell\nFibroblast,3\nT cell,1\nother,7\n")
    np.testing.assert_allclose(rna_per_cell(str(own), reference)["rna_per_cell"], [1, 3])
    for setting, text, message in (
        ("nowhere.csv", "", "RNA_PER_CELL is 'nowhere.csv'; expected auto, reference or the path"),
        (str(own), "cell_type,rna_per_cell\nFibroblast,-3\n", "no positive rna_per_cell for T cell, Fibroblast"),
        (str(own), "type,value\nT cell,3\n", "expected cell_type and rna_per_cell"),
    ):
        own.write_text(text)
        with pytest.raises(ValueError, match=message):
            rna_per_cell(setting, reference)
