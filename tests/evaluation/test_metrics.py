"""Metrics by hand, and on cells of the same distribution as the test cells, or altered in one known way."""

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from helpers import simulated_dataset
from scipy.cluster.hierarchy import leaves_list

from lib.evaluation import metrics
from lib.evaluation.metrics import ccc, mae, pearson


def test_mae_r_and_ccc_by_hand():
    true, estimate = np.array([[0.0, 1.0], [2.0, 3.0]]), np.array([[1.0, 1.0], [3.0, 3.0]])
    assert mae(true, estimate) == 0.5
    assert pearson(true, estimate) == pytest.approx(np.corrcoef(true.ravel(), estimate.ravel())[0, 1])
    # covariance 1, variances 1.25 and 1, means 1.5 and 2
    assert ccc(true, estimate) == pytest.approx(2 * 1.0 / (1.25 + 1.0 + 0.25))
    assert pearson(true, 0.5 * true + 0.2) == pytest.approx(1) and ccc(true, 0.5 * true + 0.2) < 0.9
    assert ccc(true, true) == pytest.approx(1) and ccc(true, np.full((2, 2), 0.5)) == pytest.approx(0)
    assert np.isnan(pearson(true, np.full((2, 2), 0.5)))


def test_a_row_of_agreement_per_type_and_one_for_all():
    true = pd.DataFrame({"a": [0.2, 0.6], "b": [0.8, 0.4]})
    estimate = pd.DataFrame({"a": [0.4, 0.6], "b": [0.6, 0.4]})
    table = metrics.proportion_agreement(true, estimate)
    assert list(table.index) == ["a", "b", "all types"]
    # a: means 0.4 and 0.5, variances 0.04 and 0.01, covariance 0.02
    assert table.loc["a"].to_list() == pytest.approx([0.1, 2 * 0.02 / (0.04 + 0.01 + 0.01), 1])
    assert table.loc["all types", "MAE"] == pytest.approx(0.1)


def test_mean_expression_and_fold_changes_by_hand():
    """Two cells of type a, one of type b, none of type c; two genes."""
    cells = ad.AnnData(sp.csr_matrix(np.array([[1.0, 1.0], [0.0, 4.0], [3.0, 0.0]], np.float32)))
    cells.obs["cell_type"] = pd.Categorical(["a", "a", "b"], categories=["a", "b", "c"])
    table = metrics.mean_expression(cells, np.array([True, True]))
    np.testing.assert_allclose(table.loc["a"], [np.log1p(5000) / 2, (np.log1p(5000) + np.log1p(10000)) / 2], rtol=1e-5)
    np.testing.assert_allclose(table.loc["b"], [np.log1p(10000), 0], rtol=1e-5)
    assert table.loc["c"].isna().all()
    changes = metrics.type_fold_changes(cells)
    assert list(changes.columns) == ["a", "b"]
    expected = np.log2([[2500.1 / 10000.1, 10000.1 / 2500.1], [7500.1 / 0.1, 0.1 / 7500.1]])
    np.testing.assert_allclose(changes, expected, rtol=1e-5)
    assert metrics.type_fold_changes(cells[:2].copy()).shape == (2, 0)  # nothing to compare with


def test_clusters_of_genes_are_next_to_each_other():
    group = np.array([0, 1, 0, 1, 0, 1])
    order = leaves_list(metrics.cluster_tree(np.where(group[:, None] == group, 0.9, 0.0) + 0.1 * np.eye(6)))
    assert sorted(order) == list(range(6)) and np.abs(np.diff(group[order])).sum() == 1


def test_proportions_have_one_row_per_sample(monkeypatch):
    types = pd.CategoricalDtype(["a", "b"])
    train = pd.DataFrame({"cell_type": pd.Series(["a", "a", "a", "b"], dtype=types)})
    generated = train.assign(sample=["s1", "s1", "s2", "s2"])
    table = metrics.type_proportions({"train": train, "generated": generated})
    assert list(table.index) == ["train", "generated, s1", "generated, s2"]
    np.testing.assert_array_equal(table, [[0.75, 0.25], [1, 0], [0.5, 0.5]])
    assert list(metrics.type_proportions({"generated": train.assign(sample="s1")}).index) == ["generated"]
    monkeypatch.setattr(metrics, "MAX_SAMPLES", 1)
    assert list(metrics.type_proportions({"generated": generated}).index) == ["generated, s1"]


