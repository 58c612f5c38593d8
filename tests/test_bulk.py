"""Bulk tables: both orientations, duplicates, units, and what is refused."""

import numpy as np
import pandas as pd
import pytest

from lib.bulk import read_bulk, to_tpm

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
def test_duplicate_genes_are_summed_and_said(tmp_path, table, capsys, genes_in_rows):
    twice = pd.concat([table.T, table.T.iloc[:1]])
    (twice if genes_in_rows else twice.T).to_csv(tmp_path / "bulk.csv")
    assert read_bulk(tmp_path / "bulk.csv", GENES).loc["s1", "ACTB"] == 20
    assert "1 genes that stand more than once were summed" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.rename(columns=lambda g: g + "x"), "shares no gene"),
        (lambda t: t.replace(10.0, np.nan), "2 values that are missing or not numbers"),
        (lambda t: t.astype(str).replace("10.0", "n/d"), "2 values that are missing or not numbers"),
        (lambda t: -t, "negative values"),
        (lambda t: np.log2(t), "looks log-transformed"),
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
    to_tpm(table / 3, "counts", None)
    assert "BULK_UNITS is counts, but the bulk holds fractions" in capsys.readouterr().out


def test_a_table_of_r_without_a_name_for_its_names(tmp_path, table):
    lines = ["s1\ts2", *(f"{gene}\t{values.s1}\t{values.s2}" for gene, values in table.T.iterrows())]
    (tmp_path / "bulk.tsv").write_text("\n".join(lines))
    pd.testing.assert_frame_equal(read_bulk(tmp_path / "bulk.tsv", GENES), table, check_names=False)
