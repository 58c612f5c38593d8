"""Log-likelihoods of counts, in nats.

`mu` is the mean, `theta` the inverse dispersion: variance = mu + mu^2 / theta. Both are passed as logarithms. Of the terms
of the negative binomial only one is not zero where the count is zero, so only that one is computed for all genes; the
others, with their special functions, are computed at the non-zero counts alone (5-10 % of the entries), in float64: in
float32 the difference lgamma(x + theta) - lgamma(theta) loses 0.9 nats per entry at theta = 1e6.

The gradients are written out, not recorded: the dense part then reads and writes each entry a few times only, some cells
at a time, while they are in the processor's cache.
"""

from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp
import torch
import torch.nn.functional as F

from lib.data.batches import Batch

CACHED_ENTRIES = 2**18  # of a dense matrix worked on at a time on a CPU: 1 MB, about what a core's cache holds


def nb_log_prob(batch: Batch, logits: torch.Tensor, log_library: torch.Tensor, log_theta: torch.Tensor) -> torch.Tensor:
    """log NB(x; mu, theta) per cell, summed over genes; mu = library x softmax(logits).

    With r = mu / theta, the logarithm of one entry is -theta log(1 + r) where x = 0; where x > 0 it gains
    lgamma(x + theta) - lgamma(theta) - lgamma(x + 1) + x log(r / (1 + r)).

    Parameters
    ----------
    batch
        Counts x.
    logits
        (n_cells, n_genes).
    log_library
        (n_cells,) log of the sum of mu over genes.
    log_theta
        (n_genes,) or (n_cells, n_genes).

    Returns
    -------
    (n_cells,) float64 as far as float32 inputs allow.
    """
    return _LogProb.apply(logits, log_library, log_theta, None, batch, torch.is_grad_enabled())


def zinb_log_prob(
    batch: Batch, logits: torch.Tensor, log_library: torch.Tensor, log_theta: torch.Tensor, zi_logits: torch.Tensor
) -> torch.Tensor:
    """log ZINB(x; mu, theta, pi) per cell, summed over genes; pi = sigmoid(zi_logits) is the share of extra zeros.

    x = 0: log(pi + (1 - pi) NB(0)); x > 0: log(1 - pi) + log NB(x). Shapes as in `nb_log_prob`; zi_logits as logits.
    """
    return _LogProb.apply(logits, log_library, log_theta, zi_logits, batch, torch.is_grad_enabled())


