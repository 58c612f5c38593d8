"""Likelihoods against scipy, closed forms and limits; gradients against finite differences."""

import numpy as np
import pytest
import scipy.sparse as sp
import scipy.stats
import torch

from lib.data.batches import CellDataset
from lib.models.likelihoods import gaussian_kl, gaussian_log_prob, nb_log_prob, standard_normal_kl, zinb_log_prob

CPU = torch.device("cpu")


def batch_of(counts: np.ndarray):
    dataset = CellDataset(sp.csr_matrix(counts.astype(np.float32)), np.zeros(len(counts)), CPU)
    return dataset.in_memory_cells.batch(np.arange(len(counts)))


def mean(mu) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and log library sizes that give these means."""
    log_mu = torch.as_tensor(mu).float().log()
    return log_mu, log_mu.logsumexp(dim=1)


def nb_reference(counts, mu, theta):
    return scipy.stats.nbinom.logpmf(counts, theta, theta / (theta + mu)).sum(axis=1)


@pytest.fixture
def cells():
    rng = np.random.default_rng(1)
    mu = rng.lognormal(0, 2, (20, 50))
    counts = rng.poisson(mu) * (rng.random(mu.shape) < 0.5)
    counts[0, :3] = (0, 1, 5000)
    return counts, mu


@pytest.mark.parametrize("theta", [1e-2, 0.3, 1.0, 10.0, 1e3, 1e4, 1e6])
def test_nb_equals_scipy_over_the_whole_range_of_theta(cells, theta):
    counts, mu = cells
    ours = nb_log_prob(batch_of(counts), *mean(mu), torch.full((50,), np.log(theta), dtype=torch.float32))
    # the error of float32 inputs alone: theta and mu are precise to 1e-7, and the log-likelihood depends on them
    np.testing.assert_allclose(ours, nb_reference(counts, mu, theta), rtol=2e-6, atol=2e-3)


def test_nb_per_entry_error_is_small_at_large_theta():
    x, mu, theta = 3.0, 2.5, 1e6
    ours = nb_log_prob(batch_of(np.array([[x]])), *mean([[mu]]), torch.tensor([theta]).log())
    assert abs(ours.item() - scipy.stats.nbinom.logpmf(x, theta, theta / (theta + mu))) < 1e-5


def test_nb_with_theta_per_cell_and_gene(cells):
    counts, mu = cells
    theta = np.random.default_rng(2).lognormal(0, 1, mu.shape)
    ours = nb_log_prob(batch_of(counts), *mean(mu), torch.tensor(theta).float().log())
    np.testing.assert_allclose(ours, nb_reference(counts, mu, theta), rtol=2e-6)


def test_nb_tends_to_poisson(cells):
    counts, mu = cells
    counts = np.minimum(counts, 50)
    mu = np.minimum(mu, 50)
    ours = nb_log_prob(batch_of(counts), *mean(mu), torch.full((50,), np.log(1e6), dtype=torch.float32))
    np.testing.assert_allclose(ours, scipy.stats.poisson.logpmf(counts, mu).sum(axis=1), rtol=1e-4)


def test_zinb_equals_the_mixture_formula(cells):
    counts, mu = cells
    rng = np.random.default_rng(3)
    logits, theta = rng.normal(0, 2, mu.shape), rng.lognormal(0, 1, 50)
    pi = 1 / (1 + np.exp(-logits))
    nb = scipy.stats.nbinom.pmf(counts, theta, theta / (theta + mu))
    log_nb = scipy.stats.nbinom.logpmf(counts, theta, theta / (theta + mu))
    expected = np.where(counts == 0, np.log(pi + (1 - pi) * nb), np.log1p(-pi) + log_nb).sum(axis=1)
    ours = zinb_log_prob(batch_of(counts), *mean(mu), torch.tensor(theta).float().log(), torch.tensor(logits).float())
    np.testing.assert_allclose(ours, expected, rtol=2e-6)


def test_zinb_without_inflation_is_nb(cells):
    counts, mu = cells
    arguments = batch_of(counts), *mean(mu), torch.zeros(50)
    np.testing.assert_allclose(
        zinb_log_prob(*arguments, torch.full(mu.shape, -40.0)), nb_log_prob(*arguments), rtol=1e-6
    )


@pytest.mark.parametrize("zero_inflated", [False, True])
def test_gradients_equal_finite_differences(zero_inflated):
    batch = batch_of(np.array([[0, 2, 7], [1, 0, 0]]))
    generator = torch.Generator().manual_seed(0)
    logits, zi_logits = (
        torch.randn((2, 3), generator=generator, dtype=torch.float64, requires_grad=True) for _ in range(2)
    )
    log_library = torch.randn(2, generator=generator, dtype=torch.float64, requires_grad=True)
    for shape in ((3,), (2, 3)):
        log_theta = torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)
        if zero_inflated:
            assert torch.autograd.gradcheck(
                lambda *p: zinb_log_prob(batch, *p), (logits, log_library, log_theta, zi_logits)
            )
        else:
            assert torch.autograd.gradcheck(lambda *p: nb_log_prob(batch, *p), (logits, log_library, log_theta))


def test_gaussian_kl_by_hand_and_by_torch():
    # q = N(1, 4), p = N(0, 1): log(1/2) + (4 + 1)/2 - 1/2
    one = gaussian_kl(torch.tensor([[1.0]]), torch.tensor([[4.0]]).log(), torch.zeros(1, 1), torch.zeros(1, 1))
    assert one.item() == pytest.approx(np.log(0.5) + 2.0, rel=1e-6)
    q_mean, q_log_var, p_mean, p_log_var = torch.randn((4, 5, 7), generator=torch.Generator().manual_seed(0))
    q, p = (torch.distributions.Normal(m, (v / 2).exp()) for m, v in ((q_mean, q_log_var), (p_mean, p_log_var)))
    expected = torch.distributions.kl_divergence(q, p).sum(dim=1)
    torch.testing.assert_close(gaussian_kl(q_mean, q_log_var, p_mean, p_log_var), expected)
    torch.testing.assert_close(gaussian_log_prob(q_mean, p_mean, p_log_var), p.log_prob(q_mean))
    expected = 0.5 * (q_mean**2 + q_log_var.exp() - q_log_var - 1).sum(dim=1)
    torch.testing.assert_close(standard_normal_kl(q_mean, q_log_var), expected)
