"""Bulk tables: orientation, gene names, units, replicates, .h5ad; numbers of cells and proportions; and what is refused."""

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from lib.bulk import tables
from lib.bulk.tables import read_bulk, read_cell_numbers, read_gene_ids, read_proportions, to_tpm

GENES = ["ACTB", "GAPDH", "CD3E", "CD19"]
MANY = [f"G{i}" for i in range(300)]
IDS = ["ENSG00000075624.17", "ENSG00000111640", "ENSG00000198851.10", "ENSG00000177455.15"]


@pytest.fixture
def table():
    return pd.DataFrame([[10.0, 20.0, 30.0, 40.0], [40.0, 30.0, 20.0, 10.0]], ["s1", "s2"], GENES)


def assert_reads(path, table, *arguments):
    pd.testing.assert_frame_equal(read_bulk(path, GENES, *arguments), table, check_names=False)


@pytest.mark.parametrize("name", ["bulk.csv", "bulk.tsv", "bulk.txt.gz", "bulk.xlsx"])
def test_formats_and_both_orientations(tmp_path, table, name):
    for given in (table.T, table):
        if name == "bulk.xlsx":
            given.to_excel(tmp_path / name)
        else:
            given.to_csv(tmp_path / name, sep="," if name == "bulk.csv" else "\t")
        assert_reads(tmp_path / name, table)


def test_headers_of_r_and_columns_of_text(tmp_path, table, capsys):
    lines = ["s1\ts2", *(f"{gene}\t{values.s1}\t{values.s2}" for gene, values in table.T.iterrows())]
    (tmp_path / "bulk.tsv").write_text("\n".join(lines))  # as R writes it: the header is one column short
    assert_reads(tmp_path / "bulk.tsv", table)
    table.T.assign(description="a gene").to_csv(tmp_path / "bulk.csv")
    assert_reads(tmp_path / "bulk.csv", table)
    table.T.assign(gene_name=GENES).set_axis(["x1", "x2", "x3", "x4"]).to_csv(tmp_path / "bulk.csv")
    assert_reads(tmp_path / "bulk.csv", table)
    assert "genes are named by column 'gene_name'" in capsys.readouterr().out


def test_ensembl_ids_are_read_without_version_and_mapped_to_gene_names(tmp_path, table):
    without = [i.split(".")[0] for i in IDS]
    pd.DataFrame({"Gene name": GENES, "gene": without}).to_csv(tmp_path / "ids.tsv", sep="\t", index=False)
    table.set_axis(IDS, axis=1).T.to_csv(tmp_path / "bulk.csv")
    assert_reads(tmp_path / "bulk.csv", table, read_gene_ids(tmp_path / "ids.tsv"))
    assert list(read_bulk(tmp_path / "bulk.csv", without[:2])) == without
    with pytest.raises(ValueError, match="shares no gene with the single cells.*give GENE_IDS a table"):
        read_bulk(tmp_path / "bulk.csv", GENES)
    table.T.to_csv(tmp_path / "symbols.csv")
    with pytest.raises(ValueError, match="expected Ensembl gene IDs and gene names"):
        read_gene_ids(tmp_path / "symbols.csv")


def test_bad_tables_are_refused(tmp_path, table):
    for bad, message in (
        (table.rename(columns=lambda gene: gene + "x"), "shares no gene"),
        (table.astype(str).replace("10.0", "n/d"), "2 values that are missing or not numbers.*ACTB in s1"),
        (table.replace(10.0, np.inf), "2 values that are missing or not numbers"),
        (table.set_axis(["s1", "s1"]), "two samples called s1"),
    ):
        bad.to_csv(tmp_path / "bulk.csv")
        with pytest.raises(ValueError, match=message):
            read_bulk(tmp_path / "bulk.csv", GENES)


@pytest.fixture
def cells():
    counts = sp.csr_matrix(np.random.default_rng(0).poisson(0.05, (60, 300)).astype(np.float32))
    obs = pd.DataFrame({"donor": ["B"] * 20 + ["A"] * 30 + [None] * 10}, index=[f"cell_{i}" for i in range(60)])
    return ad.AnnData(counts, obs=obs, var=pd.DataFrame(index=MANY))


