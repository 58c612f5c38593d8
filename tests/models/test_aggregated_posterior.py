"""The latent distribution of each type of new cells: its moments, its shape, its rare types."""

import numpy as np
import pytest
import scipy.stats
import torch

from lib.models.aggregated_posterior import PRIOR_CELLS, fit_prior, sample_prior, select_cells


def samples(prior, k: int, n: int = 20_000) -> np.ndarray:
    return sample_prior(prior, torch.full((n,), k), torch.Generator().manual_seed(0)).numpy()


@pytest.fixture(scope="module")
def fitted():
    """One type is a correlated Gaussian, one lies in two far groups, one has six cells, one none."""
    rng = np.random.default_rng(0)
    gaussian = rng.multivariate_normal([1, -1, 0], [[1, 0.8, 0], [0.8, 1, 0], [0, 0, 0.2]], 900)
    groups = rng.normal(0, 0.3, (900, 3)) + np.where(rng.random((900, 1)) < 0.5, [3.0, 0, 0], [0, -3.0, 0])
    rare = rng.normal(5, 0.5, (6, 3))
    points = np.concatenate([gaussian, groups, rare])
    types = np.repeat([0, 1, 2], [900, 900, 6])
    order = rng.permutation(len(types))
    return points, fit_prior(points[order], types[order], 4)


def test_large_types_keep_some_of_their_cells_and_others_all(monkeypatch):
    monkeypatch.setattr("lib.models.aggregated_posterior.MAX_POINTS", 50)
    types = np.repeat([0, 1, -1, 3], [80, 20, 10, 60])
    chosen = select_cells(types, 4, np.random.default_rng(0))
    assert len(set(chosen)) == len(chosen) and np.bincount(types[chosen]).tolist() == [50, 20, 0, 50]


def test_mean_and_covariance_are_those_of_the_cells(fitted):
    points, prior = fitted
    for k, rows in ((0, slice(900)), (1, slice(900, 1800))):
        made = samples(prior, k)
        np.testing.assert_allclose(made.mean(axis=0), points[rows].mean(axis=0), atol=0.06)
        np.testing.assert_allclose(np.cov(made.T), np.cov(points[rows].T), rtol=0.06, atol=0.05)


def test_groups_of_cells_within_a_type_stay_apart(fitted):
    """The two groups differ in two dimensions at once: no cell has the first of one and the second of the other."""
    _, prior = fitted
    first, second, _ = samples(prior, 1).T
    assert np.mean((first > 2) & (second < -2)) < 0.01
    assert np.mean((first > 2) & (second > -1)) == pytest.approx(0.5, abs=0.05)
    assert np.mean(np.abs(first - 1.5) < 0.5) < 0.05  # hardly any between them


def test_library_sizes_keep_their_distribution_and_their_bond_with_z():
    rng = np.random.default_rng(2)
    z = rng.normal(size=(1000, 2))
    library = np.exp(0.8 * (0.9 * z[:, 0] + np.sqrt(1 - 0.81) * rng.normal(size=1000)))  # skewed, and tied to z
    prior = fit_prior(np.column_stack([z, library]), np.zeros(1000, dtype=int), 1)
    made = samples(prior, 0, 5000)
    assert scipy.stats.ks_2samp(made[:, -1], library).statistic < 0.05
    tied = [scipy.stats.spearmanr(x, y).statistic for x, y in ((made[:, 0], made[:, -1]), (z[:, 0], library))]
    assert tied[0] == pytest.approx(tied[1], abs=0.05)


def test_a_rare_type_borrows_deviations_and_stays_in_its_place(fitted):
    points, prior = fitted
    made, own = samples(prior, 2), points[1800:]
    np.testing.assert_allclose(made.mean(axis=0), own.mean(axis=0), atol=0.1)
    of_all = prior["deviations"].numpy()
    weight = PRIOR_CELLS / (6 + PRIOR_CELLS)
    expected = (1 - weight) * own.var(axis=0) + weight * (of_all**2).mean(axis=0)
    np.testing.assert_allclose(made.var(axis=0), expected, rtol=0.05)


def test_a_type_without_cells_lies_in_the_middle(fitted):
    points, prior = fitted
    np.testing.assert_allclose(samples(prior, 3).mean(axis=0), points.mean(axis=0), atol=0.1)
