"""Likelihoods against scipy, closed forms and limits; gradients against finite differences; sampled counts against their distribution."""

import numpy as np
import pytest
import scipy.sparse as sp
import scipy.stats
import torch
from helpers import CPU

from lib.data.batches import CellDataset
from lib.models.likelihoods import (
    Likelihood,
    gaussian_kl,
    gaussian_log_prob,
    importance_sample,
    sample_counts,
    sample_positive_nb,
    standard_normal_kl,
)


def batch_of(counts: np.ndarray):
    dataset = CellDataset(sp.csr_matrix(counts.astype(np.float32)), np.zeros(len(counts)), CPU)
    return dataset.in_memory_cells.batch(np.arange(len(counts)))


def log_prob(counts, mu, theta, zi_logits=None) -> torch.Tensor:
    """Of counts, cells x genes, by their means, of which the logits and the library sizes are computed."""
    log_mu, log_theta = (torch.as_tensor(value).float().log() for value in (mu, theta))
    zi_logits = None if zi_logits is None else torch.as_tensor(zi_logits).float()
    return Likelihood(log_mu, log_mu.logsumexp(dim=1), log_theta, zi_logits).log_prob(batch_of(counts))


def nb(mu, theta):
    return scipy.stats.nbinom(theta, theta / (theta + mu))


@pytest.fixture
def cells():
    rng = np.random.default_rng(1)
    mu = rng.lognormal(0, 2, (20, 50))
    counts = rng.poisson(mu) * (rng.random(mu.shape) < 0.5)
    counts[0, :3] = (0, 1, 5000)
    return counts, mu


@pytest.mark.parametrize("theta", [1e-2, 0.3, 1.0, 10.0, 1e3, 1e4, 1e6, "of each cell and gene"])
def test_nb_equals_scipy_over_the_whole_range_of_theta(cells, theta):
    counts, mu = cells
    theta = np.random.default_rng(2).lognormal(0, 1, mu.shape) if isinstance(theta, str) else np.full(50, theta)
    ours = log_prob(counts, mu, theta)
    # the error of float32 inputs alone: theta and mu are precise to 1e-7, and the log-likelihood depends on them
    np.testing.assert_allclose(ours, nb(mu, theta).logpmf(counts).sum(axis=1), rtol=2e-6, atol=2e-3)


def test_nb_per_entry_error_is_small_at_large_theta():
    x, mu, theta = np.array([[3.0]]), np.array([[2.5]]), np.array([1e6])
    assert log_prob(x, mu, theta).item() == pytest.approx(nb(mu, theta).logpmf(x).item(), abs=1e-5)


def test_zinb_equals_the_mixture_formula_and_without_inflation_the_nb(cells):
    counts, mu = cells
    rng = np.random.default_rng(3)
    logits, theta = rng.normal(0, 2, mu.shape), rng.lognormal(0, 1, 50)
    pi = 1 / (1 + np.exp(-logits))
    zero = np.log(pi + (1 - pi) * nb(mu, theta).pmf(counts))
    expected = np.where(counts == 0, zero, np.log1p(-pi) + nb(mu, theta).logpmf(counts)).sum(axis=1)
    np.testing.assert_allclose(log_prob(counts, mu, theta, logits), expected, rtol=2e-6)
    without = log_prob(counts, mu, theta, np.full(mu.shape, -40.0))
    np.testing.assert_allclose(without, log_prob(counts, mu, theta), rtol=1e-6)


@pytest.mark.parametrize("zero_inflated", [False, True])
@pytest.mark.parametrize("theta_shape", [(3,), (2, 3)])
def test_gradients_equal_finite_differences(zero_inflated, theta_shape):
    batch, generator = batch_of(np.array([[0, 2, 7], [1, 0, 0]])), torch.Generator().manual_seed(0)
    shapes = [(2, 3), (2,), theta_shape, (2, 3)]  # logits, log library, log theta, logits of extra zeros
    inputs = [torch.randn(s, generator=generator, dtype=torch.float64, requires_grad=True) for s in shapes]

    def log_likelihood(*parameters):
        return Likelihood(*parameters[:3], parameters[3] if zero_inflated else None).log_prob(batch)

    assert torch.autograd.gradcheck(log_likelihood, inputs[: 3 + zero_inflated])