def test_rows_of_an_h5ad_are_bulk_samples_or_single_cells_that_are_summed(tmp_path, cells):
    bulk, path = pd.DataFrame(np.random.default_rng(0).gamma(2, 10, (4, 300)), list("wxyz"), MANY), tmp_path / "b.h5ad"
    ad.AnnData(bulk).write_h5ad(path)
    pd.testing.assert_frame_equal(read_bulk(path, MANY), bulk, check_names=False)
    assert not tables.holds_cells(path)
    cells.write_h5ad(path)
    np.testing.assert_array_equal(read_bulk(path, MANY).loc["all_cells"], cells.X.toarray().sum(axis=0))
    by_donor = read_bulk(path, MANY, group="donor")
    assert list(by_donor.index) == ["B", "A"] and tables.holds_cells(path)
    np.testing.assert_array_equal(by_donor.loc["A"], cells.X[20:50].toarray().sum(axis=0))
    with pytest.raises(ValueError, match="has no column 'patient' in obs; it has donor: set BULK_GROUP"):
        read_bulk(path, MANY, group="patient")
    with pytest.raises(ValueError, match="is no .h5ad file; give REPLICATES"):
        read_bulk(tmp_path / "bulk.csv", MANY, group="donor")


def test_counts_of_a_layer_come_first_then_raw(tmp_path, cells):
    counts, path = cells.X.toarray().sum(axis=0), tmp_path / "cells.h5ad"
    cells.raw = cells
    cells.X = cells.X.log1p()
    cells.write_h5ad(path)
    np.testing.assert_array_equal(read_bulk(path, MANY).loc["all_cells"], counts)
    cells.layers["counts"] = cells.raw.X * 2
    cells.write_h5ad(path)
    np.testing.assert_array_equal(read_bulk(path, MANY).loc["all_cells"], 2 * counts)
    del cells.layers["counts"], cells.raw
    cells.write_h5ad(path)
    with pytest.raises(ValueError, match="looks like single cells, but holds fractions"):
        read_bulk(path, MANY)


@pytest.mark.parametrize(
    ("change", "units"),
    [
        (lambda t: t, "counts"),
        (lambda t: t / 100 * 1e6 + 0.25, "tpm"),
        (lambda t: t * 1.13, "fpkm"),
        (lambda t: np.log2(t + 1), "log2"),
        (lambda t: np.log2(t / 100 * 1e6 + 0.25 + 1).round(3), "log2"),
        (lambda t: np.log1p(t), "ln"),
        (lambda t: np.log1p(t / 100 * 1e6 + 0.25).round(3), "ln"),
    ],
)
def test_units_are_recognised_with_a_message_and_do_not_change_the_result(table, change, units, capsys):
    given = change(table)
    assert tables.recognised_units(given) == units
    np.testing.assert_allclose(to_tpm(given, "auto", None), to_tpm(table, "counts", None), rtol=2e-3)
    assert f"recognised as {units}" in capsys.readouterr().out


def test_a_logarithm_whose_base_cannot_be_recognised_needs_bulk_units():
    rng = np.random.default_rng(0)
    fpkm = pd.DataFrame(rng.lognormal(1, 2, (3, 2000)) * (rng.random((3, 2000)) > 0.3))
    for units, logs in (("log2", np.log2(fpkm + 1)), ("ln", np.log1p(fpkm))):
        with pytest.raises(ValueError, match="the base cannot be recognised.*set BULK_UNITS to log2 or ln"):
            to_tpm(logs, "auto", None)
        np.testing.assert_allclose(to_tpm(logs, units, None), to_tpm(fpkm, "fpkm", None), rtol=1e-6)


