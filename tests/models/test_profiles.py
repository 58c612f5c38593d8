"""Profiles, dispersions, fold changes and outlier counts of the cell types: by hand, and recovered from simulated counts."""

import numpy as np
import pytest
import scipy.optimize
import scipy.sparse as sp
import scipy.stats
import torch
from helpers import CPU

from lib.data.batches import CellDataset
from lib.models import profiles
from lib.models.profiles import LOG_THETA_RATIO_SD, Outliers, find_outliers, gene_marginals, nb_baseline


def test_type_means_by_hand():
    """Type 0 has two cells, type 1 one, type 2 none: it gets the mean of all cells."""
    x = np.array([[1.0, 0.0], [6.0, 9.0], [2.0, 6.0]])
    np.testing.assert_allclose(profiles.type_means(x, np.array([0, 1, 0]), 3), [[1.5, 3], [6, 9], [3, 5]])


@pytest.mark.filterwarnings("error")
def test_log_fold_changes_by_hand():
    expression = np.array([[7.9, 0.1], [0.3, 0.1], [1.5, 0.5]])  # counts per 10,000
    # the other types' means are .9, 4.7, 4.1 (first gene) and .3, .3, .1 (second gene)
    expected = np.log2([[8 / 1, 0.2 / 0.4], [0.4 / 4.8, 0.2 / 0.4], [1.6 / 4.2, 0.6 / 0.2]])
    np.testing.assert_allclose(profiles.log_fold_changes(expression), expected)
    # one, three and no cells: the other types' means are .3, 7.9, 2.2 and .1, .1, .1
    expected = np.log2([[8 / 0.4, 0.2 / 0.2], [0.4 / 8, 0.2 / 0.2], [1.6 / 2.3, 0.6 / 0.2]])
    np.testing.assert_allclose(profiles.log_fold_changes(expression, weights=np.array([1, 3, 0])), expected, atol=1e-12)
    np.testing.assert_allclose(
        profiles.log_fold_changes(np.array([[1.9, 0.3]])), np.log2([[20, 4]])
    )  # no other type: 0


def test_top_genes_are_those_of_largest_fold_change():
    fold_changes = np.array([[0.0, 2.0, 3.0, 2.0], [-1.0, -4.0, -2.0, -3.0]])
    assert profiles.top_genes(fold_changes, 2).tolist() == [[2, 1], [0, 2]]  # of equal genes the first
    assert profiles.top_genes(fold_changes, 9).shape == (2, 4)


def test_profiles_keep_markers_and_shrink_chance_differences():
    rng = np.random.default_rng(0)
    n_genes = 400
    truth = np.tile(rng.dirichlet(np.full(n_genes, 2.0)), (2, 1))
    truth[1, :4] *= 30  # markers of a type of ten cells
    truth /= truth.sum(axis=1, keepdims=True)
    types = np.repeat([0, 1], [500, 10])
    counts = rng.poisson(800 * truth[types]).astype(np.float32)
    estimate = profiles.type_profiles(CellDataset(sp.csr_matrix(counts), types, CPU), 2)
    naive = counts[types == 1].sum(axis=0) / counts[types == 1].sum()
    np.testing.assert_allclose(estimate.sum(axis=1), 1)
    assert (estimate > 0).all()
    np.testing.assert_allclose(estimate[1, :4], naive[:4], rtol=0.25)  # markers keep their rate
    error, naive_error = (np.abs(np.log((x + 1e-6) / truth[1]))[4:].mean() for x in (estimate[1], naive))
    assert error < 0.75 * naive_error


def test_a_type_without_cells_has_the_profile_of_all_cells():
    counts = sp.csr_matrix(np.array([[8.0, 2, 0], [6, 4, 0], [0, 0, 10]]))
    estimate = profiles.type_profiles(CellDataset(counts, np.array([0, 0, -1]), CPU), 2)
    assert (estimate > 0).all()
    np.testing.assert_allclose(estimate[1], (np.array([14, 6, 0]) + 0.5) / 21.5, rtol=1e-6)