class _LogProb(torch.autograd.Function):
    """Both of the above; NB where `zi_logits` is None.

    Dense part, every entry as if its count were zero: nb_zero = -theta log(1 + r), and for ZINB
    log(exp(zi) + exp(nb_zero)) - softplus(zi). Sparse part: what the non-zero entries gain over that.
    """

    @staticmethod
    def forward(ctx, logits, log_library, log_theta, zi_logits, batch, with_gradient):
        theta, library = log_theta.exp(), log_library.exp()
        ratio = torch.empty_like(logits)
        log_prob = -batch.log_factorials
        for rows in _cached(logits):
            r = torch.sub(logits[rows], logits[rows].amax(dim=1, keepdim=True), out=ratio[rows]).exp_()
            r.mul_((library[rows] / r.sum(dim=1))[:, None]).div_(_rows(theta, rows))
            nb_zero = r.log1p().mul_(_rows(theta, rows)).neg_()
            if zi_logits is not None:
                nb_zero = torch.logaddexp(zi_logits[rows], nb_zero).sub_(F.softplus(zi_logits[rows]))
            log_prob[rows] += nb_zero.sum(dim=1)

        entries = batch.cells * logits.shape[1] + batch.genes
        at_theta = batch.genes if log_theta.dim() == 1 else entries
        r_x, theta_x = ratio.view(-1)[entries], theta.reshape(-1)[at_theta]
        # lgamma(1 + theta) - lgamma(theta) = log theta, so counts of 1, which most are, need no special function
        s_x = r_x.double() / (1 + r_x)
        gain = batch.counts * s_x.log() + theta_x.log()
        several = _several(batch)
        x, theta_several = batch.counts[several].double(), theta_x[several].double()
        gain[several] += torch.lgamma(x + theta_several) - torch.lgamma(1 + theta_several)
        dropped = None
        if zi_logits is not None:
            over = zi_logits.reshape(-1)[entries] + theta_x * r_x.log1p()  # zi - nb_zero
            gain -= F.softplus(over)  # = log(exp(zi) + exp(nb_zero)) - nb_zero
            dropped = torch.sigmoid(over)
        if with_gradient:
            ctx.save_for_backward(theta, library, ratio, zi_logits, dropped, entries, at_theta, s_x, theta_x)
            ctx.batch, ctx.several = batch, several
        return log_prob.index_add_(0, batch.cells, gain)

    @staticmethod
    def backward(ctx, upstream):
        """d / d log mu and d / d log theta first; d / d logits = d / d log mu - softmax(logits) x its sum over genes.

        With s = r / (1 + r): d nb_zero / d log mu = -theta s, d nb_zero / d log theta = theta (s - log(1 + r)).
        """
        theta, library, ratio, zi_logits, dropped, entries, at_theta, s_x, theta_x = ctx.saved_tensors
        cells, counts = ctx.batch.cells, ctx.batch.counts.to(ratio.dtype)
        g = upstream.to(ratio.dtype)
        g_x, s_x, several = g[cells], s_x.to(ratio.dtype), ctx.several
        of_mu_x = counts * (1 - s_x)
        of_lgamma = torch.ones_like(theta_x)  # theta (digamma(1 + theta) - digamma(theta)) = 1
        x, theta_several = counts[several].double(), theta_x[several].double()
        of_lgamma[several] = (theta_several * (torch.digamma(x + theta_several) - torch.digamma(theta_several))).to(
            ratio.dtype
        )
        of_theta_x = of_lgamma - of_mu_x
        if zi_logits is not None:  # at these entries nothing was dropped: give back what the dense part takes
            of_mu_x = of_mu_x - dropped * theta_x * s_x
            of_theta_x = of_theta_x + dropped * theta_x * (s_x + (-s_x).log1p())  # log(1 + r) = -log(1 - s)
        of_library = torch.zeros_like(g).index_add_(0, cells, g_x * of_mu_x)

        of_logits, of_zi = torch.empty_like(ratio), None if zi_logits is None else torch.empty_like(ratio)
        of_theta = torch.zeros_like(theta)
        for rows in _cached(ratio):
            r, theta_r, g_r = ratio[rows], _rows(theta, rows), g[rows, None]
            s, log1p_r = torch.div(r, r + 1, out=of_logits[rows]), r.log1p()
            weight = g_r
            if zi_logits is not None:
                is_dropped = torch.sigmoid(torch.addcmul(zi_logits[rows], log1p_r, theta_r))
                torch.mul(g_r, torch.sigmoid(zi_logits[rows]).sub_(is_dropped).neg_(), out=of_zi[rows])
                weight = is_dropped.sub_(1).mul_(-g_r)
            if theta.dim() == 2:
                of_theta[rows] = weight * theta_r * (s - log1p_r)
            elif zi_logits is None:
                of_theta += g[rows] @ s - g[rows] @ log1p_r
            else:
                of_theta += (weight * log1p_r.sub_(s)).sum(dim=0).neg_()
            s.mul_(weight).mul_(theta_r).neg_()  # d / d log mu
            of_library[rows] += s.sum(dim=1)
            s.addcmul_(r * theta_r, (of_library[rows] / library[rows])[:, None], value=-1)
        if theta.dim() == 1:
            of_theta *= theta
        if zi_logits is not None:
            of_zi.view(-1)[entries] -= g_x * dropped
        of_logits.view(-1)[entries] += g_x * of_mu_x
        of_theta.view(-1).index_add_(0, at_theta, g_x * of_theta_x)
        return of_logits, of_library, of_theta, of_zi, None, None


