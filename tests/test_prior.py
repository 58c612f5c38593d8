"""The fitted latent distribution of each type: its moments, its shape, its rare types."""

import numpy as np
import pytest
import scipy.stats
import torch

from lib.prior import best_bandwidth, fit_prior, sample_prior


def draws(prior, k: int, n: int = 20_000) -> np.ndarray:
    return sample_prior(prior, torch.full((n,), k), torch.Generator().manual_seed(0)).numpy()


@pytest.fixture(scope="module")
def fitted():
    """One type is a correlated Gaussian, one lies in two far groups, one has six cells, one none."""
    rng = np.random.default_rng(0)
    gaussian = rng.multivariate_normal([1, -1, 0], [[1, 0.8, 0], [0.8, 1, 0], [0, 0, 0.2]], 900)
    groups = rng.normal(0, 0.3, (900, 3)) + np.where(rng.random(900) < 0.5, 3.0, -3.0)[:, None] * [1, 0, 0]
    rare = rng.normal(5, 0.5, (6, 3))
    points = np.concatenate([gaussian, groups, rare])
    return points, fit_prior(points, np.repeat([0, 1, 2], [900, 900, 6]), 4, rng)


def test_mean_and_covariance_are_those_of_the_cells(fitted):
    points, prior = fitted
    for k, rows in ((0, slice(900)), (1, slice(900, 1800))):
        made = draws(prior, k)
        np.testing.assert_allclose(made.mean(axis=0), points[rows].mean(axis=0), atol=0.06)
        np.testing.assert_allclose(np.cov(made.T), np.cov(points[rows].T), rtol=0.06, atol=0.05)  # the last one through its quantiles


def test_library_sizes_keep_their_distribution_and_their_bond_with_z():
    rng = np.random.default_rng(2)
    z = rng.normal(size=(1000, 2))
    library = np.exp(0.8 * (0.9 * z[:, 0] + np.sqrt(1 - 0.81) * rng.normal(size=1000)))  # skewed, and tied to z
    prior = fit_prior(np.column_stack([z, library]), np.zeros(1000, dtype=int), 1, rng)
    made = draws(prior, 0, 5000)
    assert scipy.stats.ks_2samp(made[:, -1], library).statistic < 0.05
    assert made[:, -1].min() >= library.min() - 1e-6 and made[:, -1].max() <= library.max() + 1e-5
    tied = [scipy.stats.spearmanr(x, y).statistic for x, y in ((made[:, 0], made[:, -1]), (z[:, 0], library))]
    assert tied[0] == pytest.approx(tied[1], abs=0.15)


def test_the_bandwidth_follows_the_shape(fitted):
    _, prior = fitted
    assert prior["bandwidth"][0] >= 0.7 and prior["bandwidth"][1] <= 0.4
    assert np.mean(np.abs(draws(prior, 1)[:, 0]) < 1) < 0.02  # nothing between the two groups, where a Gaussian has a quarter


def test_a_rare_type_stays_in_its_place_and_a_type_without_cells_in_the_middle(fitted):
    points, prior = fitted
    rare, absent = draws(prior, 2), draws(prior, 3)
    np.testing.assert_allclose(rare.mean(axis=0), points[1800:].mean(axis=0), atol=0.1)
    assert np.linalg.matrix_rank(np.cov(rare.T)) == 3
    np.testing.assert_allclose(absent.mean(axis=0), points.mean(axis=0), atol=0.1)


def test_leaving_one_out_prefers_a_gaussian_for_a_gaussian():
    rng = np.random.default_rng(1)
    assert best_bandwidth(rng.normal(size=(400, 10))) >= 0.8
    assert best_bandwidth(np.zeros((2, 4))) == 1.0
