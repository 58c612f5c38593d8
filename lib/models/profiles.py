"""Each cell type without latent variables: mean expression, dispersion, marker genes, outlier counts, and the likelihood of cells.

Outlier counts are single genes of single cells, counted tens of times more often than their mean expression explains: in pbmc3k
(10x's first chemistry) about one molecule in 500 has a count of 10 to 60, whatever its gene. A negative binomial explains them by a
small theta, which makes all other counts too variable; they also blur mean expression and axes. So they are replaced before training
(`find_outliers`), and new cells get back as many of the same sizes (`add_outliers`).
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch
from scipy.special import gammaln

from lib.data.batches import CellDataset
from lib.models.likelihoods import Likelihood

# squared coefficients of variation of a gene's expression over the types: the grid of the prior
PROFILE_VARIATION = np.array([0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000])
PRIOR_SUM_MU2 = 10  # weight of the dispersion of all genes in that of one gene, as a sum of mu^2 over cells
LOG_THETA_LIMITS = (np.log(0.01), np.log(1e4))
LOG_THETA_RATIO_SD = 0.5  # prior standard deviation of log theta of a type about that of the gene, also of the GMVAE
LIBRARY_BINS = 20  # of the cells of a type, whose library sizes are taken as those of the bin's mean
PSEUDO_EXPRESSION = 0.1  # counts per 10,000, added to both sides of a fold change

MAX_CELLS = 10_000  # random cells in which outliers are studied, at most
MIN_COUNT = 10  # smaller counts are never outliers: 5 to 9 may well be a gene that few cells switch on
PROBABILITY = 0.9  # of being an outlier, above which a count is replaced
# probability that a cell expresses a gene as another type does: doublets, wrong labels, precursors
AS_OTHER_TYPE = 0.005
N_ROUNDS = 5
N_GROUPS, MIN_PER_GROUP = 10, 20  # groups of genes at most; outliers of each at least
N_SIZES = 256  # quantiles kept of the sizes


class GeneMarginals(NamedTuple):
    """Mean and dispersion of each gene on its own, without correlations between genes."""

    profiles: np.ndarray  # (n_cell_types, n_genes) mean fraction of the counts; rows sum to 1, no zeros
    log_theta: np.ndarray  # (n_genes,), or (n_cell_types, n_genes): log of the inverse dispersion within the types


def gene_marginals(dataset: CellDataset, n_cell_types: int) -> GeneMarginals:
    """Mean of every gene and type, theta of every gene by moments, from the labelled cells: where training starts."""
    profiles = type_profiles(dataset, n_cell_types)
    return GeneMarginals(profiles, log_theta_by_moments(dataset, profiles))


def nb_baseline(dataset: CellDataset, n_cell_types: int) -> GeneMarginals:
    """One negative binomial per gene and type by penalised maximum likelihood, from the labelled cells: the baseline of the GMVAE."""
    profiles = type_profiles(dataset, n_cell_types)
    return GeneMarginals(profiles, log_theta_by_likelihood(dataset, profiles))


def type_profiles(dataset: CellDataset, n_cell_types: int) -> np.ndarray:
    """Mean expression of each type by empirical Bayes, as fractions of its counts: cell types x genes, rows sum to 1, no zeros.

    The profile is the gene's fraction in all cells times the shrunken ratio of the type to all cells (`posterior_ratio`). Observed
    and expected counts are divided by the ratio of variance to mean, so that one overdispersed count cannot create a marker.
    """
    x = counts_per_type(dataset, n_cell_types)
    m = x.sum(axis=0) + 0.5  # half a count, so that no gene has probability 0
    m /= m.sum()
    expected = x.sum(axis=1, keepdims=True) * m
    theta = np.exp(log_theta_by_moments(dataset, (x + m) / (x + m).sum(axis=1, keepdims=True)))
    n_cells = np.maximum(np.bincount(dataset.cell_type_idx[dataset.cell_type_idx >= 0], minlength=n_cell_types), 1)
    overdispersion = 1 + expected / n_cells[:, None] / theta
    profiles = m * posterior_ratio(x / overdispersion, expected / overdispersion)[0]
    return profiles / profiles.sum(axis=1, keepdims=True)


def posterior_ratio(x: np.ndarray, expected: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Posterior mean and variance of the ratio of true to expected counts, by empirical Bayes. All arrays: cell types x genes.

    Model: ratio ~ Gamma(mean 1, squared coefficient of variation c), x ~ Poisson(ratio x expected). The prior of c is learned from all
    genes of similar expression. A marker keeps its ratio even in a type of ten cells; a gene counted there by chance is shrunk to 1.
    """
    shapes = 1 / PROFILE_VARIATION  # 1/c
    log_evidence = np.stack([gamma_poisson_log_prob(x, expected, shape).sum(axis=0) for shape in shapes])
    evidence = np.exp(log_evidence - log_evidence.max(axis=0))
    weights = np.empty_like(evidence)
    by_expression = np.array_split(np.argsort(expected.sum(axis=0), kind="stable"), min(10, max(1, x.shape[1] // 100)))
    for genes in by_expression:
        weights[:, genes] = mixture_posterior(evidence[:, genes].T).T
    mean, square = np.zeros_like(expected), np.zeros_like(expected)
    for weight, shape in zip(weights, shapes):
        mean += weight * (x + shape) / (expected + shape)
        square += weight * (x + shape) * (x + shape + 1) / (expected + shape) ** 2
    return mean, square - mean**2


def mixture_posterior(density: np.ndarray) -> np.ndarray:
    """Probability of each component of a mixture whose weights are fitted by EM. density: items x components, as what is returned."""
    weights = np.full(density.shape[1], 1 / density.shape[1])
    for _ in range(100):
        posterior = weights * density
        posterior /= posterior.sum(axis=1, keepdims=True)
        weights = posterior.mean(axis=0)
    return posterior


def type_means(x: np.ndarray, cell_type_idx: np.ndarray, n_cell_types: int) -> np.ndarray:
    """Mean of the rows of each type, types x columns; a type without rows gets the mean of all. x: cells x columns."""
    members = [cell_type_idx == k for k in range(n_cell_types)]
    return np.stack([x[rows].mean(axis=0) if rows.any() else x.mean(axis=0) for rows in members])


def log_fold_changes(expression: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """log2((expression + 0.1) / (mean expression of the other types + 0.1)) of each type and gene: types x genes.

    expression: types x genes, in counts per 10,000; weights: (n_types,) of each type in the mean over the other types, such as its
    number of cells (None: equal). Where the other types have no weight, their mean is 0.
    """
    weights = np.ones(len(expression)) if weights is None else np.asarray(weights, dtype=np.float64)
    of_others = (1 - np.eye(len(expression))) * weights  # a product keeps zeros exact, and ties in order
    others = of_others @ expression / np.maximum(of_others.sum(axis=1, keepdims=True), 1e-12)
    return np.log2((expression + PSEUDO_EXPRESSION) / (others + PSEUDO_EXPRESSION))


def top_genes(fold_changes: np.ndarray, n: int) -> np.ndarray:
    """Indices of the n genes of largest fold change of each type, largest first; ties in the order of the genes: types x n."""
    return np.argsort(-fold_changes, axis=1, kind="stable")[:, :n]


def counts_per_type(dataset: CellDataset, n_cell_types: int, groups: np.ndarray | None = None) -> np.ndarray:
    """Sum the counts of each gene over the cells of each type, or group: types x genes. Cells of unknown type (-1) are left out."""
    groups = dataset.cell_type_idx if groups is None else groups
    x, start = np.zeros((n_cell_types, dataset.n_genes)), 0
    for counts, types in dataset.blocks():
        x += (_per_type(np.ones(len(types)), groups[start : start + len(types)], n_cell_types) @ counts).toarray()
        start += len(types)
    return x


def _per_type(weight: np.ndarray, cell_type_idx: np.ndarray, n_cell_types: int) -> sp.csr_matrix:
    """Cell types x cells: the weight of each labelled cell in the row of its type; times counts, weighted sums per type."""
    cells = np.flatnonzero(cell_type_idx >= 0)
    entries = weight[cells].astype(np.float64), (cell_type_idx[cells], cells)
    return sp.csr_matrix(entries, shape=(n_cell_types, len(cell_type_idx)))


def gamma_poisson_log_prob(x: np.ndarray, mean: np.ndarray, shape: np.ndarray | float) -> np.ndarray:
    """log p(x) for x ~ Poisson(rate), rate ~ Gamma(shape, mean `mean`): NB(mean, theta = shape). All arrays of one shape."""
    log_rising = gammaln(x + shape) - gammaln(shape) - gammaln(x + 1)
    return log_rising + shape * np.log(shape / (shape + mean)) + x * np.log(np.maximum(mean, 1e-300) / (shape + mean))


def log_theta_by_moments(dataset: CellDataset, profiles: np.ndarray) -> np.ndarray:
    """Log theta of every gene by the method of moments, from the variance within the types: (n_genes,).

    1 / theta = sum((x - mu)^2 - mu) / sum(mu^2) over cells, with mu = library size x profile of the cell's type, averaged with the same
    over all genes: the weights are the gene's sum of mu^2, which is small where counts are few, and `PRIOR_SUM_MU2`.
    """
    n_cell_types, n_genes = profiles.shape
    sum_l, sum_l2 = np.zeros(n_cell_types), np.zeros(n_cell_types)
    sum_x_mu, sum_x2 = np.zeros(n_genes), np.zeros(n_genes)
    for counts, cell_type_idx in dataset.blocks():
        library_size = np.asarray(counts.sum(axis=1), dtype=np.float64).ravel()
        by_type = _per_type(library_size, cell_type_idx, n_cell_types)
        sum_l += by_type @ np.ones(len(library_size))
        sum_l2 += by_type @ library_size
        # sum (x - mu)^2 = sum x^2 - 2 sum x mu + sum mu^2, the first two over the non-zero counts only
        sum_x_mu += np.sum((by_type @ counts).toarray() * profiles, axis=0)
        sum_x2 += (cell_type_idx >= 0).astype(np.float64) @ counts.astype(np.float64).power(2)
    sum_mu, sum_mu2 = sum_l @ profiles, sum_l2 @ profiles**2
    excess = sum_x2 - 2 * sum_x_mu + sum_mu2 - sum_mu
    overall = max(excess.sum() / sum_mu2.sum(), 1e-4)
    inverse = (excess + PRIOR_SUM_MU2 * overall) / (sum_mu2 + PRIOR_SUM_MU2)
    return -np.log(np.clip(inverse, 1e-4, 1e2))


def log_theta_by_likelihood(dataset: CellDataset, profiles: np.ndarray) -> np.ndarray:
    """Log theta of every gene and type by penalised maximum likelihood given mu = library size x profile: cell types x genes.

    First log theta of the gene in all types, by maximum likelihood; then that of each type, with the prior Normal(log theta of the gene,
    `LOG_THETA_RATIO_SD`^2), so that the ten cells of a rare type do not decide alone. The likelihood needs sums over cells only: how
    often each count occurs, and cells and counts in bins of similar library size.
    """
    (n_cell_types, n_genes), n_bins = profiles.shape, len(profiles) * LIBRARY_BINS
    cells = dataset.subset(np.flatnonzero(dataset.cell_type_idx >= 0))
    rank = pd.Series(cells.library_size).groupby(cells.cell_type_idx).rank(method="first", pct=True).to_numpy()
    bins = cells.cell_type_idx * LIBRARY_BINS + np.ceil(rank * LIBRARY_BINS).astype(int) - 1
    n_cells = np.bincount(bins, minlength=n_bins).reshape(n_cell_types, LIBRARY_BINS, 1)
    sum_l = np.bincount(bins, cells.library_size, n_bins).reshape(n_cells.shape)
    library_size = sum_l / np.maximum(n_cells, 1)
    totals = counts_per_type(cells, n_bins, bins).reshape(n_cell_types, LIBRARY_BINS, n_genes)
    # (cell types x genes) x counts: number of cells with this count
    n_with_count = sp.csr_matrix((profiles.size, 2**31 - 1))
    for counts, cell_type_idx in cells.blocks():
        row = np.repeat(cell_type_idx * n_genes, np.diff(counts.indptr)) + counts.indices
        n_with_count += sp.csr_matrix((np.ones(len(row)), (row, counts.data.astype(int))), n_with_count.shape)
    row, x = n_with_count.tocoo().coords
    n_above_zero = np.bincount(row, n_with_count.data, profiles.size).reshape(profiles.shape)

    def log_likelihood(log_theta: np.ndarray) -> np.ndarray:
        """Of each type and gene, without terms that do not depend on theta. log_theta: cell types x genes."""
        theta = np.exp(log_theta)
        log_rising = np.bincount(row, n_with_count.data * gammaln(x + theta.ravel()[row]), profiles.size)
        by_type = log_rising.reshape(profiles.shape) - n_above_zero * gammaln(theta)
        for k in range(n_cell_types):
            weight = theta[k] * n_cells[k] + totals[k]
            by_type[k] -= (weight * np.log1p(library_size[k] * (profiles[k] / theta[k]))).sum(axis=0)
        return by_type - totals.sum(axis=1) * log_theta

    of_gene = _maximise(lambda value: log_likelihood(np.tile(value, (n_cell_types, 1))).sum(axis=0), (n_genes,))
    penalty = 0.5 / LOG_THETA_RATIO_SD**2
    return _maximise(lambda value: log_likelihood(value) - penalty * (value - of_gene) ** 2, profiles.shape)


def _maximise(function: Callable[[np.ndarray], np.ndarray], shape: tuple[int, ...]) -> np.ndarray:
    """The log theta that maximises each element of a function with one maximum, to within 0.01: ever smaller steps."""
    low, high = LOG_THETA_LIMITS
    best, step = np.full(shape, (low + high) / 2), (high - low) / 4
    while step > 0.005:
        candidates = np.stack([best, best - step, best + step])
        highest = np.argmax([function(candidate) for candidate in candidates], axis=0)
        best, step = np.take_along_axis(candidates, highest[None], axis=0)[0], step / 2
    return best


@torch.no_grad()
def nb_per_type_log_likelihood(marginals: GeneMarginals, test: CellDataset) -> np.ndarray:
    """log p(x|y,l) of each test cell, in nats, summed over genes: x ~ NB(mu = l x profile(y), theta); (n_test_cells,)."""
    log_profiles = torch.from_numpy(np.log(marginals.profiles)).float().to(test.device)
    log_theta = torch.from_numpy(marginals.log_theta).float().to(test.device).expand_as(log_profiles)
    parts = []
    for batch in test.in_order(256):
        y = batch.cell_type_idx
        parts.append(Likelihood(log_profiles[y], batch.library_size.log(), log_theta[y], None).log_prob(batch))
    return torch.cat(parts).cpu().numpy()


class Outliers(NamedTuple):
    """What outliers are compared with, how frequent, and how large they are, in groups of genes of similar expression."""

    profiles: np.ndarray  # (n_cell_types + 1, n_genes) mean fraction of the counts; last row: of cells without a type
    theta: np.ndarray  # (n_genes,) inverse dispersion of the counts that are no outliers
    group: np.ndarray  # (n_genes,) of each gene, 0 to N_GROUPS - 1
    rate: np.ndarray  # (N_GROUPS,) probability that a counted molecule is an outlier that can be found
    sizes: np.ndarray  # (N_GROUPS, N_SIZES) quantiles of the counts that an outlier adds; zeros where there are none

    def replace(self, counts: sp.csr_matrix, cell_type_idx: np.ndarray) -> sp.csr_matrix:
        """The counts, cells x genes, each outlier replaced by the gene's expected count in the cell, at least 1.

        An outlier, with probability 1 - exp(-rate x mu), is the sum of an NB(mu, theta) and a size, taken as an NB of the same mean and
        variance; rate and sizes are those of the group of genes that shows most outliers. Other counts are NB(mu, theta) with the mean
        of the cell's type or, rarely, of the type in which the gene is highest.
        """
        entries = np.flatnonzero(counts.data >= MIN_COUNT)
        cells, genes = np.searchsorted(counts.indptr, entries, side="right") - 1, counts.indices[entries]
        library_size = np.asarray(counts.sum(axis=1), dtype=np.float64).ravel()
        mu, theta = library_size[cells] * self.profiles[cell_type_idx[cells], genes], self.theta[genes]
        highest = library_size[cells] * self.profiles.max(axis=0)[genes]
        sizes = self.sizes[self.rate.argmax()]
        x, total = counts.data[entries].astype(np.float64), mu + sizes.mean()
        theta_of_total = total**2 / (mu**2 / theta + sizes.var() + 1e-9)
        log_other_type = np.log(AS_OTHER_TYPE) + gamma_poisson_log_prob(x, highest, theta)
        log_odds = gamma_poisson_log_prob(x, total, theta_of_total)
        log_odds -= np.logaddexp(gamma_poisson_log_prob(x, mu, theta), log_other_type)
        log_odds += np.log(np.expm1(np.maximum(self.rate.max() * mu, 1e-300)))
        expected = np.maximum(1, mu.round())
        is_outlier = (log_odds > np.log(PROBABILITY / (1 - PROBABILITY))) & (x > expected)
        replaced = counts.copy()
        replaced.data[entries[is_outlier]] = expected[is_outlier]
        return replaced


def find_outliers(dataset: CellDataset, n_cell_types: int, seed: int) -> Outliers:
    """Estimate mean expression and theta without outliers, and outliers without the other counts, in turns.

    The first round takes all other counts for Poisson, and one molecule in 1,000 for an outlier of 10, 20 or 50 counts.
    """
    rng = np.random.default_rng(seed)
    sample = dataset.subset(np.sort(rng.permutation(len(dataset))[:MAX_CELLS]))
    counts = sp.vstack([block for block, _ in sample.blocks()], format="csr")
    others, theta = counts, np.full(dataset.n_genes, 1e4)
    group, rate, sizes = np.zeros(dataset.n_genes, dtype=np.int64), np.array([1e-3]), np.array([[10.0, 20.0, 50.0]])
    for turn in range(N_ROUNDS):
        cells = CellDataset(others, sample.cell_type_idx, dataset.device)
        profiles = type_profiles(cells, n_cell_types)
        if turn > 0:
            theta = np.exp(log_theta_by_moments(cells, profiles))
        of_all = np.asarray(others.sum(axis=0), dtype=np.float64).ravel() + 0.5
        outliers = Outliers(np.vstack([profiles, of_all / of_all.sum()]), theta, group, rate, sizes)
        others = outliers.replace(counts, sample.cell_type_idx)
        group, rate, sizes = _by_expression(counts, others)
    return outliers._replace(group=group, rate=rate, sizes=sizes)


def _by_expression(counts: sp.csr_matrix, others: sp.csr_matrix) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Group, rate and sizes of `Outliers`: groups of genes of similar expression, with about the same number of outliers."""
    is_outlier = counts.data > others.data
    gene, size = counts.indices[is_outlier], (counts.data - others.data)[is_outlier]
    n_groups = int(np.clip(len(gene) // MIN_PER_GROUP, 1, N_GROUPS))
    n_outliers, n_molecules = np.bincount(gene, minlength=counts.shape[1]), np.asarray(others.sum(axis=0)).ravel()
    order = np.argsort(n_molecules, kind="stable")
    group = np.empty(counts.shape[1], dtype=np.int64)
    group[order] = np.minimum(n_outliers[order].cumsum() * n_groups // (len(gene) + 1), n_groups - 1)
    rate = np.bincount(group, n_outliers, N_GROUPS) / np.maximum(np.bincount(group, n_molecules, N_GROUPS), 1)
    sizes = np.zeros((N_GROUPS, N_SIZES))
    for k in np.unique(group[gene]):
        sizes[k] = np.quantile(size[group[gene] == k], (np.arange(N_SIZES) + 0.5) / N_SIZES)
    return group, rate, sizes


def add_outliers(
    counts: sp.csr_matrix, group: np.ndarray, rate: np.ndarray, sizes: np.ndarray, generator: torch.Generator
) -> None:
    """Make each counted molecule of new cells an outlier with the probability of its gene's group: a random size is added."""
    if not rate.any() or not counts.nnz:
        return
    seed = int(torch.randint(2**62, (1,), generator=generator, device=generator.device))
    rng = np.random.Generator(np.random.SFC64(seed))
    expected = (counts.data * rate[group[counts.indices]]).cumsum(dtype=np.float64)  # outliers up to each entry
    entries = np.searchsorted(expected, rng.uniform(0, expected[-1], rng.poisson(expected[-1])), side="right")
    entries = np.minimum(entries, counts.nnz - 1)
    size = sizes[group[counts.indices[entries]], rng.integers(0, sizes.shape[1], len(entries))]
    np.add.at(counts.data, entries, size.round())
