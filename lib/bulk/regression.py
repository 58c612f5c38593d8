"""Reference profiles of the cell types, and the default deconvolution: non-negative regression on them, with platform factors.

A bulk sample is modelled as y_g = f_g sum_k x_k S_kg + residual: x_k is the amount of cells of type k, S_kg the mean counts of gene
g in a cell of type k of the reference, and f_g the platform factor: how much better or worse the bulk's platform measures gene g
than that of the single cells (length, 3' bias, mapping); log f_g has a Student's t prior. Amounts (given f) and platform factors
(given x) are fitted in turn to the unlabelled bulk until the amounts do not change: block-wise maximisation of the posterior.

Platform factors as random effects: Cable et al., Nature Biotechnology 40, 517-526 (2022).
"""

import re
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import scipy.optimize
import scipy.sparse as sp
import torch
from anndata.abc import CSRDataset

from lib.bulk.pseudobulk import sample_totals
from lib.data.counts import row_blocks
from lib.models.profiles import log_fold_changes, top_genes

# All selected on mixtures of held-out train cells, with and without simulated platform factors; never on a real bulk.
# Signature genes: difference between one type and the others, in standard errors, and as a ratio: smaller ones are not reproduced
MIN_Z, MIN_FOLD = 5.0, 3.0
FOLD_OFFSET = 1e-5  # added to both sides of the ratio, as a share of the mean cell's counts
MIN_PER_TYPE = 20  # genes of largest ratio that each type has in any case, if their z is large enough
MAX_GENES = 3000  # signature genes at most: those with the largest z
N_MARKERS = 50  # of each type, for the NNLS baseline
# Genes whose share differs between platforms more than between cell types: ribosomal, mitochondrial, nuclear non-coding
TECHNICAL = re.compile(r"^(MT-|MRP[LS]\d|RP[LS](?!6K)|MALAT1$|NEAT1$|XIST$)", re.IGNORECASE)
PLATFORM_SD = 1.0  # scale of log f: full-length TPM and UMI counts differ by a factor of 3 in a typical gene
PLATFORM_FREEDOM = 3.0  # its degrees of freedom: single genes that differ a hundredfold must not change the amounts
RESIDUAL_SHARE = 0.5  # prior standard deviation of the residual, as a share of the gene's level ...
RESIDUAL_SAMPLES = 4  # ... and its weight, in samples
CELLS_PER_BULK = 1000  # assumed, for the sampling variance of a mixture of cells
ROUNDS = 60  # of both fits, at most: later rounds fit differences between donors


class Reference(NamedTuple):
    """Profiles of the cell types."""

    gene_names: list[str]
    cell_types: list[str]
    mean: np.ndarray  # types x genes: counts per cell
    variance: np.ndarray  # types x genes: variance of counts between the cells of a type
    n_cells: np.ndarray  # (n_types,)

    @property
    def mean_variance(self) -> np.ndarray:
        """Types x genes: squared standard error of `mean`."""
        return self.variance / np.maximum(self.n_cells, 1)[:, None]

    def of_genes(self, genes: np.ndarray) -> "Reference":
        """The reference with some of its genes, given by their indices."""
        names = [self.gene_names[g] for g in genes]
        return self._replace(gene_names=names, mean=self.mean[:, genes], variance=self.variance[:, genes])

    def times(self, factor: np.ndarray) -> "Reference":
        """The reference with all counts multiplied by a factor, of shape (n_genes,) or (n_types, 1)."""
        return self._replace(mean=self.mean * factor, variance=self.variance * factor**2)

    def per_length(self, gene_length_bp: pd.Series) -> "Reference":
        """Counts per base pair instead of counts, for TPM by gene length. Genes without a length are removed."""
        known = self.of_genes(np.flatnonzero(pd.Index(self.gene_names).isin(gene_length_bp.index)))
        per_bp = 1 / gene_length_bp[known.gene_names].to_numpy(dtype=np.float64)
        return known.times(per_bp * (known.mean.sum() / (known.mean * per_bp).sum()))  # on the scale of counts

    def to_checkpoint(self) -> dict[str, Any]:
        """As tensors and builtins, for a checkpoint."""
        arrays = {name: torch.from_numpy(getattr(self, name)).float() for name in ("mean", "variance")}
        return self._asdict() | arrays | {"n_cells": torch.from_numpy(self.n_cells)}

    @staticmethod
    def from_checkpoint(saved: dict[str, Any]) -> "Reference":
        arrays = {name: saved[name].numpy().astype(np.float64) for name in ("mean", "variance", "n_cells")}
        return Reference(**saved | arrays)


