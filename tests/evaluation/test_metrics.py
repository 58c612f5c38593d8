"""Metrics by hand, and on cells of the same distribution as the test cells, or altered in one known way."""

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from helpers import simulated_dataset

from lib.evaluation import metrics
from lib.evaluation.metrics import ccc, ilisi, mae, marker_recovery, memorisation, mmd, pearson


def test_mae_r_and_ccc_by_hand():
    true, estimate = np.array([[0.0, 1.0], [2.0, 3.0]]), np.array([[1.0, 1.0], [3.0, 3.0]])
    assert mae(true, estimate) == 0.5
    assert pearson(true, estimate) == pytest.approx(np.corrcoef(true.ravel(), estimate.ravel())[0, 1])
    # covariance 1, variances 1.25 and 1, means 1.5 and 2
    assert ccc(true, estimate) == pytest.approx(2 * 1.0 / (1.25 + 1.0 + 0.25))


def test_ccc_depends_on_scale_and_shift_and_r_does_not():
    true = np.linspace(0, 1, 11)
    assert pearson(true, 0.5 * true + 0.2) == pytest.approx(1)
    assert ccc(true, 0.5 * true + 0.2) < 0.9
    assert ccc(true, true) == pytest.approx(1)
    assert ccc(true, np.full(11, 0.5)) == pytest.approx(0)


def test_mmd_is_zero_for_one_distribution_and_grows_with_the_shift():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(300, 5)), rng.normal(size=(300, 5))
    same, near, far = (mmd(x, y + shift) for shift in (0.0, 0.5, 2.0))
    assert abs(same) < 0.01 < near < far
    # by hand, two points in each set: the six squared distances are 1, 1, 2, 1, 1 and 2, so the width of the kernel is 1
    square = mmd(np.array([[0.0, 0.0], [0.0, 1.0]]), np.array([[1.0, 0.0], [1.0, 1.0]]))
    assert square == pytest.approx(2 * np.exp(-1) - 2 * (2 * np.exp(-1) + 2 * np.exp(-2)) / 4)


def test_ilisi_is_the_number_of_sets_in_a_neighbourhood():
    rng = np.random.default_rng(0)
    pcs, is_second = rng.normal(size=(600, 3)), np.arange(600) % 2 == 0
    assert ilisi(pcs, is_second) > 1.8  # not quite 2: neighbourhoods are uneven by chance
    assert ilisi(pcs + 100.0 * is_second[:, None], is_second) == pytest.approx(1.0)


def test_copies_of_train_cells_have_memorisation_1():
    rng = np.random.default_rng(0)
    train, test, new = rng.normal(size=(3, 400, 10))
    assert memorisation(train + 1e-3, train, test) > 0.99
    assert memorisation(new, train, test) == pytest.approx(0.5, abs=0.1)


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


@pytest.fixture(scope="module")
def good(sets) -> pd.Series:
    """The metrics of cells of the same distribution."""
    return metrics.fidelity(*sets, np.arange(60), seed=0)


def test_cells_of_the_same_distribution_are_near_the_best_value_of_every_metric(good):
    assert good["forest AUC"] < 0.57 and good["linear AUC"] < 0.57 and good["iLISI"] > 1.8 and abs(good["MMD"]) < 0.005
    assert good["gene correlation r"] > 0.9 and good["library size KS"] < 0.1 and good["marker overlap"] > 0.8
    assert good["F1 train on these, test on real"] > 0.9


