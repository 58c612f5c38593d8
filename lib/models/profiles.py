"""Each cell type without latent variables: mean expression, dispersion, marker genes, and the likelihood of cells given these alone."""

from typing import NamedTuple

import numpy as np
import scipy.sparse as sp
import torch
from scipy.special import gammaln

from lib.data.batches import CellDataset
from lib.models.likelihoods import nb_log_prob

# squared coefficients of variation of a gene's expression over the types: the grid of the prior
PROFILE_VARIATION = np.array([0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000])
PRIOR_SUM_MU2 = 10  # weight of the dispersion of all genes in that of one gene, as a sum of mu^2 over cells
PSEUDO_EXPRESSION = 0.1  # counts per 10,000, added to both sides of a fold change


class GeneMarginals(NamedTuple):
    """Mean and dispersion of each gene on its own, without correlations between genes."""

    profiles: np.ndarray  # (n_cell_types, n_genes) mean fraction of the counts; rows sum to 1, no zeros
    log_theta: np.ndarray  # (n_genes,) log of the inverse dispersion within the types


def gene_marginals(dataset: CellDataset, n_cell_types: int) -> GeneMarginals:
    """Estimate mean and dispersion of every gene from the labelled cells of a data set."""
    profiles = type_profiles(dataset, n_cell_types)
    return GeneMarginals(profiles, log_theta_by_moments(dataset, profiles))


def type_profiles(dataset: CellDataset, n_cell_types: int) -> np.ndarray:
    """Estimate the mean expression of each type, as fractions of its counts, by empirical Bayes.

    The profile is the gene's fraction in all cells times the shrunken ratio of the type to all cells (`shrunken_ratio`).
    Observed and expected counts are divided by the ratio of variance to mean: this down-weights overdispersed counts, so that
    one outlier cannot create a marker.

    Returns
    -------
    Cell types x genes, rows sum to 1, no zeros.
    """
    x = counts_per_type(dataset, n_cell_types)
    m = x.sum(axis=0) + 0.5  # half a count, so that no gene has probability 0
    m /= m.sum()
    expected = x.sum(axis=1, keepdims=True) * m
    theta = np.exp(log_theta_by_moments(dataset, (x + m) / (x + m).sum(axis=1, keepdims=True)))
    n_cells = np.maximum(np.bincount(dataset.cell_type_idx[dataset.cell_type_idx >= 0], minlength=n_cell_types), 1)
    overdispersion = 1 + expected / n_cells[:, None] / theta
    profiles = m * shrunken_ratio(x / overdispersion, expected / overdispersion)
    return profiles / profiles.sum(axis=1, keepdims=True)