def reference_profiles(
    counts: sp.csr_matrix | CSRDataset, cell_type_idx: np.ndarray, gene_names: list[str], cell_types: list[str]
) -> Reference:
    """Mean and variance of the counts (cells x genes, raw) of each type, read in blocks. Cells of unknown type (-1) are ignored."""
    n_types = len(cell_types)
    total, squares = np.zeros((2, n_types, counts.shape[1]))
    for rows, block in row_blocks(counts):
        idx = cell_type_idx[rows]
        cells = np.flatnonzero(idx >= 0)
        member = sp.csr_matrix((np.ones(len(cells)), (idx[cells], cells)), shape=(n_types, len(idx)))
        total += (member @ block).toarray()
        squares += (member @ block.power(2)).toarray()
    n_cells = np.bincount(cell_type_idx[cell_type_idx >= 0], minlength=n_types)
    n = np.maximum(n_cells, 1)[:, None]
    mean = total / n
    variance = np.maximum(squares / n - mean**2, 0) * n / np.maximum(n - 1, 1)
    # a gene without counts in the few cells of a type may still be expressed: at least half of the mean Poisson variance
    return Reference(list(gene_names), list(cell_types), mean, np.maximum(variance, 0.5 * mean.mean(axis=0)), n_cells)


def equal_totals(reference: Reference) -> Reference:
    """The reference with all profiles scaled to the same total counts, so that amounts of the types are shares of RNA."""
    total = reference.mean.sum(axis=1, keepdims=True)
    return reference.times(total.mean() / np.maximum(total, 1e-12))


def signature_genes(reference: Reference) -> np.ndarray:
    """Indices of the genes that distinguish the types beyond the sampling error of the reference, without technical genes.

    z of a gene and type: mean counts in the type (scaled to equal totals) minus the mean over the other types, in standard errors;
    fold: their ratio, in either direction. A gene is used if a type has |z| >= `MIN_Z`, and fold >= `MIN_FOLD` or one of its
    `MIN_PER_TYPE` largest folds. Sampling errors of genes below `MIN_Z` would bias all estimates towards each other.
    """
    reference = equal_totals(reference)
    mean, variance, n_types = reference.mean, reference.mean_variance, len(reference.cell_types)
    others = (mean.sum(axis=0) - mean) / (n_types - 1)
    others_variance = (variance.sum(axis=0) - variance) / (n_types - 1) ** 2
    z = np.abs(mean - others) / np.sqrt(variance + others_variance + 1e-12)
    offset = FOLD_OFFSET * mean.sum(axis=1).mean()
    log_fold = np.abs(np.log((mean + offset) / (others + offset)))
    use = np.array([not TECHNICAL.match(name) for name in reference.gene_names]) & (mean.mean(axis=0) > 1e-3)
    best_of_type = np.argsort(-np.where(use & (z >= MIN_Z), log_fold, 0), axis=1, kind="stable")[:, :MIN_PER_TYPE]
    is_clear = log_fold >= np.log(MIN_FOLD)
    np.put_along_axis(is_clear, best_of_type, True, axis=1)
    z = np.where(use, np.where(is_clear, z, 0).max(axis=0), 0)
    least = min(MIN_Z, np.sort(z)[::-1][: 10 * n_types][-1])  # with few cells: ten genes per type
    selected = np.flatnonzero((z >= least) & (z > 0))
    return np.sort(selected[np.argsort(-z[selected], kind="stable")[:MAX_GENES]])


def nnls_on_markers(bulk: pd.DataFrame, reference: Reference) -> pd.DataFrame:
    """Baseline: non-negative least squares on the `N_MARKERS` genes of largest fold change of each type; samples x types, rows sum to 1."""
    share = reference.mean / reference.mean.sum(axis=1, keepdims=True) * 1e4
    genes = np.unique(top_genes(log_fold_changes(share), N_MARKERS))
    markers = reference.of_genes(genes[pd.Index(reference.gene_names).isin(bulk.columns)[genes]])
    y = bulk[markers.gene_names].to_numpy(dtype=np.float64)
    y = y / np.maximum(y.sum(axis=1, keepdims=True), 1e-12)
    x = np.array([scipy.optimize.nnls(markers.mean.T, sample)[0] for sample in y])
    return pd.DataFrame(x / np.maximum(x.sum(axis=1, keepdims=True), 1e-12), bulk.index, reference.cell_types)


# --- the regression


class Fit(NamedTuple):
    proportions: np.ndarray  # samples x types, of cells, rows sum to 1
    amounts: np.ndarray  # samples x types: x, for counts of the mean reference cell
    factors: np.ndarray  # 1 x genes, or samples x genes: f


