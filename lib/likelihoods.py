"""Log-likelihoods of counts, in nats.

`mu` is the mean, `theta` the inverse dispersion: variance = mu + mu^2 / theta. Both are passed as logarithms. Of the terms
of the negative binomial only one is not zero where the count is zero, so only that one is computed for all genes; the
others, with their special functions, are computed at the non-zero counts alone (5-10 % of the entries), in float64: in
float32 the difference lgamma(x + theta) - lgamma(theta) loses 0.9 nats per entry at theta = 1e6.
"""

import numpy as np
import scipy.sparse as sp
import torch
import torch.nn.functional as F
from scipy.special import gammaln

from lib.batches import Batch, CellDataset

PROFILE_VARIATION = np.array([0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000])  # squared, of a gene over types


def nb_log_prob(batch: Batch, log_mu: torch.Tensor, log_theta: torch.Tensor) -> torch.Tensor:
    """log NB(x; mu, theta) per cell, summed over genes.

    With d = log mu - log theta, the logarithm of one entry is -theta softplus(d) where x = 0; where x > 0 it gains
    lgamma(x + theta) - lgamma(theta) - lgamma(x + 1) + x (d - softplus(d)).

    Parameters
    ----------
    batch
        Counts x.
    log_mu
        (n_cells, n_genes).
    log_theta
        (n_genes,) or (n_cells, n_genes).

    Returns
    -------
    (n_cells,) float64 as far as float32 inputs allow.
    """
    d = log_mu - log_theta
    at_zero = (-F.softplus(d) * log_theta.exp()).sum(dim=1)
    gained = _gain_where_positive(batch, d, log_theta)
    return at_zero.double().index_add(0, batch.cells, gained)


def zinb_log_prob(batch: Batch, log_mu: torch.Tensor, log_theta: torch.Tensor, zi_logits: torch.Tensor) -> torch.Tensor:
    """log ZINB(x; mu, theta, pi) per cell, summed over genes; pi = sigmoid(zi_logits) is the share of extra zeros.

    x = 0: log(pi + (1 - pi) NB(0)); x > 0: log(1 - pi) + log NB(x). Shapes as in `nb_log_prob`; zi_logits as log_mu.
    """
    d = log_mu - log_theta
    nb_zero = -F.softplus(d) * log_theta.exp()
    zero_or_dropped = torch.logaddexp(zi_logits, nb_zero)
    at_zero = (zero_or_dropped - F.softplus(zi_logits)).sum(dim=1)
    entries = (batch.cells, batch.genes)
    gained = _gain_where_positive(batch, d, log_theta) + (nb_zero[entries] - zero_or_dropped[entries]).double()
    return at_zero.double().index_add(0, batch.cells, gained)


def _gain_where_positive(batch: Batch, d: torch.Tensor, log_theta: torch.Tensor) -> torch.Tensor:
    """(n_entries,) float64: log NB(x) - log NB(0) at the non-zero counts."""
    x = batch.counts.double()
    # index_select, not [...]: its gradient is summed in one order, so on a CPU the same seed gives the same model
    at_gene = log_theta.index_select(0, batch.genes) if log_theta.dim() == 1 else log_theta[batch.cells, batch.genes]
    theta = at_gene.double().exp()
    d = d[batch.cells, batch.genes].double()
    return torch.lgamma(x + theta) - torch.lgamma(theta) - torch.lgamma(x + 1) + x * (d - F.softplus(d))


def gaussian_kl(q_mean: torch.Tensor, q_log_var: torch.Tensor, p_mean: torch.Tensor, p_log_var: torch.Tensor) -> torch.Tensor:
    """KL(q || p) of two Gaussians with diagonal covariance, summed over the last dimension, in nats."""
    variance_ratio = (q_log_var - p_log_var).exp()
    shift = (q_mean - p_mean).square() * (-p_log_var).exp()
    return 0.5 * (p_log_var - q_log_var + variance_ratio + shift - 1).sum(dim=-1)


def gaussian_log_prob(x: torch.Tensor, mean: torch.Tensor, log_var: torch.Tensor) -> torch.Tensor:
    """log N(x; mean, exp(log_var)), elementwise."""
    return -0.5 * ((x - mean).square() * (-log_var).exp() + log_var + float(np.log(2 * np.pi)))


