"""Profiles, dispersions and fold changes of the cell types: by hand, and recovered from simulated counts."""

import numpy as np
import pytest
import scipy.sparse as sp
import torch

from lib.data.batches import CellDataset
from lib.models.profiles import (
    gene_marginals,
    log_fold_changes,
    log_theta_by_moments,
    nb_per_type_log_likelihood,
    top_genes,
    type_means,
    type_profiles,
)

CPU = torch.device("cpu")


def test_type_means_by_hand():
    """Type 0 has two cells, type 1 one, type 2 none: it gets the mean of all cells."""
    x = np.array([[1.0, 0.0], [6.0, 9.0], [2.0, 6.0]])
    np.testing.assert_allclose(type_means(x, np.array([0, 1, 0]), 3), [[1.5, 3], [6, 9], [3, 5]])


def test_log_fold_changes_by_hand():
    expression = np.array([[7.9, 0.1], [0.3, 0.1], [1.5, 0.5]])  # counts per 10,000
    # the other types' means are .9, 4.7, 4.1 (first gene) and .3, .3, .1 (second gene)
    expected = np.log2([[8 / 1, 0.2 / 0.4], [0.4 / 4.8, 0.2 / 0.4], [1.6 / 4.2, 0.6 / 0.2]])
    np.testing.assert_allclose(log_fold_changes(expression), expected)
    # one, three and no cells: the other types' means are .3, 7.9, 2.2 and .1, .1, .1
    expected = np.log2([[8 / 0.4, 0.2 / 0.2], [0.4 / 8, 0.2 / 0.2], [1.6 / 2.3, 0.6 / 0.2]])
    np.testing.assert_allclose(log_fold_changes(expression, weights=np.array([1, 3, 0])), expected, atol=1e-12)


@pytest.mark.filterwarnings("error")
def test_the_only_type_with_cells_is_compared_with_zero():
    np.testing.assert_allclose(log_fold_changes(np.array([[1.9, 0.3]])), np.log2([[20, 4]]))
    both = log_fold_changes(np.array([[1.9, 0.3], [0.7, 0.0]]), weights=np.array([5, 0]))
    np.testing.assert_allclose(both, np.log2([[20, 4], [0.8 / 2, 0.1 / 0.4]]), atol=1e-12)


def test_top_genes_are_those_of_largest_fold_change():
    fold_changes = np.array([[0.0, 2.0, 3.0, 2.0], [-1.0, -4.0, -2.0, -3.0]])
    assert top_genes(fold_changes, 2).tolist() == [[2, 1], [0, 2]]  # of equal genes the first
    assert top_genes(fold_changes, 9).shape == (2, 4)


def test_moments_recover_the_dispersion():
    rng = np.random.default_rng(0)
    theta = np.repeat([0.5, 2.0, 20.0], 100)  # many genes: the sum of the counts stays close to the library size
    profile = rng.dirichlet(np.full(300, 20.0), 2)
    types = rng.integers(0, 2, 4000)
    mu = 3000 * rng.lognormal(0, 0.3, 4000)[:, None] * profile[types]
    counts = sp.csr_matrix(rng.poisson(rng.gamma(theta, mu / theta)).astype(np.float32))
    estimate = np.exp(log_theta_by_moments(CellDataset(counts, types, CPU), profile)).reshape(3, 100)
    np.testing.assert_allclose(np.median(estimate, axis=1), [0.5, 2.0, 20.0], rtol=0.15)


def test_profiles_keep_markers_and_shrink_chance_differences():
    rng = np.random.default_rng(0)
    n_genes = 400
    truth = np.tile(rng.dirichlet(np.full(n_genes, 2.0)), (2, 1))
    truth[1, :4] *= 30  # markers of a type of ten cells
    truth /= truth.sum(axis=1, keepdims=True)
    types = np.repeat([0, 1], [500, 10])
    counts = rng.poisson(800 * truth[types]).astype(np.float32)
    profiles = type_profiles(CellDataset(sp.csr_matrix(counts), types, CPU), 2)
    naive = counts[types == 1].sum(axis=0) / counts[types == 1].sum()
    np.testing.assert_allclose(profiles.sum(axis=1), 1)
    assert (profiles > 0).all()
    np.testing.assert_allclose(profiles[1, :4], naive[:4], rtol=0.25)  # markers keep their rate
    error, naive_error = (np.abs(np.log((estimate + 1e-6) / truth[1]))[4:].mean() for estimate in (profiles[1], naive))
    assert error < 0.75 * naive_error


def test_a_type_without_cells_has_the_profile_of_all_cells():
    profiles = type_profiles(
        CellDataset(sp.csr_matrix(np.array([[8.0, 2, 0], [6, 4, 0], [0, 0, 10]])), np.array([0, 0, -1]), CPU), 2
    )
    assert (profiles > 0).all()
    np.testing.assert_allclose(profiles[1], (np.array([14, 6, 0]) + 0.5) / 21.5, rtol=1e-6)


def test_nb_baseline_prefers_the_true_type():
    rng = np.random.default_rng(0)
    profile = np.array([[0.7, 0.2, 0.1], [0.1, 0.2, 0.7]])
    types = np.repeat([0, 1], 100)
    counts = sp.csr_matrix(rng.poisson(200 * profile[types]).astype(np.float32))
    marginals = gene_marginals(CellDataset(counts, types, CPU), 2)
    right, wrong = (nb_per_type_log_likelihood(marginals, CellDataset(counts, y, CPU)) for y in (types, 1 - types))
    assert right.mean() > wrong.mean() + 10
