"""Outlier counts are found where they are, nowhere else, and new cells have as many of them."""

import numpy as np
import pytest
import scipy.sparse as sp
import torch

from lib.data.batches import CellDataset
from lib.models import outliers
from lib.models.profiles import log_theta_by_moments, type_profiles

CPU = torch.device("cpu")
RATE, THETA = 1 / 500, 10.0


@pytest.fixture(scope="module")
def simulated():
    """Counts without and with outliers, types and profiles: 900 cells of 3 types, 400 genes, one molecule in 500 counted 10 to 60 times."""
    rng = np.random.default_rng(0)
    profiles = rng.dirichlet(np.full(400, 0.3), 3)
    types = rng.integers(0, 3, 900)
    mu = rng.lognormal(7.5, 0.4, 900)[:, None] * profiles[types]
    x = rng.poisson(rng.gamma(THETA, mu / THETA))
    extra = rng.binomial(x, RATE) * rng.integers(10, 60, x.shape)
    clean, counts = (sp.csr_matrix(values.astype(np.float32)) for values in (x, x + extra))
    return clean, counts, types


def test_outliers_are_found_and_replaced(simulated):
    clean, counts, types = simulated
    found = outliers.find(CellDataset(counts, types, CPU), 3, 0)
    replaced = found.replace(counts, types)
    true, called = (counts - clean).toarray() >= 20, (counts - replaced).toarray() > 0
    # among a hundred molecules, expected in this type or in another, 20 more are nothing special
    rare = np.max([clean[types == k].mean(axis=0) for k in range(3)], axis=0) < 5
    assert called[true & np.asarray(rare)].mean() > 0.9 and (counts.toarray() > clean.toarray())[called].mean() > 0.95
    assert found.rate[0] == pytest.approx(RATE, rel=0.25) and found.sizes[0].mean() == pytest.approx(35, rel=0.15)
    assert found.rate[-1] < 0.5 * found.rate[0]  # of the genes with most molecules
    assert (replaced.toarray()[called] >= 1).all() and (replaced.indices == counts.indices).all()


def test_without_outliers_theta_is_that_of_the_other_counts(simulated):
    _, counts, types = simulated
    found = outliers.find(CellDataset(counts, types, CPU), 3, 0)
    expressed = np.asarray(counts.mean(axis=0)).ravel() > 1

    def theta(x):
        cells = CellDataset(x, types, CPU)
        return np.median(np.exp(log_theta_by_moments(cells, type_profiles(cells, 3)))[expressed])

    assert theta(counts) < 0.6 * THETA
    assert theta(found.replace(counts, types)) == pytest.approx(THETA, rel=0.2)
    assert np.median(found.theta[expressed]) == pytest.approx(THETA, rel=0.2)


def test_overdispersed_counts_are_no_outliers(simulated):
    clean, _, types = simulated
    found = outliers.find(CellDataset(clean, types, CPU), 3, 0)
    assert (found.rate < RATE / 10).all()
    assert (found.replace(clean, types).data != clean.data).mean() < 1e-3


def test_poisson_counts_have_none():
    counts = sp.csr_matrix(np.random.default_rng(1).poisson(1.0, (200, 50)).astype(np.float32))
    found = outliers.find(CellDataset(counts, np.zeros(200, dtype=int), CPU), 1, 0)
    assert not found.rate.any() and found.sizes.shape == (outliers.N_GROUPS, outliers.N_SIZES)


def test_another_types_genes_are_no_outliers(simulated):
    """Cells with a wrong label, which express genes that their type lacks, keep nearly all counts."""
    clean, _, types = simulated
    labels = types.copy()
    wrong = np.random.default_rng(3).permutation(len(types))[:15]
    labels[wrong] = (types[wrong] + 1) % 3
    replaced = outliers.find(CellDataset(clean, labels, CPU), 3, 0).replace(clean, labels)
    kept = replaced[wrong].sum(axis=1) / clean[wrong].sum(axis=1)
    assert kept.min() > 0.97


def test_replacing_by_hand():
    """Expected counts: 20 and .2 in type 0, .2 and 20 in type 1, 10 and 10 in a cell without a type; the other gene fills the library.

    A count of 30 in the type that expects .2 is explained by the other type, one of 90 is not.
    """
    rest = np.array([0.979, 0.979, 0.98])
    profiles = np.column_stack([[0.02, 0.0002, 0.01], [0.0002, 0.02, 0.01], rest + 1e-4])
    sizes = np.array([[3.0, 3.0, 3.0], [40.0, 60.0, 90.0]])
    about = outliers.Outliers(profiles, np.full(3, 100.0), np.array([1, 1, 0]), np.array([1e-9, 1e-3]), sizes)
    counts = np.array([[30, 30, 940], [30, 90, 880], [90, 30, 880], [12, 90, 898], [9, 0, 991]], np.float32)
    replaced = about.replace(sp.csr_matrix(counts), np.array([0, 0, 1, -1, 0]))
    expected = [[30, 30, 940], [30, 1, 880], [1, 30, 880], [12, 10, 898], [9, 0, 991]]
    np.testing.assert_array_equal(replaced.toarray(), expected)


def test_new_cells_get_outliers_at_counted_molecules():
    rng = np.random.default_rng(2)
    counts = sp.csr_matrix(rng.poisson(2.0, (2000, 100)).astype(np.float32))
    group, rate, sizes = np.arange(100) % 2, np.array([0.01, 0.0]), np.array([[5.0, 10.4, 30.0], [7.0, 7.0, 7.0]])
    made = [counts.copy() for _ in range(3)]
    for x, seed in zip(made, (0, 0, 1)):
        outliers.put_back(x, group, rate, sizes, torch.Generator().manual_seed(seed))
    np.testing.assert_array_equal(made[0].data, made[1].data)
    assert (made[0].data != made[2].data).any() and (made[0].indices == counts.indices).all()
    added, of_group = made[0].data - counts.data, group[counts.indices]
    assert not added[of_group == 1].any() and {0, 5, 10, 30} <= set(np.unique(added))
    assert added.sum() / counts.data[of_group == 0].sum() == pytest.approx(0.01 * 45 / 3, rel=0.1)  # 10.4 is rounded
    assert counts.data[added > 0].mean() > counts.data.mean() + 0.5  # the more molecules, the more outliers

    unchanged, empty = counts.copy(), sp.csr_matrix((3, 100), dtype=np.float32)
    outliers.put_back(unchanged, group, np.zeros(2), sizes, torch.Generator().manual_seed(0))
    outliers.put_back(empty, group, rate, sizes, torch.Generator().manual_seed(0))
    np.testing.assert_array_equal(unchanged.data, counts.data)
