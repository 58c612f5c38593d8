"""What can be said of each cell type without latent variables: mean expression, dispersion, and how likely other cells are then."""

from typing import NamedTuple

import numpy as np
import scipy.sparse as sp
import torch
from scipy.special import gammaln

from lib.data.batches import CellDataset
from lib.models.likelihoods import nb_log_prob

PROFILE_VARIATION = np.array(
    [0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000]
)  # squared, of a gene over types


class GeneMarginals(NamedTuple):
    """What single genes do in each type."""

    profiles: np.ndarray  # (n_cell_types, n_genes) mean fractions of the counts, rows sum to 1, no zeros
    log_theta: np.ndarray  # (n_genes,) log inverse dispersion within the types


def gene_marginals(dataset: CellDataset, n_cell_types: int) -> GeneMarginals:
    """Mean and dispersion of every gene in the labelled cells of a data set."""
    profiles = type_profiles(dataset, n_cell_types)
    return GeneMarginals(profiles, log_theta_by_moments(dataset, profiles))


def type_profiles(dataset: CellDataset, n_cell_types: int) -> np.ndarray:
    """Mean expression of each type as a fraction of its counts, by empirical Bayes.

    A gene's fraction in all cells, times what the type has more of it (`shrunken_ratio`). Counts that vary more than Poisson
    counts do say less: they and what is expected are divided by variance over mean, lest one odd cell make a marker.

    Returns
    -------
    Cell types x genes, rows sum to 1, no zeros.
    """
    x = counts_per_type(dataset, n_cell_types)
    m = x.sum(axis=0) + 0.5  # half a count: no gene is impossible
    m /= m.sum()
    expected = x.sum(axis=1, keepdims=True) * m
    theta = np.exp(log_theta_by_moments(dataset, (x + m) / (x + m).sum(axis=1, keepdims=True)))
    n_cells = np.maximum(np.bincount(dataset.cell_type_idx[dataset.cell_type_idx >= 0], minlength=n_cell_types), 1)
    overdispersion = 1 + expected / n_cells[:, None] / theta
    profiles = m * shrunken_ratio(x / overdispersion, expected / overdispersion)
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
    return sp.csr_matrix(
        (weight[cells].astype(np.float64), (cell_type_idx[cells], cells)), shape=(n_cell_types, len(cell_type_idx))
    )


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
    marginals = gene_marginals(train, n_cell_types)
    log_theta = torch.from_numpy(marginals.log_theta).float().to(train.device)
    log_profiles = torch.from_numpy(np.log(marginals.profiles)).float().to(train.device)
    per_batch = [
        nb_log_prob(batch, log_profiles[batch.cell_type_idx], batch.library_size.log(), log_theta)
        for batch in test.in_order(batch_size)
    ]
    return torch.cat(per_batch).cpu().numpy()


def log_fold_changes(expression: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """log2((expression + 0.1) / (weighted mean of the other types + 0.1)), types x genes.

    Parameters
    ----------
    expression
        Types x genes: mean counts per 10,000.
    weights
        Of each type, such as its number of cells; None: equal.
    """
    weights = np.ones(len(expression)) if weights is None else np.asarray(weights, dtype=np.float64)
    of_others = (1 - np.eye(len(expression))) * weights
    others = of_others @ expression / of_others.sum(axis=1, keepdims=True)
    return np.log2((expression + 0.1) / (others + 0.1))


def top_genes(fold_changes: np.ndarray, n: int) -> np.ndarray:
    """Places of each type's n genes of largest fold change, largest first, types x n; of equal ones the first."""
    return np.argsort(-fold_changes, axis=1, kind="stable")[:, :n]