def shrunken_ratio(x: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """Ratio of observed to expected counts, shrunk towards 1 by empirical Bayes. All arrays: cell types x genes.

    Model: ratio ~ Gamma(mean 1, squared coefficient of variation c), x ~ Poisson(ratio x expected). Given c, the posterior mean
    of the ratio is (x + 1/c) / (expected + 1/c). The prior of c is learned by EM over a grid from all genes of similar
    expression. A marker keeps its ratio even in a type of ten cells; a gene counted there by chance is shrunk to 1.
    """
    return posterior_ratio(x, expected)[0]


def posterior_ratio(x: np.ndarray, expected: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Posterior mean and variance of the ratios of `shrunken_ratio`."""
    shapes = 1 / PROFILE_VARIATION  # 1/c
    log_evidence = np.stack([gamma_poisson_log_prob(x, expected, shape).sum(axis=0) for shape in shapes])
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
    mean, square = np.zeros_like(expected), np.zeros_like(expected)
    for weight, shape in zip(weights, shapes):
        mean += weight * (x + shape) / (expected + shape)
        square += weight * (x + shape) * (x + shape + 1) / (expected + shape) ** 2
    return mean, square - mean**2


def type_means(x: np.ndarray, cell_type_idx: np.ndarray, n_cell_types: int) -> np.ndarray:
    """Mean of the rows of each type; a type without rows gets the mean of all rows.

    Parameters
    ----------
    x
        Cells x columns.
    cell_type_idx
        (n_cells,) type of each row.

    Returns
    -------
    Cell types x columns.
    """
    members = [cell_type_idx == k for k in range(n_cell_types)]
    return np.stack([x[rows].mean(axis=0) if rows.any() else x.mean(axis=0) for rows in members])


def log_fold_changes(expression: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """log2((expression + 0.1) / (mean expression of the other types + 0.1)) of each type and gene.

    Parameters
    ----------
    expression
        Types x genes: mean expression in counts per 10,000.
    weights
        (n_types,) weight of each type in the mean over the other types, such as its number of cells; None for equal weights.

    Returns
    -------
    Types x genes. Where the other types have no weight, their mean is 0.
    """
    weights = np.ones(len(expression)) if weights is None else np.asarray(weights, dtype=np.float64)
    of_others = (1 - np.eye(len(expression))) * weights  # a product keeps zeros exact, and ties in order
    others = of_others @ expression / np.maximum(of_others.sum(axis=1, keepdims=True), 1e-12)
    return np.log2((expression + PSEUDO_EXPRESSION) / (others + PSEUDO_EXPRESSION))


def top_genes(fold_changes: np.ndarray, n: int) -> np.ndarray:
    """Indices of the n genes of largest fold change of each type, largest first; ties in the order of the genes: types x n."""
    return np.argsort(-fold_changes, axis=1, kind="stable")[:, :n]


def counts_per_type(dataset: CellDataset, n_cell_types: int) -> np.ndarray:
    """Sum the counts of each gene over the cells of each type: cell types x genes. Cells of unknown type are left out."""
    x = np.zeros((n_cell_types, dataset.n_genes))
    for counts, cell_type_idx in dataset.blocks():
        x += (_per_type(np.ones(len(cell_type_idx)), cell_type_idx, n_cell_types) @ counts).toarray()
    return x


def _per_type(weight: np.ndarray, cell_type_idx: np.ndarray, n_cell_types: int) -> sp.csr_matrix:
    """Matrix, cell types x cells, with the weight of each labelled cell in the row of its type; times counts, weighted sums per type."""
    cells = np.flatnonzero(cell_type_idx >= 0)
    return sp.csr_matrix(
        (weight[cells].astype(np.float64), (cell_type_idx[cells], cells)), shape=(n_cell_types, len(cell_type_idx))
    )


def gamma_poisson_log_prob(x: np.ndarray, mean: np.ndarray, shape: np.ndarray | float) -> np.ndarray:
    """log p(x) for x ~ Poisson(rate), rate ~ Gamma(shape, mean `mean`): NB(mean, theta = shape). All arrays of one shape."""
    log_rising = gammaln(x + shape) - gammaln(shape) - gammaln(x + 1)
    return log_rising + shape * np.log(shape / (shape + mean)) + x * np.log(np.maximum(mean, 1e-300) / (shape + mean))


def log_theta_by_moments(dataset: CellDataset, profiles: np.ndarray) -> np.ndarray:
    """Estimate log theta of every gene by the method of moments, from the variance within the types.

    1 / theta = sum((x - mu)^2 - mu) / sum(mu^2) over cells, with mu = library size x profile of the cell's type. Genes with few
    counts are uninformative, so each estimate is averaged with the estimate over all genes: the weights are the gene's sum of
    mu^2 and `PRIOR_SUM_MU2`.

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
    inverse = (excess + PRIOR_SUM_MU2 * overall) / (sum_mu2 + PRIOR_SUM_MU2)
    return -np.log(np.clip(inverse, 1e-4, 1e2))


@torch.no_grad()
def nb_per_type_log_likelihood(marginals: GeneMarginals, test: CellDataset, batch_size: int = 256) -> np.ndarray:
    """log p(x|y,l) of each test cell, in nats, under a model without latent variables: x ~ NB(mu = l x profile(y), theta).

    The baseline of the GMVAE, with the profiles and theta that the GMVAE's training starts from (`gene_marginals` of train cells).

    Returns
    -------
    (n_test_cells,), summed over genes.
    """
    log_theta = torch.from_numpy(marginals.log_theta).float().to(test.device)
    log_profiles = torch.from_numpy(np.log(marginals.profiles)).float().to(test.device)
    per_batch = [
        nb_log_prob(batch, log_profiles[batch.cell_type_idx], batch.library_size.log(), log_theta)
        for batch in test.in_order(batch_size)
    ]
    return torch.cat(per_batch).cpu().numpy()
