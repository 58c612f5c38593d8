"""Bulk from .h5ad: bulk samples as they are, single cells summed, by a column or all, and what is refused."""

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from lib.bulk.anndata_bulk import holds_cells
from lib.bulk.tables import is_array_like, read_bulk, recognised_units, to_tpm

GENES = [f"G{i}" for i in range(300)]


@pytest.fixture
def cells(tmp_path):
    counts = sp.csr_matrix(np.random.default_rng(0).poisson(0.05, (60, 300)).astype(np.float32))
    obs = pd.DataFrame({"donor": ["A"] * 20 + ["B"] * 30 + [None] * 10}, index=[f"cell_{i}" for i in range(60)])
    adata = ad.AnnData(counts, obs=obs, var=pd.DataFrame(index=GENES))
    adata.write_h5ad(tmp_path / "cells.h5ad")
    return adata


def test_bulk_samples_are_rows_as_they_are(tmp_path):
    values = np.random.default_rng(0).gamma(2, 10, (4, 300)).astype(np.float32)
    ad.AnnData(values, obs=pd.DataFrame(index=list("wxyz")), var=pd.DataFrame(index=GENES)).write_h5ad(
        tmp_path / "bulk.h5ad"
    )
    found = read_bulk(tmp_path / "bulk.h5ad", GENES)
    assert list(found.index) == list("wxyz") and list(found.columns) == GENES
    np.testing.assert_allclose(found, values, rtol=1e-6)
    assert not holds_cells(tmp_path / "bulk.h5ad") and not holds_cells(tmp_path / "bulk.csv")


def test_single_cells_are_summed_to_one_sample_or_by_a_column(tmp_path, cells, capsys):
    found = read_bulk(tmp_path / "cells.h5ad", GENES)
    np.testing.assert_array_equal(found.loc["all_cells"], np.asarray(cells.X.sum(axis=0)).ravel())
    assert "60 single cells summed to 1 samples" in capsys.readouterr().out
    by_donor = read_bulk(tmp_path / "cells.h5ad", GENES, group="donor")
    assert list(by_donor.index) == ["A", "B"]
    np.testing.assert_array_equal(by_donor.loc["B"], cells.X[20:50].toarray().sum(axis=0))
    assert holds_cells(tmp_path / "cells.h5ad")
    assert recognised_units(found) == "counts"


def test_counts_of_a_layer_come_first(tmp_path, cells):
    cells.layers["counts"] = cells.X.copy()
    cells.X = cells.X.log1p()
    cells.write_h5ad(tmp_path / "both.h5ad")
    np.testing.assert_array_equal(
        read_bulk(tmp_path / "both.h5ad", GENES).loc["all_cells"], cells.layers["counts"].toarray().sum(axis=0)
    )
    del cells.layers["counts"]
    cells.write_h5ad(tmp_path / "logs.h5ad")
    with pytest.raises(ValueError, match="looks like single cells, but holds fractions.*expected raw counts"):
        read_bulk(tmp_path / "logs.h5ad", GENES)


def test_columns_that_are_not_there_are_named(tmp_path, cells):
    with pytest.raises(ValueError, match="has no column 'patient' in obs; it has donor: set BULK_GROUP"):
        read_bulk(tmp_path / "cells.h5ad", GENES, group="patient")
    pd.DataFrame(1.0, ["s"], GENES).to_csv(tmp_path / "bulk.csv")
    with pytest.raises(ValueError, match="is no .h5ad file; give REPLICATES"):
        read_bulk(tmp_path / "bulk.csv", GENES, group="donor")


def test_pooled_counts_are_no_fractions(tmp_path, capsys):
    counts = pd.DataFrame([[1.0, 2.0, 300.0], [4.0, 7.0, 900.0]], ["s1", "s2"], GENES[:3])
    (tmp_path / "groups.csv").write_text("sample,group\ns1,A\ns2,A\n")
    pooled = to_tpm(counts, "auto", None, tmp_path / "groups.csv")
    np.testing.assert_allclose(pooled.loc["A"], np.array([2.5, 4.5, 600]) / 607 * 1e6)
    assert "fractions" not in capsys.readouterr().out
    to_tpm(np.log2(counts + 1), "auto", None)
    assert "fractions" not in capsys.readouterr().out


def test_scales_are_named_and_microarrays_warned_of(capsys):
    rng = np.random.default_rng(0)
    array = pd.DataFrame(rng.lognormal(6, 1.5, (3, 2500)).clip(20, 60000), columns=[f"G{i}" for i in range(2500)])
    assert is_array_like(array)
    to_tpm(np.log2(array), "auto", None)
    assert "as in microarrays" in capsys.readouterr().out
    cpm = array.where(rng.random(array.shape) > 0.3, 0)
    to_tpm(cpm.div(cpm.sum(axis=1), axis=0) * 1e6, "auto", None)
    out = capsys.readouterr().out
    assert "recognised as tpm or counts per million" in out and "microarrays" not in out


def test_a_bulk_of_few_shared_genes_is_told_what_to_do(tmp_path, capsys):
    pd.DataFrame(1.5, ["s"], GENES[:20]).to_csv(tmp_path / "panel.csv")
    read_bulk(tmp_path / "panel.csv", GENES)
    assert "WARNING: only 6.7% of the single cells' genes are in the bulk" in capsys.readouterr().out
