"""The negative binomial (NB) and its zero-inflated form (ZINB): log-likelihood and sampling of counts; Gaussian densities and KL. In nats.

`mu` is the mean, `theta` the inverse dispersion: variance = mu + mu^2 / theta. Both are passed as logarithms.

The log-likelihood is computed in two parts. The dense part, for all genes, is the log-likelihood of a zero count. The sparse part,
for the non-zero counts (5-10 % of the entries), adds the other terms and their special functions, in float64: in float32 the
difference lgamma(x + theta) - lgamma(theta) loses 0.9 nats per entry at theta = 1e6. The gradients are written by hand: the dense
part then reads and writes each entry only a few times, in blocks of cells that fit the processor's cache.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp
import torch
import torch.nn.functional as F
from torch import Tensor

from lib.data.batches import Batch, CellDataset

Gaussian = tuple[Tensor, Tensor]  # mean and log-variance, of one shape
CACHED_ENTRIES = 2**18  # entries of a dense matrix processed at a time on a CPU: 1 MB, about the size of a core's cache


class _LogProb(torch.autograd.Function):
    """Dense part, the log-likelihood of a zero count at every entry: nb_zero = -theta log(1 + r), and for ZINB
    log(exp(zi) + exp(nb_zero)) - softplus(zi). Sparse part (`gain`): the difference to it at the non-zero entries.
    """

    @staticmethod
    def forward(ctx, logits, log_library, log_theta, zi_logits, batch):
        theta, library = log_theta.exp(), None if log_library is None else log_library.exp()
        theta_of_cells, ratio = theta.expand_as(logits), torch.empty_like(logits)
        log_prob = -batch.log_factorials
        for rows in _row_blocks(logits):
            if library is None:
                r = torch.exp(logits[rows], out=ratio[rows])
            else:
                r = torch.sub(logits[rows], logits[rows].amax(dim=1, keepdim=True), out=ratio[rows]).exp_()
                r.mul_((library[rows] / r.sum(dim=1))[:, None])
            r.div_(theta_of_cells[rows])
            nb_zero = r.log1p().mul_(theta_of_cells[rows]).neg_()
            if zi_logits is not None:
                nb_zero = torch.logaddexp(zi_logits[rows], nb_zero).sub_(F.softplus(zi_logits[rows]))
            log_prob[rows] += nb_zero.sum(dim=1)

        entries = batch.cells * logits.shape[1] + batch.genes
        at_theta = batch.genes if log_theta.dim() == 1 else entries
        r_x, theta_x = ratio.view(-1)[entries], theta.reshape(-1)[at_theta]
        # lgamma(1 + theta) - lgamma(theta) = log theta, so counts of 1, the majority, need no special function
        s_x = r_x.double() / (1 + r_x)
        gain = batch.counts * s_x.log() + theta_x.log()
        # on a GPU all entries, because counting those above 1 would make the CPU wait
        above_one = (batch.counts > 1).nonzero()[:, 0] if batch.counts.device.type == "cpu" else slice(None)
        x, theta_above = batch.counts[above_one].double(), theta_x[above_one].double()
        gain[above_one] += torch.lgamma(x + theta_above) - torch.lgamma(1 + theta_above)
        p_extra_x = None
        if zi_logits is not None:
            over = zi_logits.reshape(-1)[entries] + theta_x * r_x.log1p()  # zi - nb_zero
            gain -= F.softplus(over)  # = log(exp(zi) + exp(nb_zero)) - nb_zero
            p_extra_x = torch.sigmoid(over)
        ctx.save_for_backward(theta, library, ratio, zi_logits, p_extra_x, entries, at_theta, s_x, theta_x)
        ctx.batch, ctx.above_one = batch, above_one
        return log_prob.index_add_(0, batch.cells, gain)

    @staticmethod
    def backward(ctx, upstream):
        """With s = r / (1 + r): d nb_zero / d log mu = -theta s, d nb_zero / d log theta = theta (s - log(1 + r)).

        With a library, d / d logits = d / d log mu - softmax(logits) x its sum over genes.
        """
        theta, library, ratio, zi_logits, p_extra_x, entries, at_theta, s_x, theta_x = ctx.saved_tensors
        cells, counts = ctx.batch.cells, ctx.batch.counts.to(ratio.dtype)
        g = upstream.to(ratio.dtype)
        g_x, s_x, above_one = g[cells], s_x.to(ratio.dtype), ctx.above_one
        grad_mu_x = counts * (1 - s_x)
        grad_lgamma = torch.ones_like(theta_x)  # theta (digamma(1 + theta) - digamma(theta)) = 1
        x, theta_above = counts[above_one].double(), theta_x[above_one].double()
        digammas = torch.digamma(x + theta_above) - torch.digamma(theta_above)
        grad_lgamma[above_one] = (theta_above * digammas).to(ratio.dtype)
        grad_theta_x = grad_lgamma - grad_mu_x
        if zi_logits is not None:  # a non-zero count is no extra zero: cancel the gradient of the dense part here
            grad_mu_x = grad_mu_x - p_extra_x * theta_x * s_x
            log1p_r_x = ratio.view(-1)[entries].log1p()
            grad_theta_x = grad_theta_x + p_extra_x * theta_x * (s_x - log1p_r_x)
        grad_library = None if library is None else torch.zeros_like(g).index_add_(0, cells, g_x * grad_mu_x)

        grad_logits, grad_zi = torch.empty_like(ratio), None if zi_logits is None else torch.empty_like(ratio)
        grad_theta = torch.zeros_like(theta)
        for rows in _row_blocks(ratio):
            r, theta_r, g_r = ratio[rows], theta.expand_as(ratio)[rows], g[rows, None]
            s, log1p_r = torch.div(r, r + 1, out=grad_logits[rows]), r.log1p()
            weight = g_r
            if grad_zi is not None:
                # posterior probability that a zero is an extra zero
                p_extra = torch.sigmoid(torch.addcmul(zi_logits[rows], log1p_r, theta_r))
                torch.mul(g_r, torch.sigmoid(zi_logits[rows]).sub_(p_extra).neg_(), out=grad_zi[rows])
                weight = p_extra.sub_(1).mul_(-g_r)
            if theta.dim() == 2:
                grad_theta[rows] = weight * theta_r * (s - log1p_r)
            elif zi_logits is None:
                grad_theta += g[rows] @ s - g[rows] @ log1p_r
            else:
                grad_theta += (weight * log1p_r.sub_(s)).sum(dim=0).neg_()
            s.mul_(weight).mul_(theta_r).neg_()  # d / d log mu
            if grad_library is not None:
                grad_library[rows] += s.sum(dim=1)
                # softmax(logits) = mu / library = r theta / library
                s.addcmul_(r * theta_r, (grad_library[rows] / library[rows])[:, None], value=-1)
        if theta.dim() == 1:
            grad_theta *= theta
        if grad_zi is not None:
            grad_zi.view(-1)[entries] -= g_x * p_extra_x
        grad_logits.view(-1)[entries] += g_x * grad_mu_x
        grad_theta.view(-1).index_add_(0, at_theta, g_x * grad_theta_x)
        return grad_logits, grad_library, grad_theta, grad_zi, None


def _row_blocks(dense: Tensor) -> list[slice]:
    """Slices of rows to process at a time: blocks that fit the cache on a CPU, all rows on a GPU."""
    size = max(1, CACHED_ENTRIES // dense.shape[1]) if dense.device.type == "cpu" else max(1, len(dense))
    return [slice(start, start + size) for start in range(0, len(dense), size)]


def gaussian_kl(q: Gaussian, p: Gaussian) -> Tensor:
    """KL(q || p) of two Gaussians with diagonal covariance, summed over the last dimension, in nats."""
    variance_ratio = (q[1] - p[1]).exp()
    shift = (q[0] - p[0]).square() * (-p[1]).exp()
    return 0.5 * (p[1] - q[1] + variance_ratio + shift - 1).sum(dim=-1)


def standard_normal_kl(mean: Tensor, log_var: Tensor) -> Tensor:
    """KL(q || Normal(0, 1)) of a Gaussian with diagonal covariance, summed over the last dimension, in nats."""
    return gaussian_kl((mean, log_var), (torch.zeros_like(mean), torch.zeros_like(mean)))


def gaussian_log_prob(x: Tensor, mean: Tensor, log_var: Tensor) -> Tensor:
    """log N(x; mean, exp(log_var)), elementwise."""
    return -0.5 * ((x - mean).square() * (-log_var).exp() + log_var + float(np.log(2 * np.pi)))


def importance_sample(q: Gaussian, p: Gaussian, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """z ~ q and log p(z) / q(z), summed over the last dimension."""
    z = q[0] + (0.5 * q[1]).exp() * torch.randn(q[0].shape, generator=generator, device=q[0].device)
    return z, (gaussian_log_prob(z, *p) - gaussian_log_prob(z, *q)).sum(dim=1)


@dataclass
class Likelihood:
    """p(x|z,y,l), or p(x|z) of a model without library sizes, of some cells."""

    logits: Tensor  # (n_cells, n_genes), mu = library x softmax(logits), or exp(logits) without a library
    log_library: Tensor | None  # (n_cells,) log of the sum of mu over genes; None: no library
    log_theta: Tensor  # (n_genes,), or (n_cells, n_genes) where theta depends on the cell
    zi_logits: Tensor | None  # (n_cells, n_genes), sigmoid: probability of an extra zero; None for NB

    def log_prob(self, batch: Batch) -> Tensor:
        """log p(x|...) per cell, summed over genes: (n_cells,) in nats, float64. With r = mu / theta, log NB of one entry is

            -theta log(1 + r) + [lgamma(x + theta) - lgamma(theta) - lgamma(x + 1) + x log(r / (1 + r))],

        where the bracket is 0 for x = 0. ZINB, with probability pi of an extra zero: log(pi + (1 - pi) NB(0)) for x = 0, else
        log(1 - pi) + log NB(x).
        """
        return _LogProb.apply(self.logits, self.log_library, self.log_theta, self.zi_logits, batch)

    def sample(self, generator: torch.Generator) -> sp.csr_matrix:
        """Sample counts, n_cells x n_genes."""
        return sample_counts([self], generator)

    def above_zero(self, generator: torch.Generator) -> tuple[Tensor, ...]:
        """Sample which entries are above 0, where a uniform number u is below P(x > 0): cell, gene, mu / theta, theta of each, and
        u / P(x > 0), which is uniform in (0, 1). P(x > 0) is at most mu, so it is computed only where u < mu.
        """
        u = _uniform(self.logits.shape, generator)
        candidates = []
        for rows in _row_blocks(self.logits):
            if self.log_library is None:
                mu = self.logits[rows].exp()
            else:
                mu = F.softmax(self.logits[rows], dim=1).mul_(self.log_library[rows].exp()[:, None])
            places = (u[rows] < mu).view(-1).nonzero()[:, 0]
            candidates.append((places + rows.start * u.shape[1], mu.view(-1)[places]))
        places, mu = (torch.cat(parts) for parts in zip(*candidates))
        cells, genes = places // u.shape[1], places % u.shape[1]
        theta = self.log_theta.reshape(-1)[genes if self.log_theta.dim() == 1 else places].double().exp()
        ratio = mu / theta
        p_above_zero = -torch.expm1(-theta * ratio.log1p())
        if self.zi_logits is not None:
            p_above_zero *= torch.sigmoid(-self.zi_logits.reshape(-1)[places].double())
        quantile = (u.view(-1)[places].double() + 2**-25) / p_above_zero
        kept = (quantile < 1).nonzero()[:, 0]
        return tuple(values[kept] for values in (cells, genes, ratio, theta, quantile))


def sample_counts(likelihoods: Iterable[Likelihood], generator: torch.Generator) -> sp.csr_matrix:
    """Sample counts of the cells of several likelihoods, n_cells x n_genes.

    First, for every gene, whether its count is above 0; then, for the genes of all likelihoods together, the count.
    """
    entries, n_cells, n_genes = [], 0, 0
    for likelihood in likelihoods:
        cells, *others = likelihood.above_zero(generator)
        entries.append([cells + n_cells, *others])
        n_cells, n_genes = n_cells + len(likelihood.logits), likelihood.logits.shape[1]
    cells, genes, ratio, theta, quantile = (torch.cat(parts) for parts in zip(*entries))
    counts = sample_positive_nb(ratio, theta, quantile, generator)
    indptr = F.pad(cells.bincount(minlength=n_cells).cumsum(0), (1, 0)).cpu().numpy()
    return sp.csr_matrix((counts.float().cpu().numpy(), genes.int().cpu().numpy(), indptr), shape=(n_cells, n_genes))


def _uniform(shape: torch.Size, generator: torch.Generator) -> Tensor:
    """Uniform numbers in [0, 1), float32; on a CPU by numpy's SFC64, which takes half the time of torch's generator."""
    if generator.device.type != "cpu":
        return torch.rand(shape, generator=generator, device=generator.device)
    seed = int(torch.randint(2**62, (1,), generator=generator))
    return torch.from_numpy(np.random.Generator(np.random.SFC64(seed)).random(tuple(shape), np.float32))


def sample_positive_nb(ratio: Tensor, theta: Tensor, quantile: Tensor, generator: torch.Generator) -> Tensor:
    """Sample one count from each negative binomial, conditional on a count above 0. ratio: mu / theta; quantile: uniform in (0, 1]; all
    tensors (n_entries,), float64.

    Where zeros are the minority: rate ~ Gamma, x ~ Poisson(rate), repeated until x > 0. Elsewhere the distribution function
    is inverted: the smallest x = 1, 2, ... with P(X > x) <= quantile x P(X > 0).
    """
    counts = torch.ones_like(ratio)
    log_zero = -theta * ratio.log1p()
    is_rare = log_zero > -0.7  # P(x = 0) > 1/2
    left = (~is_rare).nonzero()[:, 0]
    while len(left):
        rate = torch._standard_gamma(theta[left], generator=generator) * ratio[left]
        counts[left] = torch.poisson(rate, generator=generator)
        left = left[counts[left] == 0]

    q, tail, x = ratio / (1 + ratio), -torch.expm1(log_zero), 1
    threshold = quantile * tail
    probability = q * theta * log_zero.exp()  # P(X = x)
    tail = tail - probability  # P(X > x)
    left = (is_rare & (threshold < tail)).nonzero()[:, 0]  # most counts are 1
    theta, q, probability, tail, threshold = (v[left] for v in (theta, q, probability, tail, threshold))
    while len(left):
        probability = probability * q * (theta + x) / (x + 1)
        tail, x = tail - probability, x + 1
        counts[left] = x
        more = (threshold < tail).nonzero()[:, 0]
        left, theta, q, probability, tail, threshold = (v[more] for v in (left, theta, q, probability, tail, threshold))
    return counts


Densities = tuple[Gaussian, Gaussian, Callable[[Tensor], Likelihood]]  # q(z|x,y), p(z|y), and p(x|z,...) of a z


@torch.no_grad()
def importance_weighted(
    dataset: CellDataset, densities: Callable[[Batch], Densities], n_samples: int, seed: int
) -> np.ndarray:
    """log p(x|y) of every cell of known type, in nats, (n_cells,): the integral of p(x|z,y) p(z|y) over z.

    The importance-weighted bound (Burda et al. 2016, eq. 8), which rises to the likelihood with n_samples:

    log 1/S sum_s p(x|z_s,y) p(z_s|y) / q(z_s|x,y), z_s ~ q(z|x,y).
    """
    generator = torch.Generator(dataset.device).manual_seed(seed)
    parts = []
    for batch in dataset.in_order(128):
        batch = batch.select(batch.cell_type_idx >= 0)
        q, p, p_x = densities(batch)
        log_weights = []
        for _ in range(n_samples):
            z, log_ratio = importance_sample(q, p, generator)
            log_weights.append(p_x(z).log_prob(batch) + log_ratio)
        parts.append(torch.logsumexp(torch.stack(log_weights), dim=0) - math.log(n_samples))
    return torch.cat(parts).cpu().numpy()
