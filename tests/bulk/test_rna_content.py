"""mRNA per cell: published values on one scale, types recognised by name and markers, and what is refused."""

import numpy as np
import pandas as pd
import pytest

from lib.bulk.reference import Reference
from lib.bulk.rna_content import (
    KINDS,
    TABLE,
    is_confirmed,
    kind_of,
    print_rna_per_cell,
    published_values,
    rna_per_cell,
)

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


def test_the_table_names_kinds_sources_and_units():
    table = pd.read_csv(TABLE)
    assert set(table["cell_type"]) == set(KINDS) and (table["value"] > 0).all() and (table["unit"].str.len() > 20).all()
    assert not table.duplicated(["cell_type", "source"]).any()


def test_values_are_epics_and_others_are_brought_to_its_scale():
    values = published_values()
    assert values["monocyte"] / values["T"] == pytest.approx(1.4196 / 0.3952)
    table = pd.read_csv(TABLE).pivot(index="cell_type", columns="source", values="value")
    both = table.loc[["B", "NK", "monocyte", "neutrophil"]]  # ABIS and EPIC
    factor = np.exp(np.log(both["EPIC"] / both["ABIS"]).mean())
    assert values["basophil"] == pytest.approx(8610.36 * factor)  # ABIS alone has it


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("Naive CD4 T", "T"), ("CD8+/CD45RA+ Naive Cytotoxic", "T"), ("CD4+/CD25 T Reg", "T"), ("NKT", "T"), ("Th17", "T"),
        ("T_cells_CD8", "T"), ("CD56+ NK", "NK"), ("Natural killer cells", "NK"), ("CD14+ Mono", "monocyte"),
        ("Monocytes", "monocyte"), ("FCGR3A+ Mono", "monocyte"), ("CD19+ B", "B"), ("Memory_B", "B"), ("B cells naive", "B"),
        ("DC", "dendritic"), ("cDC1", "dendritic"), ("pDC", "plasmacytoid dendritic"), ("Macrophages", "macrophage"),
        ("Neutrophils", "neutrophil"), ("Plasma B", None), ("CD34+", None), ("Type 1", None), ("Basal", None), ("Beta", None),
        ("Platelet", None), ("T-cell lymphoma", None), ("B progenitor", None), ("Club", None), ("Mast cell", None),
    ],
)  # fmt: skip
def test_types_are_recognised_by_name(name, kind):
    assert kind_of(name) == kind


def test_a_name_is_believed_only_where_its_markers_are_expressed():
    reference = reference_of({"T cell": "T", "Monocytes": "monocyte", "B cells": None}, [1000, 1000, 1000])
    assert is_confirmed("T", 0, reference) and is_confirmed("monocyte", 1, reference)
    assert not is_confirmed("B", 2, reference) and not is_confirmed("monocyte", 0, reference)
    lower = reference._replace(gene_names=[name.capitalize() for name in GENES])  # as mouse genes are written
    assert is_confirmed("T", 0, lower)
    assert not is_confirmed("T", 0, reference._replace(gene_names=[f"ENSG{i:011d}" for i in range(len(GENES))]))


def test_unknown_types_take_the_references_counts_on_the_scale_of_the_known(capsys):
    reference = reference_of({"T cell": "T", "Monocytes": "monocyte", "Fibroblast": None}, [1000, 1500, 4000])
    found = rna_per_cell("auto", reference)
    scale = np.sqrt(0.3952 / 1000 * 1.4196 / 1500)
    np.testing.assert_allclose(found["rna_per_cell"], [0.3952, 1.4196, 4000 * scale])
    print_rna_per_cell(found)
    out = capsys.readouterr().out
    assert "published, monocyte" in out and "WARNING: no published mRNA content was found for Fibroblast" in out
    np.testing.assert_allclose(rna_per_cell("reference", reference)["rna_per_cell"], [1000, 1500, 4000])


def test_without_any_known_type_the_references_counts_stand_and_nothing_is_warned_of(capsys):
    reference = reference_of({"H1975": None, "HCC827": None}, [1000, 3000])
    found = rna_per_cell("auto", reference)
    np.testing.assert_allclose(found["rna_per_cell"], [1000, 3000])
    print_rna_per_cell(found)
    assert "WARNING" not in capsys.readouterr().out


def test_published_and_own_tables_must_have_every_type(tmp_path):
    reference = reference_of({"T cell": "T", "Fibroblast": None}, [1000, 2000])
    with pytest.raises(ValueError, match="no published mRNA content for Fibroblast.*set RNA_PER_CELL to auto"):
        rna_per_cell("published", reference)
    own = tmp_path / "own.csv"
    own.write_text("cell_type,rna_per_cell\nFibroblast,3\nT cell,1\nother,7\n")
    np.testing.assert_allclose(rna_per_cell(str(own), reference)["rna_per_cell"], [1, 3])
    own.write_text("cell_type,rna_per_cell\nFibroblast,-3\n")
    with pytest.raises(ValueError, match="no positive rna_per_cell for T cell, Fibroblast"):
        rna_per_cell(str(own), reference)
    own.write_text("type,value\nT cell,3\n")
    with pytest.raises(ValueError, match="expected cell_type and rna_per_cell"):
        rna_per_cell(str(own), reference)
    with pytest.raises(
        ValueError, match="RNA_PER_CELL is 'nowhere.csv'; expected auto, reference, published or the path"
    ):
        rna_per_cell("nowhere.csv", reference)