def simulated_nb(n_cells: int = 90):
    """Three types, one of them rare, whose genes differ in theta: counts and types."""
    rng = np.random.default_rng(3)
    types = rng.choice(3, n_cells, p=[0.5, 0.4, 0.1])
    theta = rng.lognormal(0.5, 1.5, (3, 40))[types]
    mu = rng.lognormal(5, 0.5, n_cells)[:, None] * rng.dirichlet(np.full(40, 0.7), 3)[types]
    return sp.csr_matrix(rng.poisson(rng.gamma(theta, mu / theta)).astype(np.float32)), types


def most_likely_log_theta(x, mu, centre=0.0, sd=np.inf) -> float:
    """By scipy, for the counts of one gene; prior of log theta: Normal(centre, sd^2)."""

    def loss(log_theta):
        theta = np.exp(log_theta)
        log_likelihood = scipy.stats.nbinom.logpmf(x, theta, theta / (theta + mu)).sum()
        return 0.5 * ((log_theta - centre) / sd) ** 2 - log_likelihood

    return scipy.optimize.minimize_scalar(
        loss, bounds=profiles.LOG_THETA_LIMITS, method="bounded", options={"xatol": 1e-5}
    ).x


def test_nb_baseline_is_the_penalised_maximum_likelihood_of_each_gene_and_type():
    """Each type has fewer cells than bins of library size, so that nothing is approximated."""
    counts, types = simulated_nb(36)
    dataset = CellDataset(counts, types, CPU)
    baseline, x = nb_baseline(dataset, 3), counts.toarray()
    mu = dataset.library_size[:, None] * baseline.profiles[types]
    for gene in range(40):
        centre = most_likely_log_theta(x[:, gene], mu[:, gene])
        for k in range(3):
            of_type = x[types == k, gene], mu[types == k, gene]
            expected = most_likely_log_theta(*of_type, centre, LOG_THETA_RATIO_SD)
            assert baseline.log_theta[k, gene] == pytest.approx(expected, abs=0.03)


def test_the_likelihood_of_the_baseline_is_that_of_scipy_and_above_that_of_one_theta_per_gene():
    counts, types = simulated_nb(4000)
    train, test = (CellDataset(counts[part], types[part], CPU) for part in (slice(3000), slice(3000, 4000)))
    baseline, y = nb_baseline(train, 3), test.cell_type_idx
    theta, mu = np.exp(baseline.log_theta)[y], test.library_size[:, None] * baseline.profiles[y]
    expected = scipy.stats.nbinom.logpmf(counts[3000:].toarray(), theta, theta / (theta + mu)).sum(axis=1)
    ours, moments = (profiles.nb_per_type_log_likelihood(m, test) for m in (baseline, gene_marginals(train, 3)))
    np.testing.assert_allclose(ours, expected, rtol=1e-4)
    assert ours.mean() > moments.mean() + 1


def test_nb_baseline_of_types_and_genes_without_counts_is_finite():
    counts, types = simulated_nb(60)
    counts = sp.csr_matrix(counts.multiply(np.arange(40) != 7))
    baseline = nb_baseline(CellDataset(counts, np.where(types == 1, -1, types), CPU), 4)
    assert np.isfinite(baseline.log_theta).all() and (baseline.profiles > 0).all()


# --- outlier counts

RATE, THETA = 1 / 500, 10.0


@pytest.fixture(scope="module")
def simulated():
    """Counts without and with outliers, and types: 900 cells of 3 types, 400 genes, one molecule in 500 counted 10 to 60 times."""
    rng = np.random.default_rng(0)
    share = rng.dirichlet(np.full(400, 0.3), 3)
    types = rng.integers(0, 3, 900)
    mu = rng.lognormal(7.5, 0.4, 900)[:, None] * share[types]
    x = rng.poisson(rng.gamma(THETA, mu / THETA))
    extra = rng.binomial(x, RATE) * rng.integers(10, 60, x.shape)
    clean, counts = (sp.csr_matrix(values.astype(np.float32)) for values in (x, x + extra))
    return clean, counts, types


