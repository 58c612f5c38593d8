"""Reading of bulk tables: both orientations, duplicate genes, units, and tables that are refused."""

import numpy as np
import pandas as pd
import pytest

from lib.bulk.tables import (
    gene_names,
    pooled_replicates,
    read_bulk,
    read_gene_ids,
    recognised_units,
    to_tpm,
)

GENES = ["ACTB", "GAPDH", "CD3E", "CD19"]


@pytest.fixture
def table():
    return pd.DataFrame([[10.0, 20.0, 30.0, 40.0], [40.0, 30.0, 20.0, 10.0]], index=["s1", "s2"], columns=GENES)


@pytest.mark.parametrize("separator", [",", "\t"])
@pytest.mark.parametrize("genes_in_rows", [True, False])
def test_both_orientations_are_recognised(tmp_path, table, separator, genes_in_rows):
    (table.T if genes_in_rows else table).to_csv(tmp_path / "bulk.txt", sep=separator)
    pd.testing.assert_frame_equal(read_bulk(tmp_path / "bulk.txt", GENES), table, check_names=False)


def test_one_sample_is_enough(tmp_path, table):
    table.iloc[[0]].T.to_csv(tmp_path / "bulk.csv")
    assert read_bulk(tmp_path / "bulk.csv", GENES).shape == (1, 4)


@pytest.mark.parametrize("genes_in_rows", [True, False])
def test_duplicate_genes_are_summed_with_a_message(tmp_path, table, capsys, genes_in_rows):
    twice = pd.concat([table.T, table.T.iloc[:1]])
    (twice if genes_in_rows else twice.T).to_csv(tmp_path / "bulk.csv")
    assert to_tpm(read_bulk(tmp_path / "bulk.csv", GENES), "tpm", None).loc["s1", "ACTB"] == pytest.approx(
        20 / 110 * 1e6
    )
    assert "1 duplicate genes were summed" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.rename(columns=lambda g: g + "x"), "shares no gene"),
        (lambda t: t.replace(10.0, np.nan), "2 values that are missing or not numbers"),
        (lambda t: t.astype(str).replace("10.0", "n/d"), "2 values that are missing or not numbers"),
        (lambda t: t.replace(10.0, np.inf), "2 values that are missing or not numbers"),
        (lambda t: t.set_axis(["s1", "s1"]), "two samples called s1"),
    ],
)
def test_bad_tables_are_refused(tmp_path, table, change, message):
    change(table).to_csv(tmp_path / "bulk.csv")
    with pytest.raises(ValueError, match=message):
        read_bulk(tmp_path / "bulk.csv", GENES)


def test_units(table, capsys):
    np.testing.assert_allclose(to_tpm(table, "tpm", None).loc["s1"], [1e5, 2e5, 3e5, 4e5])
    lengths = pd.Series({"ACTB": 1000.0, "GAPDH": 1000.0, "CD3E": 500.0})
    by_length = to_tpm(table, "counts", lengths)
    assert list(by_length.columns) == ["ACTB", "GAPDH", "CD3E"]
    np.testing.assert_allclose(by_length.loc["s1"], np.array([10, 20, 60]) / 90 * 1e6)
    to_tpm(table * 1e6, "tpm", None)
    assert "are these counts (BULK_UNITS)?" in capsys.readouterr().out
    to_tpm(table * 1.13, "counts", None)
    assert "BULK_UNITS is counts, but the bulk holds fractions" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "units"),
    [
        (lambda t: t, "counts"),
        (lambda t: t / 100 * 1e6 + 0.25, "tpm"),
        (lambda t: t * 1.13, "fpkm"),
        (lambda t: np.log2(t * 1000.5 + 1), "log2"),
    ],
)
def test_units_are_recognised_with_a_message_and_do_not_change_the_result(table, change, units, capsys):
    given = change(table)
    assert recognised_units(given) == units
    np.testing.assert_allclose(to_tpm(given, "auto", None), to_tpm(table, "counts", None), rtol=1e-4)
    assert f"recognised as {units}" in capsys.readouterr().out


def test_values_impossible_in_any_unit_are_refused(table):
    for units in ("tpm", "counts", "auto"):
        with pytest.raises(ValueError, match="negative values|standardised"):
            to_tpm(-table - 0.5, units, None)
    with pytest.raises(ValueError, match="it looks log-transformed; expected tpm: set BULK_UNITS to log2"):
        to_tpm(np.log2(table + 1), "tpm", None)
    with pytest.raises(ValueError, match="not standardised"):
        to_tpm((table - table.mean()) / table.std() * 4, "log2", None)
    with pytest.raises(ValueError, match="1 of 2 bulk samples have no counts"):
        to_tpm(table.mul([0, 1], axis=0), "counts", None)