def test_each_metric_detects_its_own_alteration(sets, good, monkeypatch):
    for slow in ("forest_auc", "transfer_f1"):  # not looked at here
        monkeypatch.setattr(metrics, slow, lambda *_: 0.5)
    test, cells = sets
    rng = np.random.default_rng(0)
    one_gene = metrics.fidelity(test, altered(cells, lambda x: x + np.eye(120)[5] * 3), np.arange(60), seed=0)
    assert one_gene["linear AUC"] > good["linear AUC"] + 0.2
    types = cells.obs["cell_type"].cat.codes.to_numpy()

    def shuffled_genes(x):  # each gene by itself, within each type: keeps marginals, removes correlations
        for k in range(3):
            for gene in range(x.shape[1]):
                x[types == k, gene] = rng.permutation(x[types == k, gene])
        return x

    independent = metrics.fidelity(test, altered(cells, shuffled_genes), np.arange(60), seed=0)
    assert independent["gene correlation MAE"] > 2 * good["gene correlation MAE"]
    assert independent["marker overlap"] == pytest.approx(good["marker overlap"], abs=0.1)
    thinned = metrics.fidelity(test, altered(cells, lambda x: rng.binomial(x.astype(int), 0.7)), np.arange(60), seed=0)
    assert thinned["library size KS"] > 0.2 > good["library size KS"]
    assert thinned["gene zeros MAE"] > 2 * good["gene zeros MAE"]


def test_markers_of_swapped_types_are_not_recovered(sets):
    test, cells = sets
    swapped = cells.copy()
    swapped.obs["cell_type"] = (
        swapped.obs["cell_type"]
        .cat.rename_categories({"type 0": "type 1", "type 1": "type 0"})
        .cat.reorder_categories(test.obs["cell_type"].cat.categories)
    )
    assert marker_recovery(test, cells)[1] > 0.9 > 0.3 > marker_recovery(test, swapped)[1]


def test_a_row_of_agreement_per_type_and_one_for_all():
    true = pd.DataFrame({"a": [0.2, 0.6], "b": [0.8, 0.4]})
    estimate = pd.DataFrame({"a": [0.4, 0.6], "b": [0.6, 0.4]})
    table = metrics.proportion_agreement(true, estimate)
    assert list(table.index) == ["a", "b", "all types"]
    # a: means 0.4 and 0.5, variances 0.04 and 0.01, covariance 0.02
    assert table.loc["a"].to_list() == pytest.approx([0.1, 2 * 0.02 / (0.04 + 0.01 + 0.01), 1])
    assert table.loc["all types", "MAE"] == pytest.approx(0.1)


def test_generated_types_correlate_with_the_types_of_the_same_name(sets):
    test, cells = sets
    r, n_genes = metrics.type_correlation(test, cells[(cells.obs["cell_type"] != "type 1").to_numpy()].copy(), 10)
    assert list(r.index) == ["type 0", "type 2"] and list(r.columns) == ["type 0", "type 1", "type 2"]
    assert 10 < n_genes <= 30
    assert min(r.loc[name, name] for name in r.index) > 0.95 and r.loc["type 0", "type 2"] < 0.5


def test_the_table_compares_both_sets_with_test_cells_for_all_cells_and_each_large_type(sets, monkeypatch):
    calls = []

    def sizes(test, cells, genes, seed, within_type=False):
        calls.append((test.n_obs, cells.n_obs, within_type))
        return pd.Series({"forest AUC": cells.n_obs})

    monkeypatch.setattr(metrics, "fidelity", sizes)
    test, cells = sets
    large = (test.obs["cell_type"] != "type 2").to_numpy() | (
        np.arange(test.n_obs) > test.n_obs - 10
    )  # type 2: 9 cells
    unseen = cells[100:300].copy()
    table = metrics.fidelity_table(test[large].copy(), cells, test, unseen, np.arange(30), seed=0)
    assert list(table["cells"]) == ["all", "all", "type 0", "type 1"]
    assert list(table["figure"]) == ["forest AUC", "nearest real cell is a train cell", "forest AUC", "forest AUC"]
    n = test.obs["cell_type"].value_counts()
    assert calls[1:3] == [
        (large.sum(), test.n_obs, False),
        (n["type 0"], (cells.obs["cell_type"] == "type 0").sum(), True),
    ]
    # the reference holds copies of the test cells, at the same distance from each cell as these
    assert table.loc[1, ["generated", "real"]].between(0.5, 1).all()
    table = metrics.fidelity_table(test[large].copy(), cells, test, unseen[:0].copy(), np.arange(30), seed=0)
    assert np.isnan(table.loc[1, "real"]) and table.loc[1, "generated"] > 0.5