def test_outliers_are_found_and_replaced_and_theta_is_that_of_the_other_counts(simulated):
    clean, counts, types = simulated
    outliers = find_outliers(CellDataset(counts, types, CPU), 3, 0)
    replaced = outliers.replace(counts, types)
    true, called = (counts - clean).toarray() >= 20, (counts - replaced).toarray() > 0
    # among a hundred molecules, expected in this type or in another, 20 more are nothing special
    rare = np.max([clean[types == k].mean(axis=0) for k in range(3)], axis=0) < 5
    assert called[true & np.asarray(rare)].mean() > 0.9 and (counts.toarray() > clean.toarray())[called].mean() > 0.95
    assert outliers.rate[0] == pytest.approx(RATE, rel=0.25) and outliers.sizes[0].mean() == pytest.approx(35, rel=0.15)
    assert outliers.rate[-1] < 0.5 * outliers.rate[0]  # of the genes with most molecules
    assert (replaced.toarray()[called] >= 1).all() and (replaced.indices == counts.indices).all()
    expressed = np.asarray(counts.mean(axis=0)).ravel() > 1
    marginals = [gene_marginals(CellDataset(x, types, CPU), 3) for x in (counts, replaced)]
    of_all, of_others = (np.median(np.exp(m.log_theta)[expressed]) for m in marginals)
    assert of_all < 0.6 * THETA and of_others == pytest.approx(THETA, rel=0.2)
    assert np.median(outliers.theta[expressed]) == pytest.approx(THETA, rel=0.2)


def test_overdispersed_counts_and_poisson_counts_are_no_outliers(simulated):
    clean, _, types = simulated
    outliers = find_outliers(CellDataset(clean, types, CPU), 3, 0)
    assert (outliers.rate < RATE / 10).all()
    assert (outliers.replace(clean, types).data != clean.data).mean() < 1e-3
    counts = sp.csr_matrix(np.random.default_rng(1).poisson(1.0, (200, 50)).astype(np.float32))
    outliers = find_outliers(CellDataset(counts, np.zeros(200, dtype=int), CPU), 1, 0)
    assert not outliers.rate.any() and outliers.sizes.shape == (profiles.N_GROUPS, profiles.N_SIZES)


def test_replacing_by_hand():
    """Expected counts: 20 and .2 in type 0, .2 and 20 in type 1, 10 and 10 in a cell without a type; the other gene fills the library.

    A count of 30 in the type that expects .2 is explained by the other type, one of 90 is not.
    """
    rest = np.array([0.979, 0.979, 0.98])
    share = np.column_stack([[0.02, 0.0002, 0.01], [0.0002, 0.02, 0.01], rest + 1e-4])
    sizes = np.array([[3.0, 3.0, 3.0], [40.0, 60.0, 90.0]])
    outliers = Outliers(share, np.full(3, 100.0), np.array([1, 1, 0]), np.array([1e-9, 1e-3]), sizes)
    counts = np.array([[30, 30, 940], [30, 90, 880], [90, 30, 880], [12, 90, 898], [9, 0, 991]], np.float32)
    replaced = outliers.replace(sp.csr_matrix(counts), np.array([0, 0, 1, -1, 0]))
    expected = [[30, 30, 940], [30, 1, 880], [1, 30, 880], [12, 10, 898], [9, 0, 991]]
    np.testing.assert_array_equal(replaced.toarray(), expected)


def test_new_cells_get_outliers_at_counted_molecules():
    counts = sp.csr_matrix(np.random.default_rng(2).poisson(2.0, (2000, 100)).astype(np.float32))
    group, rate, sizes = np.arange(100) % 2, np.array([0.01, 0.0]), np.array([[5.0, 10.4, 30.0], [7.0, 7.0, 7.0]])
    one, again, other = (counts.copy() for _ in range(3))
    for x, seed in ((one, 0), (again, 0), (other, 1)):
        profiles.add_outliers(x, group, rate, sizes, torch.Generator().manual_seed(seed))
    np.testing.assert_array_equal(one.data, again.data)
    assert (one.data != other.data).any() and (one.indices == counts.indices).all()
    added, of_group = one.data - counts.data, group[counts.indices]
    assert not added[of_group == 1].any() and {0, 5, 10, 30} <= set(np.unique(added))
    assert added.sum() / counts.data[of_group == 0].sum() == pytest.approx(0.01 * 45 / 3, rel=0.1)  # 10.4 is rounded
    assert counts.data[added > 0].mean() > counts.data.mean() + 0.5  # the more molecules, the more outliers
    empty = sp.csr_matrix((3, 100), dtype=np.float32)
    profiles.add_outliers(empty, group, rate, sizes, torch.Generator())
    assert empty.nnz == 0