def test_logarithms_are_undone_before_duplicates_are_summed(table):
    twice = pd.concat([table, table[["ACTB"]]], axis=1)
    np.testing.assert_allclose(to_tpm(np.log2(twice * 1.5 + 1), "log2", None), to_tpm(twice, "counts", None), rtol=1e-6)


def test_ensembl_ids_with_versions_are_mapped_to_gene_names(tmp_path, table):
    ids = ["ENSG00000075624.17", "ENSG00000111640", "ENSG00000198851.10", "ENSG00000177455.15"]
    pd.DataFrame({"Gene name": GENES, "Gene stable ID": [i.split(".")[0] for i in ids]}).to_csv(
        tmp_path / "ids.tsv", sep="\t", index=False
    )
    gene_ids = read_gene_ids(tmp_path / "ids.tsv")
    assert gene_ids["ENSG00000198851"] == "CD3E"
    table.set_axis(ids, axis=1).T.to_csv(tmp_path / "bulk.csv")
    pd.testing.assert_frame_equal(read_bulk(tmp_path / "bulk.csv", GENES, gene_ids), table, check_names=False)
    with pytest.raises(ValueError, match="shares no gene with the single cells.*give GENE_IDS a table"):
        read_bulk(tmp_path / "bulk.csv", GENES)
    with pytest.raises(ValueError, match="expected one of Ensembl gene IDs and one of gene names"):
        table.T.to_csv(tmp_path / "symbols.csv")
        read_gene_ids(tmp_path / "symbols.csv")


def test_cells_with_ensembl_ids_need_no_table():
    known = {"ENSG00000075624"}
    assert list(gene_names(pd.Index(["ENSG00000075624.17", "ENSMUSG00000064351.1", "ACTB"]), known, {})) == [
        "ENSG00000075624",
        "ENSMUSG00000064351",
        "ACTB",
    ]


def test_a_text_column_is_dropped_or_gives_the_gene_names(tmp_path, table, capsys):
    genes = table.T
    genes.assign(description="a gene").to_csv(tmp_path / "bulk.csv")
    pd.testing.assert_frame_equal(read_bulk(tmp_path / "bulk.csv", GENES), table, check_names=False)
    assert "columns of text are left out (description)" in capsys.readouterr().out
    genes.assign(gene_name=genes.index).set_axis(["x1", "x2", "x3", "x4"]).to_csv(tmp_path / "bulk.csv")
    pd.testing.assert_frame_equal(read_bulk(tmp_path / "bulk.csv", GENES), table, check_names=False)
    assert "genes are named by column 'gene_name'" in capsys.readouterr().out


def test_excel(tmp_path, table):
    pytest.importorskip("openpyxl")
    for name, given in (("a", table), ("b", table.T)):
        given.to_excel(tmp_path / f"{name}.xlsx")
        pd.testing.assert_frame_equal(read_bulk(tmp_path / f"{name}.xlsx", GENES), table, check_names=False)


def test_replicates_are_pooled(tmp_path, table, capsys):
    three = pd.concat([table, table.iloc[[0]].set_axis(["s3"])])
    (tmp_path / "groups.csv").write_text("sample,group\ns1,patient A\ns2,patient A\n")
    pooled = pooled_replicates(three, tmp_path / "groups.csv")
    assert list(pooled.index) == ["patient A", "s3"]
    np.testing.assert_allclose(pooled.loc["patient A"], 25)
    assert "3 bulk samples pooled to 2" in capsys.readouterr().out
    (tmp_path / "groups.csv").write_text("sample,group\ns1,A\ns1,B\n")
    with pytest.raises(ValueError, match="puts s1 into two groups"):
        pooled_replicates(three, tmp_path / "groups.csv")
    (tmp_path / "groups.csv").write_text("sample,group\nx,A\n")
    with pytest.raises(ValueError, match="names no sample of the bulk"):
        pooled_replicates(three, tmp_path / "groups.csv")


def test_a_table_written_by_r_whose_header_is_one_column_short(tmp_path, table):
    lines = ["s1\ts2", *(f"{gene}\t{values.s1}\t{values.s2}" for gene, values in table.T.iterrows())]
    (tmp_path / "bulk.tsv").write_text("\n".join(lines))
    pd.testing.assert_frame_equal(read_bulk(tmp_path / "bulk.tsv", GENES), table, check_names=False)