def test_intensities_of_microarrays_are_log2_and_warned_of(capsys):
    array = pd.DataFrame(np.random.default_rng(0).lognormal(6, 1.5, (3, 2500)).clip(20, 60000))
    np.testing.assert_allclose(to_tpm(np.log2(array + 1), "auto", None), to_tpm(array, "fpkm", None), rtol=1e-6)
    assert "recognised as log2" in (out := capsys.readouterr().out) and "as in microarrays" in out


def test_lengths_duplicate_genes_and_values_that_look_like_other_units(table, capsys):
    by_length = to_tpm(table, "counts", pd.Series({"ACTB": 1000.0, "GAPDH": 1000.0, "CD3E": 500.0}))
    assert list(by_length.columns) == ["ACTB", "GAPDH", "CD3E"]
    np.testing.assert_allclose(by_length.loc["s1"], np.array([10, 20, 60]) / 90 * 1e6)
    twice = pd.concat([table, table[["ACTB"]]], axis=1)
    summed = to_tpm(twice, "tpm", None)
    np.testing.assert_allclose(summed.loc["s1"], np.array([20, 20, 30, 40]) / 110 * 1e6)
    np.testing.assert_allclose(to_tpm(np.log2(twice * 1.5 + 1), "log2", None), summed, rtol=1e-6)  # undone before
    to_tpm(table * 1e6, "tpm", None)
    assert "are these counts (BULK_UNITS)?" in capsys.readouterr().out
    to_tpm(table * 1.13, "counts", None)
    assert "BULK_UNITS is counts, but the bulk holds fractions" in capsys.readouterr().out


def test_values_impossible_in_the_units_are_refused(table):
    for units in ("tpm", "counts", "auto", "ln"):
        with pytest.raises(ValueError, match="has values from .* neither standardised nor batch-corrected"):
            to_tpm(-table - 0.5, units, None)
    with pytest.raises(ValueError, match="the bulk looks log-transformed; expected tpm: set BULK_UNITS to log2"):
        to_tpm(np.log2(table + 1), "tpm", None)


def test_replicates_are_pooled(tmp_path, table):
    three = pd.concat([table, table.iloc[[0]].set_axis(["s3"])])
    groups = tmp_path / "groups.csv"
    groups.write_text("sample,group\ns1,patient A\ns2,patient A\n")
    pooled = to_tpm(three, "counts", None, groups)
    assert list(pooled.index) == ["patient A", "s3"]
    np.testing.assert_allclose(pooled.loc["patient A"], 250_000)
    for text, message in (("s1,A\ns1,B\n", "two groups for the sample called s1"), ("x,A\n", "names no sample")):
        groups.write_text(f"sample,group\n{text}")
        with pytest.raises(ValueError, match=message):
            to_tpm(three, "counts", None, groups)


def test_cell_numbers_and_proportions(tmp_path):
    path, types = tmp_path / "wanted.csv", ["B", "NK", "T"]
    path.write_text("sample,T,B\na,3,4\nb,0,1\n")
    assert read_cell_numbers(path, types).to_numpy().tolist() == [[4, 0, 3], [1, 0, 0]]
    path.write_text("type,n\nT,3\nB,4\n")
    assert read_cell_numbers(path, types).loc["cells"].tolist() == [4, 0, 3]
    path.write_text("sample,T,B\na,0.299,0.7\n")
    np.testing.assert_allclose(read_proportions(path, types), [[0.7 / 0.999, 0, 0.299 / 0.999]])
    for reader, text, message in (
        (read_cell_numbers, "sample,T,X\na,3,4\n", "types that the model does not know: X; it knows B, NK, T"),
        (read_cell_numbers, "sample,T\na,3.5\n", "whole, not negative"),
        (read_cell_numbers, "sample,T\na,\n", "whole, not negative"),
        (read_cell_numbers, "sample,T\na,1\na,2\n", "two rows called a"),
        (read_proportions, "sample,T,B\na,0.5,0.7\n", "summing to 1"),
        (read_proportions, "sample (shares of RNA),T,B\na,0.5,0.5\n", "holds shares of RNA"),
        (read_proportions, "sample,T\n", "is empty"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            reader(path, types)