def _cached(dense: torch.Tensor):
    """Slices of rows to work on at a time: on a GPU all of them."""
    size = max(1, CACHED_ENTRIES // dense.shape[1]) if dense.device.type == "cpu" else max(1, len(dense))
    return [slice(start, start + size) for start in range(0, len(dense), size)]


def _rows(parameter: torch.Tensor, rows: slice) -> torch.Tensor:
    """A parameter of these cells: the same for all, or a row a cell."""
    return parameter if parameter.dim() == 1 else parameter[rows]


def _several(batch: Batch) -> torch.Tensor | slice:
    """The entries above 1; on a GPU all entries, since counting them would make the processor wait."""
    return (batch.counts > 1).nonzero()[:, 0] if batch.counts.device.type == "cpu" else slice(None)


def gaussian_kl(
    q_mean: torch.Tensor, q_log_var: torch.Tensor, p_mean: torch.Tensor, p_log_var: torch.Tensor
) -> torch.Tensor:
    """KL(q || p) of two Gaussians with diagonal covariance, summed over the last dimension, in nats."""
    variance_ratio = (q_log_var - p_log_var).exp()
    shift = (q_mean - p_mean).square() * (-p_log_var).exp()
    return 0.5 * (p_log_var - q_log_var + variance_ratio + shift - 1).sum(dim=-1)


def gaussian_log_prob(x: torch.Tensor, mean: torch.Tensor, log_var: torch.Tensor) -> torch.Tensor:
    """log N(x; mean, exp(log_var)), elementwise."""
    return -0.5 * ((x - mean).square() * (-log_var).exp() + log_var + float(np.log(2 * np.pi)))


@dataclass
class Likelihood:
    """Parameters of p(x|z) for some cells."""

    logits: torch.Tensor  # (n_cells, n_genes): mu = library x softmax(logits)
    log_library: torch.Tensor  # (n_cells,)
    log_theta: torch.Tensor  # (n_genes,), or (n_cells, n_genes) with a dispersion head
    zi_logits: torch.Tensor | None  # (n_cells, n_genes), None for NB

    def log_prob(self, batch: Batch) -> torch.Tensor:
        """log p(x|z) per cell, summed over genes, in nats."""
        if self.zi_logits is None:
            return nb_log_prob(batch, self.logits, self.log_library, self.log_theta)
        return zinb_log_prob(batch, self.logits, self.log_library, self.log_theta, self.zi_logits)

    def sample(self, generator: torch.Generator) -> sp.csr_matrix:
        """Counts, n_cells x n_genes. Which genes are seen at all is drawn for every gene; how often, for those seen alone."""
        theta = self.log_theta.exp()
        ratio = F.softmax(self.logits, dim=1).mul_(self.log_library.exp()[:, None]).div_(theta)  # mu / theta
        seen = torch.expm1(ratio.log1p().mul_(-theta)).neg_()  # P(x > 0)
        if self.zi_logits is not None:
            seen *= torch.sigmoid(-self.zi_logits)
        u = torch.rand(seen.shape, generator=generator, device=seen.device)
        cells, genes = (u < seen).nonzero(as_tuple=True)
        quantile = (u[cells, genes].double() + 2**-25) / seen[cells, genes]  # given that x > 0, uniform again
        theta = (theta[genes] if theta.dim() == 1 else theta[cells, genes]).double()
        counts = sample_positive_nb(ratio[cells, genes].double(), theta, quantile.clamp(max=1.0), generator)
        indptr = F.pad(cells.bincount(minlength=len(seen)).cumsum(0), (1, 0)).cpu().numpy()
        return sp.csr_matrix((counts.float().cpu().numpy(), genes.int().cpu().numpy(), indptr), shape=tuple(seen.shape))


def sample_positive_nb(
    ratio: torch.Tensor, theta: torch.Tensor, quantile: torch.Tensor, generator: torch.Generator
) -> torch.Tensor:
    """One count > 0 of each negative binomial, given that it is not 0.

    Where zeros are the minority, x is a Poisson draw whose rate is a gamma draw, repeated until it is not 0. Elsewhere the
    distribution function is inverted: x = 1, 2, ... until P(X > x) <= quantile x P(X > 0).

    Parameters
    ----------
    ratio, theta
        mu / theta, and theta: float64, one an entry.
    quantile
        Uniform in (0, 1].
    """
    counts = torch.ones_like(ratio)
    log_zero = -theta * ratio.log1p()
    is_rare = log_zero > -0.7  # P(x = 0) > 1/2
    left = (~is_rare).nonzero()[:, 0]
    while len(left):
        rate = torch._standard_gamma(theta[left], generator=generator) * ratio[left]
        counts[left] = torch.poisson(rate, generator=generator)
        left = left[counts[left] == 0]

    left = is_rare.nonzero()[:, 0]
    theta, q, probability = theta[left], ratio[left] / (1 + ratio[left]), log_zero[left].exp()
    tail, x = -torch.expm1(log_zero[left]), 0  # P(X > x)
    threshold = quantile[left] * tail
    while len(left):
        probability *= q * (theta + x) / (x + 1)  # P(X = x + 1)
        tail, x = tail - probability, x + 1
        counts[left] = x
        more = threshold < tail
        left, theta, q, probability, tail, threshold = (v[more] for v in (left, theta, q, probability, tail, threshold))
    return counts
