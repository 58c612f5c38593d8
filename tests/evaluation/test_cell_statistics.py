"""Statistics of a set of cells, by hand and against direct computations."""

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from helpers import simulated_dataset
from scipy.cluster.hierarchy import leaves_list

from lib.evaluation import cell_statistics
from lib.models.profiles import log_fold_changes, top_genes


@pytest.fixture
def three_cells() -> ad.AnnData:
    """Two cells of type a, one of type b, none of type c; two genes."""
    adata = ad.AnnData(sp.csr_matrix(np.array([[1.0, 1.0], [0.0, 4.0], [3.0, 0.0]], np.float32)))
    adata.obs["cell_type"] = pd.Categorical(["a", "a", "b"], categories=["a", "b", "c"])
    return adata


def test_mean_expression_by_hand(three_cells):
    table = cell_statistics.mean_expression(three_cells, np.array([True, True]))
    np.testing.assert_allclose(table.loc["a"], [np.log1p(5000) / 2, (np.log1p(5000) + np.log1p(10000)) / 2], rtol=1e-5)
    np.testing.assert_allclose(table.loc["b"], [np.log1p(10000), 0], rtol=1e-5)
    assert table.loc["c"].isna().all()


def test_fold_changes_by_hand(three_cells):
    table = cell_statistics.log_fold_changes(three_cells)
    assert list(table.columns) == ["a", "b"]
    expected = np.log2([[2500.1 / 10000.1, 10000.1 / 2500.1], [7500.1 / 0.1, 0.1 / 7500.1]])
    np.testing.assert_allclose(table, expected, rtol=1e-5)


def test_fold_changes_are_of_a_type_against_all_other_cells():
    cells = simulated_dataset(n_cells=200)
    share = cells.X.toarray() / cells.X.toarray().sum(axis=1, keepdims=True) * 1e4
    mine = (cells.obs["cell_type"] == "type 1").to_numpy()
    expected = np.log2((share[mine].mean(axis=0) + 0.1) / (share[~mine].mean(axis=0) + 0.1))
    table = cell_statistics.log_fold_changes(cells)
    np.testing.assert_allclose(table["type 1"], expected, rtol=1e-4, atol=1e-5)
    assert cell_statistics.log_fold_changes(cells[mine].copy()).shape == (60, 0)  # nothing to compare with


def test_fold_changes_of_profiles_weight_the_other_types():
    expression = np.array([[3.9, 0.0], [0.9, 0.0], [1.9, 4.0]])
    np.testing.assert_allclose(log_fold_changes(expression)[0, 0], np.log2(4.0 / 1.5))
    np.testing.assert_allclose(log_fold_changes(expression, np.array([7, 1, 3]))[0, 0], np.log2(4.0 / 1.75))
    assert top_genes(np.array([[1.0, 2.0, 2.0], [0.0, 0.0, 0.0]]), 2).tolist() == [[1, 2], [0, 1]]


def test_clusters_of_genes_are_next_to_each_other():
    group = np.array([0, 1, 0, 1, 0, 1])
    order = leaves_list(cell_statistics.cluster_tree(np.where(group[:, None] == group, 0.9, 0.0) + 0.1 * np.eye(6)))
    assert sorted(order) == list(range(6)) and np.abs(np.diff(group[order])).sum() == 1


def test_proportions_have_one_row_per_sample():
    types = pd.CategoricalDtype(["a", "b"])
    train = pd.DataFrame({"cell_type": pd.Series(["a", "a", "a", "b"], dtype=types)})
    generated = train.assign(sample=["s1", "s1", "s2", "s2"])
    table = cell_statistics.type_proportions({"train": train, "generated": generated})
    assert list(table.index) == ["train", "generated, s1", "generated, s2"]
    np.testing.assert_array_equal(table, [[0.75, 0.25], [1, 0], [0.5, 0.5]])
    one = cell_statistics.type_proportions({"generated": train.assign(sample="s1")})
    assert list(one.index) == ["generated"]
    assert len(cell_statistics.type_proportions({"generated": generated}, max_samples=1)) == 1


def test_statistics_of_genes_against_numpy():
    cells = simulated_dataset(n_cells=50)
    counts = cells.X.toarray()
    values = np.log1p(counts / counts.sum(axis=1, keepdims=True) * 1e4)
    of = cell_statistics.summarise(cells)
    np.testing.assert_allclose(of.genes["mean"], values.mean(axis=0), rtol=1e-5)
    np.testing.assert_allclose(of.genes["variance"], values.var(axis=0), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(of.genes["zeros"], (counts == 0).mean(axis=0))
    np.testing.assert_allclose(of.library_size, counts.sum(axis=1))
    np.testing.assert_array_equal(of.n_genes, (counts > 0).sum(axis=1))
    r = cell_statistics.gene_correlation(cells, np.arange(20))
    np.testing.assert_allclose(r, np.corrcoef(values[:, :20].T), atol=1e-5)
