"""Log-likelihoods of counts, in nats.

`mu` is the mean, `theta` the inverse dispersion: variance = mu + mu^2 / theta. Both are passed as logarithms. Of the terms
of the negative binomial only one is not zero where the count is zero, so only that one is computed for all genes; the
others, with their special functions, are computed at the non-zero counts alone (5-10 % of the entries), in float64: in
float32 the difference lgamma(x + theta) - lgamma(theta) loses 0.9 nats per entry at theta = 1e6.

The gradients are written out, not recorded: the dense part then reads and writes each entry a few times only, some cells
at a time, while they are in the processor's cache.
"""

import numpy as np
import scipy.sparse as sp
import torch
import torch.nn.functional as F
from scipy.special import gammaln

from lib.batches import Batch, CellDataset

PROFILE_VARIATION = np.array([0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000])  # squared, of a gene over types
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
        of_lgamma[several] = (theta_several * (torch.digamma(x + theta_several) - torch.digamma(theta_several))).to(ratio.dtype)
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


def gaussian_kl(q_mean: torch.Tensor, q_log_var: torch.Tensor, p_mean: torch.Tensor, p_log_var: torch.Tensor) -> torch.Tensor:
    """KL(q || p) of two Gaussians with diagonal covariance, summed over the last dimension, in nats."""
    variance_ratio = (q_log_var - p_log_var).exp()
    shift = (q_mean - p_mean).square() * (-p_log_var).exp()
    return 0.5 * (p_log_var - q_log_var + variance_ratio + shift - 1).sum(dim=-1)


def gaussian_log_prob(x: torch.Tensor, mean: torch.Tensor, log_var: torch.Tensor) -> torch.Tensor:
    """log N(x; mean, exp(log_var)), elementwise."""
    return -0.5 * ((x - mean).square() * (-log_var).exp() + log_var + float(np.log(2 * np.pi)))


def type_profiles(dataset: CellDataset, n_cell_types: int) -> np.ndarray:
    """Mean expression of each type as a fraction of its counts, by empirical Bayes.

    A gene's fraction in all cells, times what the type has more of it (`shrunken_ratio`).

    Returns
    -------
    Cell types x genes, rows sum to 1, no zeros.
    """
    x = counts_per_type(dataset, n_cell_types)
    m = x.sum(axis=0) + 0.5  # half a count: no gene is impossible
    m /= m.sum()
    profiles = m * shrunken_ratio(x, x.sum(axis=1, keepdims=True) * m)
    return profiles / profiles.sum(axis=1, keepdims=True)