def test_gaussians_are_those_of_torch():
    q_mean, q_log_var, p_mean, p_log_var = torch.randn((4, 5, 7), generator=torch.Generator().manual_seed(0))
    ours = (q_mean, q_log_var), (p_mean, p_log_var)
    q, p = (torch.distributions.Normal(m, (v / 2).exp()) for m, v in ours)
    kl, standard = (torch.distributions.kl_divergence(q, x) for x in (p, torch.distributions.Normal(0.0, 1.0)))
    torch.testing.assert_close(gaussian_kl(*ours), kl.sum(dim=1))
    torch.testing.assert_close(standard_normal_kl(*ours[0]), standard.sum(dim=1))
    torch.testing.assert_close(gaussian_log_prob(q_mean, *ours[1]), p.log_prob(q_mean))
    z, log_ratio = importance_sample(*ours, torch.Generator().manual_seed(1))
    torch.testing.assert_close(log_ratio, (p.log_prob(z) - q.log_prob(z)).sum(dim=1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("extra_zeros", [0.0, 0.3])
@pytest.mark.parametrize("of_cell", [False, True])
def test_sampled_counts_have_the_zeros_means_and_variances_of_the_distribution(extra_zeros, of_cell):
    """Two likelihoods, one after the other, with thetas and extra zeros of their own genes, or of each cell and gene."""
    n, shares, theta = 20_000, np.array([0.001, 0.02, 0.179, 0.8]), np.array([0.1, 5.0, 1.0, 1e4])
    logits, log_theta = (torch.tensor(value).float().log() for value in (shares, theta))
    zi_logits = torch.full((n, 4), np.log(extra_zeros / (1 - extra_zeros))) if extra_zeros else None
    log_theta, libraries = log_theta.expand(n, 4) if of_cell else log_theta, (2.0, 60.0)
    log_libraries = [torch.full((n,), np.log(library)) for library in libraries]
    likelihoods = [Likelihood(logits.expand(n, 4), log_l, log_theta, zi_logits) for log_l in log_libraries]
    x = sample_counts(likelihoods, torch.Generator().manual_seed(3)).toarray()
    for library, part in zip(libraries, (x[:n], x[n:])):
        mu = library * shares
        zeros = extra_zeros + (1 - extra_zeros) * nb(mu, theta).pmf(0)
        np.testing.assert_allclose((part == 0).mean(axis=0), zeros, atol=4 * 0.5 / np.sqrt(n))
        variance = (1 - extra_zeros) * (mu + mu**2 / theta + extra_zeros * mu**2)
        assert (np.abs(part.mean(axis=0) - (1 - extra_zeros) * mu) < 5 * np.sqrt(variance / n)).all()
        np.testing.assert_allclose(part.var(axis=0)[1:], variance[1:], rtol=0.1)


@pytest.mark.parametrize(
    "mu, theta", [(0.05, 0.02), (0.3, 5.0), (4.0, 0.1), (4.0, 30.0), (300.0, 2.0), (50.0, 0.02), (0.01, 1e6)]
)
def test_positive_counts_follow_the_truncated_distribution(mu, theta):
    """Both ways of sampling, against scipy's negative binomial without its zeros."""
    n, generator = 60_000, torch.Generator().manual_seed(1)
    ratio, shape = (torch.full((n,), value, dtype=torch.float64) for value in (mu / theta, theta))
    x = sample_positive_nb(ratio, shape, torch.rand(n, generator=generator, dtype=torch.float64), generator).numpy()
    sf, isf = nb(mu, theta).sf, nb(mu, theta).isf
    edges = np.unique([isf(sf(0) * tail) for tail in (0.99, 0.9, 0.75, 0.5, 0.25, 0.1, 0.02)])
    assert x.min() >= 1
    np.testing.assert_allclose((x[:, None] > edges).mean(axis=0), sf(edges) / sf(0), atol=4 * 0.5 / np.sqrt(n))