def test_statistics_of_genes_and_cells_against_numpy():
    cells = simulated_dataset(n_cells=50)
    counts = cells.X.toarray()
    values = np.log1p(counts / counts.sum(axis=1, keepdims=True) * 1e4)
    genes = metrics.gene_statistics(cells)
    np.testing.assert_allclose(genes["mean"], values.mean(axis=0), rtol=1e-5)
    np.testing.assert_allclose(genes["variance"], values.var(axis=0), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(genes["zeros"], (counts == 0).mean(axis=0))
    expected = np.column_stack([counts.sum(axis=1), (counts > 0).sum(axis=1)])
    np.testing.assert_allclose(metrics.library_and_genes(cells), expected)
    r = metrics.gene_correlation(cells, np.arange(20))
    np.testing.assert_allclose(r, np.corrcoef(values[:, :20].T), atol=1e-5)
    cells.X = sp.csr_matrix(counts * (np.arange(60) > 0))
    assert not metrics.gene_correlation(cells, np.arange(20))[0].any()  # a gene without counts


def test_ilisi_is_the_number_of_sets_in_a_neighbourhood():
    rng = np.random.default_rng(0)
    pcs, is_second = rng.normal(size=(600, 3)), np.arange(600) % 2 == 0
    assert metrics.ilisi(pcs, is_second) > 1.8  # not quite 2: neighbourhoods are uneven by chance
    assert metrics.ilisi(pcs + 100.0 * is_second[:, None], is_second) == pytest.approx(1.0)


@pytest.fixture(scope="module")
def sets() -> tuple[ad.AnnData, ad.AnnData]:
    """Test cells, and as many cells of the same distribution."""
    whole = simulated_dataset(n_cells=1200, n_genes=120, seed=3)
    return whole[::2].copy(), whole[1::2].copy()


def altered(cells: ad.AnnData, edit) -> ad.AnnData:
    """The cells with their counts (dense) changed by `edit`."""
    changed = cells.copy()
    changed.X = sp.csr_matrix(edit(cells.X.toarray()).astype(np.float32))
    return changed


def test_cells_of_the_same_distribution_are_near_the_best_value_of_every_metric(sets):
    good = metrics.fidelity(*sets, np.arange(60), seed=0)
    assert good["forest AUC"] < 0.57 and good["linear AUC"] < 0.57 and good["iLISI"] > 1.8
    assert good["gene correlation r"] > 0.9 and good["library size KS"] < 0.1 and good["marker overlap"] > 0.8
    assert good["F1 train on these, test on real"] > 0.9


def test_each_metric_detects_its_own_alteration(sets):
    test, cells = sets
    rng = np.random.default_rng(0)
    one_gene = altered(cells, lambda x: x + np.eye(120)[5] * 3)
    assert metrics.linear_auc(test, one_gene, seed=0) > metrics.linear_auc(test, cells, seed=0) + 0.2
    types = cells.obs["cell_type"].cat.codes.to_numpy()

    def shuffled_genes(x):  # each gene by itself, within each type: keeps marginals, removes correlations
        for k in range(3):
            for gene in range(x.shape[1]):
                x[types == k, gene] = rng.permutation(x[types == k, gene])
        return x

    independent = altered(cells, shuffled_genes)
    in_test, good, bad = (metrics.gene_correlation(part, np.arange(60)) for part in (test, cells, independent))
    good_mae, bad_mae = (metrics.correlation_agreement(in_test, r)[1] for r in (good, bad))
    assert bad_mae > 2 * good_mae
    overlap = metrics.marker_recovery(test, cells)[0]
    assert metrics.marker_recovery(test, independent)[0] == pytest.approx(overlap, abs=0.1)
    swapped = cells.copy()
    swapped.obs["cell_type"] = cells.obs["cell_type"].cat.rename_categories({"type 0": "type 1", "type 1": "type 0"})
    assert metrics.marker_recovery(test, cells)[1] > 0.9 > 0.3 > metrics.marker_recovery(test, swapped)[1]
    thinned = altered(cells, lambda x: rng.binomial(x.astype(int), 0.7))
    distance, distance_thinned = (metrics.distribution_distances(test, part) for part in (cells, thinned))
    assert distance_thinned["library size KS"] > 0.2 > distance["library size KS"]


def test_generated_types_correlate_with_the_types_of_the_same_name(sets):
    test, cells = sets
    r, n_genes = metrics.type_correlation(test, cells[(cells.obs["cell_type"] != "type 1").to_numpy()].copy(), 10)
    assert list(r.index) == ["type 0", "type 2"] and list(r.columns) == ["type 0", "type 1", "type 2"]
    assert 10 < n_genes <= 30 and min(r.loc[name, name] for name in r.index) > 0.95 and r.loc["type 0", "type 2"] < 0.5


def test_the_membership_test_catches_a_generator_that_copies_half_of_its_cells():
    """600 train, 300 test and 600 generated cells of one distribution; half of the generated cells copy random train cells."""
    cells = simulated_dataset(n_cells=1500, n_genes=120, seed=4)
    rng = np.random.default_rng(0)
    train, test, new = (cells[rows].copy() for rows in np.split(rng.permutation(1500), [600, 900]))
    honest = metrics.membership(new, train, test)
    assert list(honest.index) == ["all", "type 0", "type 1", "type 2"]
    assert honest["n_cells"].to_list() == [300, *test.obs["cell_type"].value_counts(sort=False)]
    assert honest.loc["all", "membership AUC"] == pytest.approx(0.5, abs=0.06)  # three standard errors
    assert honest.loc["all", "membership TPR at 1 % FPR"] == pytest.approx(0.01, abs=0.02)
    copying = ad.AnnData(sp.vstack([new.X[:300], train.X[rng.integers(0, 600, 300)]], format="csr"))
    copied = 1 - (1 - 1 / 600) ** 300  # expected share of the train cells that are copied, 39 %
    found = metrics.membership(copying, train, test)
    assert found.loc["all", "membership AUC"] == pytest.approx(copied + (1 - copied) / 2, abs=0.06)
    assert found.loc["all", "membership TPR at 1 % FPR"] == pytest.approx(copied + 0.01, abs=0.05)
    assert (found["membership AUC"] > 0.6).all()
    few = metrics.membership(copying, train, test[:98].copy())
    assert np.isnan(few.loc["all", "membership TPR at 1 % FPR"]) and few.loc["all", "membership AUC"] > 0.6


def test_the_table_compares_both_sets_with_test_cells_for_all_cells_and_each_large_type():
    cells = simulated_dataset(n_cells=180, n_types=2, seed=5)
    is_small = (cells.obs["cell_type"] == "type 1").to_numpy() & (np.arange(180) < 170)  # 10 cells of type 1
    cells = cells[~is_small].copy()
    test, generated = cells[::2].copy(), cells[1::2].copy()
    evaluation = metrics.EvaluationCells(test, test, cells, test, np.arange(30), seed=0)
    table = metrics.fidelity_table(evaluation, generated, generated)
    n_cells = table.groupby("cells")["n_cells"].unique().map(list).to_dict()
    assert n_cells == {"all": [test.n_obs], "type 0": [(test.obs["cell_type"] == "type 0").sum()]}
    table = table.set_index(["cells", "figure"])
    assert len(table.loc["all"]) == len(table.loc["type 0"]) + 4  # markers, fold changes, F1 twice
    for name in ("gene mean MAE", "gene zeros MAE", "library size KS"):  # the reference is the test cells themselves
        assert (table.xs(name, level="figure")["real"] == 0).all()
        assert (table.xs(name, level="figure")["generated"] > 0).all()
    assert table.xs("membership AUC", level="figure")["real"].isna().all()
