"""Metrics by hand, and on cells that are as good as real, or worse in one known way."""

import anndata as ad
import numpy as np
import pytest
import scipy.sparse as sp
from helpers import simulated_dataset

from lib.evaluation import metrics
from lib.evaluation.metrics import ccc, ilisi, mae, marker_recovery, memorisation, mmd, pearson


def test_by_hand():
    true, estimate = np.array([[0.0, 1.0], [2.0, 3.0]]), np.array([[1.0, 1.0], [3.0, 3.0]])
    assert mae(true, estimate) == 0.5
    assert pearson(true, estimate) == pytest.approx(np.corrcoef(true.ravel(), estimate.ravel())[0, 1])
    # covariance 1, variances 1.25 and 1, means 1.5 and 2
    assert ccc(true, estimate) == pytest.approx(2 * 1.0 / (1.25 + 1.0 + 0.25))


def test_ccc_sees_scale_and_shift_that_r_does_not():
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
    # two points a side, by hand: the six squared distances are 1, 1, 2, 1, 1 and 2, so the kernel is as wide as 1
    square = mmd(np.array([[0.0, 0.0], [0.0, 1.0]]), np.array([[1.0, 0.0], [1.0, 1.0]]))
    assert square == pytest.approx(2 * np.exp(-1) - 2 * (2 * np.exp(-1) + 2 * np.exp(-2)) / 4)


def test_ilisi_counts_the_sets_around_a_cell():
    rng = np.random.default_rng(0)
    pcs, is_other = rng.normal(size=(600, 3)), np.arange(600) % 2 == 0
    assert ilisi(pcs, is_other) > 1.8  # by chance no neighbourhood is quite even
    assert ilisi(pcs + 100.0 * is_other[:, None], is_other) == pytest.approx(1.0)


def test_a_copy_of_train_cells_is_caught():
    rng = np.random.default_rng(0)
    train, test, new = rng.normal(size=(3, 400, 10))
    assert memorisation(train + 1e-3, train, test) > 0.99
    assert memorisation(new, train, test) == pytest.approx(0.5, abs=0.1)


@pytest.fixture(scope="module")
def sets() -> tuple[ad.AnnData, ad.AnnData]:
    """Real cells, and as many others of the same distributions."""
    whole = simulated_dataset(n_cells=1200, n_genes=120, seed=3)
    return whole[::2].copy(), whole[1::2].copy()


def altered(cells: ad.AnnData, edit) -> ad.AnnData:
    other = cells.copy()
    other.X = sp.csr_matrix(edit(cells.X.toarray()).astype(np.float32))
    return other


def test_real_cells_pass_every_judge(sets):
    real, other = sets
    found = metrics.fidelity(real, other, np.arange(60), seed=0)
    assert (
        found["forest AUC"] < 0.57 and found["linear AUC"] < 0.57 and found["iLISI"] > 1.8 and abs(found["MMD"]) < 0.005
    )
    assert found["gene correlation r"] > 0.9 and found["library size KS"] < 0.1 and found["marker overlap"] > 0.8
    assert found["F1 train on these, test on real"] > 0.9


def test_each_judge_sees_its_own_fault(sets):
    real, other = sets
    rng = np.random.default_rng(0)
    good = metrics.fidelity(real, other, np.arange(60), seed=0)
    one_gene = metrics.fidelity(real, altered(other, lambda x: x + np.eye(120)[5] * 3), np.arange(60), seed=0)
    assert one_gene["linear AUC"] > good["linear AUC"] + 0.2
    types = other.obs["cell_type"].cat.codes.to_numpy()

    def shuffled_genes(x):  # each gene on its own, within each type: marginals stay, correlations go
        for k in range(3):
            for gene in range(x.shape[1]):
                x[types == k, gene] = rng.permutation(x[types == k, gene])
        return x

    independent = metrics.fidelity(real, altered(other, shuffled_genes), np.arange(60), seed=0)
    assert independent["gene correlation MAE"] > 2 * good["gene correlation MAE"]
    assert independent["marker overlap"] == pytest.approx(good["marker overlap"], abs=0.1)
    thinned = metrics.fidelity(real, altered(other, lambda x: rng.binomial(x.astype(int), 0.7)), np.arange(60), seed=0)
    assert thinned["library size KS"] > 0.2 > good["library size KS"]
    assert thinned["gene zeros MAE"] > 2 * good["gene zeros MAE"]


def test_markers_of_swapped_types_are_not_recovered(sets):
    real, other = sets
    swapped = other.copy()
    swapped.obs["cell_type"] = (
        swapped.obs["cell_type"]
        .cat.rename_categories({"type 0": "type 1", "type 1": "type 0"})
        .cat.reorder_categories(real.obs["cell_type"].cat.categories)
    )
    assert marker_recovery(real, other)[1] > 0.9 > 0.3 > marker_recovery(real, swapped)[1]