def shrunken_ratio(x: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """How much more of each gene was counted in each type than expected, by empirical Bayes. All: cell types x genes.

    The ratio is gamma-distributed about 1 with squared coefficient of variation c, the count x Poisson: the ratio's mean is
    (x + 1/c) / (expected + 1/c) given c. What c can be is learned from all genes of like expression (an EM over a grid), so a
    marker keeps its ratio even in a type of ten cells, while a gene seen there by chance is drawn to 1.
    """
    shapes = 1 / PROFILE_VARIATION  # 1/c
    log_evidence = np.stack([_gamma_poisson(x, expected, shape).sum(axis=0) for shape in shapes])
    evidence = np.exp(log_evidence - log_evidence.max(axis=0))
    weights = np.empty_like(evidence)
    by_expression = np.array_split(np.argsort(expected.sum(axis=0), kind="stable"), min(10, max(1, x.shape[1] // 100)))
    for genes in by_expression:
        prior = np.full(len(shapes), 1 / len(shapes))
        for _ in range(100):
            posterior = prior[:, None] * evidence[:, genes]
            posterior /= posterior.sum(axis=0)
            prior = posterior.mean(axis=1)
        weights[:, genes] = posterior
    return sum(weight * (x + shape) / (expected + shape) for weight, shape in zip(weights, shapes))


def counts_per_type(dataset: CellDataset, n_cell_types: int) -> np.ndarray:
    """Counts of each gene summed over the cells of each type: cell types x genes."""
    x = np.zeros((n_cell_types, dataset.n_genes))
    for counts, cell_type_idx in dataset.blocks():
        x += (_per_type(np.ones(len(cell_type_idx)), cell_type_idx, n_cell_types) @ counts).toarray()
    return x


def _per_type(weight: np.ndarray, cell_type_idx: np.ndarray, n_cell_types: int) -> sp.csr_matrix:
    """Cell types x cells: the weight of each labelled cell in its type's row; times counts, sums per type."""
    cells = np.flatnonzero(cell_type_idx >= 0)
    return sp.csr_matrix((weight[cells].astype(np.float64), (cell_type_idx[cells], cells)), shape=(n_cell_types, len(cell_type_idx)))


def _gamma_poisson(x: np.ndarray, mean: np.ndarray, shape: float) -> np.ndarray:
    """log probability of counts whose Poisson rate is gamma-distributed about `mean`."""
    log_rising = gammaln(x + shape) - gammaln(shape) - gammaln(x + 1)
    return log_rising + shape * np.log(shape / (shape + mean)) + x * np.log(np.maximum(mean, 1e-300) / (shape + mean))


def log_theta_by_moments(dataset: CellDataset, profiles: np.ndarray) -> np.ndarray:
    """log theta of every gene, from the variance that is left within the types.

    1 / theta = sum((x - mu)^2 - mu) / sum(mu^2) over cells, mu = library size x profile of the cell's type. Genes with few
    counts say little of their own, so each estimate is averaged with the estimate over all genes, which counts as much as
    ten expected coincidences (sum of mu^2).

    Returns
    -------
    (n_genes,), within [log 0.01, log 10,000].
    """
    n_cell_types, n_genes = profiles.shape
    sum_l, sum_l2 = np.zeros(n_cell_types), np.zeros(n_cell_types)
    sum_x_mu, sum_x2 = np.zeros(n_genes), np.zeros(n_genes)
    for counts, cell_type_idx in dataset.blocks():
        labelled = cell_type_idx >= 0
        library_size = np.asarray(counts.sum(axis=1), dtype=np.float64).ravel()
        sum_l += np.bincount(cell_type_idx[labelled], library_size[labelled], n_cell_types)
        sum_l2 += np.bincount(cell_type_idx[labelled], library_size[labelled] ** 2, n_cell_types)
        # sum (x - mu)^2 = sum x^2 - 2 sum x mu + sum mu^2, the first two over the non-zero counts only
        sum_x_mu += np.sum((_per_type(library_size, cell_type_idx, n_cell_types) @ counts).toarray() * profiles, axis=0)
        sum_x2 += labelled.astype(np.float64) @ counts.astype(np.float64).power(2)
    sum_mu, sum_mu2 = sum_l @ profiles, sum_l2 @ profiles**2
    excess = sum_x2 - 2 * sum_x_mu + sum_mu2 - sum_mu
    overall = max(excess.sum() / sum_mu2.sum(), 1e-4)
    inverse = (excess + 10 * overall) / (sum_mu2 + 10)
    return -np.log(np.clip(inverse, 1e-4, 1e2))


@torch.no_grad()
def nb_per_type_log_likelihood(train: CellDataset, test: CellDataset, batch_size: int = 256) -> np.ndarray:
    """log p(x | y, l) of each test cell, in nats, under a model without latent variables: x ~ NB(l x profile of type y, theta).

    The baseline of the GMVAE, with the same empirical-Bayes profiles and the same start of theta.
    """
    n_cell_types = int(max(train.cell_type_idx.max(), test.cell_type_idx.max())) + 1
    profiles = type_profiles(train, n_cell_types)
    log_theta = torch.from_numpy(log_theta_by_moments(train, profiles)).float().to(train.device)
    log_profiles = torch.from_numpy(np.log(profiles)).float().to(train.device)
    per_batch = [
        nb_log_prob(batch, log_profiles[batch.cell_type_idx], batch.library_size.log(), log_theta)
        for batch in test.in_order(batch_size)
    ]
    return torch.cat(per_batch).cpu().numpy()