def fit_regression(
    bulk: np.ndarray, reference: Reference, per_sample: bool = False, adaptive: bool = True, rounds: int = ROUNDS
) -> Fit:
    """Fit amounts and platform factors in turn to bulk samples (samples x genes of the reference, in any unit).

    per_sample: each sample has its own platform factors, otherwise all samples share them; not adaptive: all factors are 1.
    """
    counts_per_cell = reference.mean.sum(axis=1)
    reference = equal_totals(reference)  # types have equal weight, whatever their counts per cell
    mean, gene_mean = reference.mean, reference.mean.mean(axis=0)
    y = bulk / sample_totals(bulk) * gene_mean.sum()  # counts as in the mean cell, so that amounts sum to about 1
    sampling_variance = reference.variance.mean(axis=0) / CELLS_PER_BULK
    n_groups, per_group = (len(y), 1) if per_sample else (1, len(y))
    factors = np.ones((n_groups, y.shape[1]))
    residual_variance = np.tile((RESIDUAL_SHARE * gene_mean) ** 2 + sampling_variance, (n_groups, 1))
    # the first regression gives a low weight to genes whose means are uncertain
    x = fit_amounts(y, mean, factors, 10 * gene_mean[None] ** 2 + reference.mean_variance.sum(axis=0))
    for _ in range(rounds if adaptive else 0):
        before, fitted = x, x @ mean
        factors = fit_platform_factors(y, fitted, factors, residual_variance)
        # level of a gene: mean of fitted and reference; for a single sample, the fit itself would favour genes that are fitted too low
        level = gene_mean if per_sample else (factors * fitted.mean(axis=0) + gene_mean) / 2
        prior_variance = (RESIDUAL_SHARE * level) ** 2 + sampling_variance
        residual = _group_sum((y - fitted * factors) ** 2, n_groups) / max(per_group - 2, 1)
        residual_variance = (per_group * residual + RESIDUAL_SAMPLES * prior_variance) / (per_group + RESIDUAL_SAMPLES)
        x = fit_amounts(y, mean, factors, residual_variance)
        if np.abs(x - before).max() < 1e-5:
            break
    x = x * (counts_per_cell.mean() / np.maximum(counts_per_cell, 1e-12))  # from equal totals back to cells
    shares = np.where(x.any(axis=1, keepdims=True), x, 1.0)  # equal shares where nothing fits
    return Fit(shares / shares.sum(axis=1, keepdims=True), x, factors)


def fit_amounts(y: np.ndarray, mean: np.ndarray, factors: np.ndarray, residual_variance: np.ndarray) -> np.ndarray:
    """Amounts of the types, samples x types, given the platform factors: weighted non-negative least squares."""
    n_types = len(mean)
    products = (mean[:, None] * mean[None]).reshape(n_types**2, -1)
    gram = (factors**2 / residual_variance @ products.T).reshape(-1, n_types, n_types)
    gram = gram + 1e-8 * np.trace(gram, axis1=1, axis2=2)[:, None, None] * np.eye(n_types)
    return non_negative_least_squares(gram, (y * factors / residual_variance) @ mean.T)


def non_negative_least_squares(gram: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Minimise x'Gx / 2 - t'x over x >= 0, for many t, samples x types. gram: G, positive definite; one, or one per sample."""
    x = np.linalg.solve(gram, target[..., None])[..., 0]
    roots = np.linalg.cholesky(gram)
    right = np.linalg.solve(roots, target[..., None])[..., 0]
    for i in np.flatnonzero((x < 0).any(axis=1)):  # the others are solved
        x[i] = scipy.optimize.nnls(roots[i % len(roots)].T, right[i])[0]
    return x


def fit_platform_factors(
    y: np.ndarray, fitted: np.ndarray, factors: np.ndarray, residual_variance: np.ndarray, n_steps: int = 3
) -> np.ndarray:
    """Platform factors given the amounts: Newton steps on log f minimise squared residuals over their variance, minus the log prior.

    At each step the prior, Student's t with v degrees of freedom and scale s, is a normal distribution of the variance
    s^2 (v + (log f / s)^2) / (v + 1).
    """
    cross = _group_sum(y * fitted, len(factors)) / residual_variance
    square = _group_sum(fitted**2, len(factors)) / residual_variance
    log_f = np.log(factors)
    for _ in range(n_steps):
        f = np.exp(log_f)
        precision = (PLATFORM_FREEDOM + 1) / (PLATFORM_FREEDOM * PLATFORM_SD**2 + log_f**2)
        slope = f * (f * square - cross) + log_f * precision
        curvature = np.maximum(f * (2 * f * square - cross), 0.5 * f**2 * square) + precision
        log_f = log_f - np.clip(slope / curvature, -0.5, 0.5)
    return np.exp(log_f)


def _group_sum(values: np.ndarray, n_groups: int) -> np.ndarray:
    """Sum over the samples if they share one set of factors (n_groups = 1)."""
    return values.sum(axis=0, keepdims=True) if n_groups == 1 else values


def all_factors(bulk: np.ndarray, reference: Reference, amounts: np.ndarray, per_sample: bool) -> np.ndarray:
    """Platform factors of all genes, not only the signature genes, given the amounts: 1 x genes, or samples x genes."""
    fitted = amounts @ reference.mean
    y = bulk / bulk.sum(axis=1, keepdims=True) * fitted.sum(axis=1, keepdims=True)
    gene_mean = reference.mean.mean(axis=0)
    residual_variance = (RESIDUAL_SHARE * gene_mean) ** 2 + reference.variance.mean(axis=0) / CELLS_PER_BULK + 1e-12
    factors = np.ones((len(bulk) if per_sample else 1, bulk.shape[1]))
    return fit_platform_factors(y, fitted, factors, residual_variance, n_steps=15)
