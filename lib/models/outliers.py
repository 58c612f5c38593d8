"""Outlier counts: single genes of single cells, counted tens of times more often than their mean expression explains.

In some data sets about one molecule in 500 has a count of 10 to 60, whatever its gene, as if its copies had been counted (pbmc3k, of
10x's first chemistry: of the genes that less than 1 % of the cells hold, .2 % of the counts above 0 are 10 or more). A negative
binomial explains them by a small theta, which makes all other counts too variable; they also blur mean expression and axes. So they
are replaced before training, and new cells get back as many of the same sizes.
"""

from typing import NamedTuple

import numpy as np
import scipy.sparse as sp
import torch

from lib.data.batches import CellDataset
from lib.models.profiles import gamma_poisson_log_prob, log_theta_by_moments, type_profiles

MAX_CELLS = 10_000  # random cells in which outliers are studied, at most
MIN_COUNT = 10  # smaller counts are never outliers: 5 to 9 may well be a gene that few cells switch on
PROBABILITY = 0.9  # of being an outlier, above which a count is replaced
AS_OTHER_TYPE = (
    0.005  # probability that a cell expresses a gene as another type does: doublets, wrong labels, precursors
)
N_ROUNDS = 5
N_GROUPS, MIN_PER_GROUP = 10, 20  # groups of genes at most; outliers of each at least
N_SIZES = 256  # quantiles kept of the sizes


class Outliers(NamedTuple):
    """What outliers are compared with, how frequent, and how large they are.

    Among many molecules of a gene only large outliers can be told from other counts, so frequency and sizes are those of groups of
    genes of similar expression.
    """

    profiles: np.ndarray  # (n_cell_types + 1, n_genes) mean fraction of the counts; last row: of cells without a type
    theta: np.ndarray  # (n_genes,) inverse dispersion of the counts that are no outliers
    group: np.ndarray  # (n_genes,) of each gene, 0 to N_GROUPS - 1
    rate: np.ndarray  # (N_GROUPS,) probability that a counted molecule is an outlier that can be found
    sizes: np.ndarray  # (N_GROUPS, N_SIZES) quantiles of the counts that an outlier adds; zeros where there are none

    def replace(self, counts: sp.csr_matrix, cell_type_idx: np.ndarray) -> sp.csr_matrix:
        """The counts, cells x genes, each outlier replaced by the gene's expected count in the cell, at least 1."""
        replaced = counts.copy()
        entries, expected = self._find(counts, cell_type_idx)
        replaced.data[entries] = expected
        return replaced

    def _find(self, counts: sp.csr_matrix, cell_type_idx: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Places of the outliers in `counts.data`, and expected counts, whole numbers.

        An outlier is the sum of an NB(mu, theta) and a size, taken as an NB of the same mean and variance. A gene of a cell has one
        with probability 1 - exp(-rate x mu). Rate and sizes are those of the group of genes that shows most outliers. Other counts
        are NB(mu, theta) with the mean of the cell's type or, rarely, of the type in which the gene is highest.
        """
        entries = np.flatnonzero(counts.data >= MIN_COUNT)
        cells, genes = np.searchsorted(counts.indptr, entries, side="right") - 1, counts.indices[entries]
        library_size = np.asarray(counts.sum(axis=1), dtype=np.float64).ravel()
        mu, theta = library_size[cells] * self.profiles[cell_type_idx[cells], genes], self.theta[genes]
        highest = library_size[cells] * self.profiles.max(axis=0)[genes]
        sizes = self.sizes[self.rate.argmax()]
        x, total = counts.data[entries].astype(np.float64), mu + sizes.mean()
        theta_of_total = total**2 / (mu**2 / theta + sizes.var() + 1e-9)
        log_other = np.logaddexp(
            gamma_poisson_log_prob(x, mu, theta), np.log(AS_OTHER_TYPE) + gamma_poisson_log_prob(x, highest, theta)
        )
        log_odds = gamma_poisson_log_prob(x, total, theta_of_total) - log_other
        log_odds += np.log(np.expm1(np.maximum(self.rate.max() * mu, 1e-300)))
        expected = np.maximum(1, mu.round())
        is_outlier = (log_odds > np.log(PROBABILITY / (1 - PROBABILITY))) & (x > expected)
        return entries[is_outlier], expected[is_outlier]


def find(dataset: CellDataset, n_cell_types: int, seed: int) -> Outliers:
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
        found = Outliers(np.vstack([profiles, of_all / of_all.sum()]), theta, group, rate, sizes)
        others = found.replace(counts, sample.cell_type_idx)
        group, rate, sizes = _by_expression(counts, others)
    return found._replace(group=group, rate=rate, sizes=sizes)


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


def put_back(
    counts: sp.csr_matrix, group: np.ndarray, rate: np.ndarray, sizes: np.ndarray, generator: torch.Generator
) -> None:
    """Make each counted molecule of new cells an outlier with the probability of its gene's group: a random size is added."""
    if not rate.any() or not counts.nnz:
        return
    seed = int(torch.randint(2**62, (1,), generator=generator, device=generator.device))
    rng = np.random.Generator(np.random.SFC64(seed))
    expected = (counts.data * rate[group[counts.indices]]).cumsum(
        dtype=np.float64
    )  # number of outliers up to each entry
    entries = np.searchsorted(expected, rng.uniform(0, expected[-1], rng.poisson(expected[-1])), side="right")
    entries = np.minimum(entries, counts.nnz - 1)
    size = sizes[group[counts.indices[entries]], rng.integers(0, sizes.shape[1], len(entries))]
    np.add.at(counts.data, entries, size.round())