def type_profiles(counts: sp.csr_matrix, cell_type_idx: np.ndarray, n_cell_types: int) -> np.ndarray:
    """Mean expression of each type as a fraction of its counts, by empirical Bayes.

    A gene's rate in a type is gamma-distributed about its rate m in all cells with squared coefficient of variation c, and
    its summed count x among the type's L counts is Poisson, so its rate is (x + 1/c) / (L + 1/(c m)) given c. What c can be is
    learned from all genes of like expression (an EM over a grid), so a marker keeps its rate even in a type of ten cells,
    while a gene seen there by chance is drawn to m.

    Returns
    -------
    Cell types x genes, rows sum to 1, no zeros.
    """
    labelled = cell_type_idx >= 0
    indicator = sp.csr_matrix(
        (np.ones(labelled.sum()), (cell_type_idx[labelled], np.flatnonzero(labelled))), shape=(n_cell_types, counts.shape[0])
    )
    x = (indicator @ counts.astype(np.float64)).toarray()
    total = x.sum(axis=1, keepdims=True)
    m = x.sum(axis=0) + 0.5  # half a count: no gene is impossible
    m /= m.sum()
    shapes = 1 / PROFILE_VARIATION  # 1/c
    log_evidence = np.stack([_gamma_poisson(x, total * m, shape).sum(axis=0) for shape in shapes])
    evidence = np.exp(log_evidence - log_evidence.max(axis=0))
    weights = np.empty_like(evidence)
    by_expression = np.array_split(np.argsort(m, kind="stable"), min(10, max(1, len(m) // 100)))
    for genes in by_expression:
        prior = np.full(len(shapes), 1 / len(shapes))
        for _ in range(100):
            posterior = prior[:, None] * evidence[:, genes]
            posterior /= posterior.sum(axis=0)
            prior = posterior.mean(axis=1)
        weights[:, genes] = posterior
    profiles = sum(weight * (x + shape) / (total + shape / m) for weight, shape in zip(weights, shapes))
    return profiles / profiles.sum(axis=1, keepdims=True)


def _gamma_poisson(x: np.ndarray, mean: np.ndarray, shape: float) -> np.ndarray:
    """log probability of counts whose Poisson rate is gamma-distributed about `mean`."""
    log_rising = gammaln(x + shape) - gammaln(shape) - gammaln(x + 1)
    return log_rising + shape * np.log(shape / (shape + mean)) + x * np.log(np.maximum(mean, 1e-300) / (shape + mean))


def log_theta_by_moments(counts: sp.csr_matrix, cell_type_idx: np.ndarray, profiles: np.ndarray) -> np.ndarray:
    """log theta of every gene, from the variance that is left within the types.

    1 / theta = sum((x - mu)^2 - mu) / sum(mu^2) over cells, mu = library size x profile of the cell's type. Genes with few
    counts say little of their own, so each estimate is averaged with the estimate over all genes, which counts as much as
    ten expected coincidences (sum of mu^2).

    Returns
    -------
    (n_genes,), within [log 0.01, log 10,000].
    """
    labelled = np.flatnonzero(cell_type_idx >= 0)
    counts, cell_type_idx = counts[labelled].astype(np.float64), cell_type_idx[labelled]
    library_size = np.asarray(counts.sum(axis=1)).ravel()
    n_cell_types = len(profiles)
    sum_l = np.bincount(cell_type_idx, library_size, n_cell_types)
    sum_l2 = np.bincount(cell_type_idx, library_size**2, n_cell_types)
    sum_mu, sum_mu2 = sum_l @ profiles, sum_l2 @ profiles**2
    # sum (x - mu)^2 = sum x^2 - 2 sum x mu + sum mu^2, the first two over the non-zero counts only
    weighted = sp.csr_matrix((library_size, (cell_type_idx, np.arange(len(labelled)))), shape=(n_cell_types, len(labelled))) @ counts
    sum_x_mu = np.asarray(weighted.multiply(profiles).sum(axis=0)).ravel()
    sum_x2 = np.asarray(counts.multiply(counts).sum(axis=0)).ravel()
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
    profiles = type_profiles(train.counts, train.cell_type_idx, n_cell_types)
    log_theta = torch.from_numpy(log_theta_by_moments(train.counts, train.cell_type_idx, profiles)).float().to(train.device)
    log_profiles = torch.from_numpy(np.log(profiles)).float().to(train.device)
    per_batch = [
        nb_log_prob(batch, log_profiles[batch.cell_type_idx] + batch.library_size.log()[:, None], log_theta)
        for batch in test.in_order(batch_size)
    ]
    return torch.cat(per_batch).cpu().numpy()
