"""The fit of the default deconvolution: a weighted non-negative regression on reference profiles, with platform factors.

A bulk sample is modelled as y_g = f_g sum_k x_k S_kg + residual: x_k is the amount of cells of type k, S_kg the mean counts of gene
g in a cell of type k of the reference, and f_g the platform factor: how much better or worse the bulk's platform measures gene g
than the platform of the single cells (length, 3' bias, mapping); log f_g has a Student's t prior. Amounts (given f) and platform
factors (given x) are fitted in turn to the unlabelled bulk until the amounts do not change: block-wise maximisation of the
posterior. No network is used. It takes the place of scTAPE's adaptive stage.

Platform factors as random effects: Cable, D. M. et al., "Robust decomposition of cell type mixtures in spatial transcriptomics",
Nature Biotechnology 40, 517-526 (2022).
"""

from typing import NamedTuple

import numpy as np
import scipy.optimize

from lib.bulk.reference import Reference, equal_totals
from lib.bulk.tables import sample_totals

# Selected on mixtures of held-out train cells, with and without simulated platform factors; never on a real bulk.
PLATFORM_SD = 1.0  # scale of log f: full-length TPM and UMI counts differ by a factor of 3 in a typical gene
PLATFORM_FREEDOM = (
    3.0  # degrees of freedom of log f: single genes that differ a hundredfold must not change the amounts
)
RESIDUAL_SHARE = 0.5  # prior standard deviation of the residual, as a share of the gene's level ...
RESIDUAL_SAMPLES = 4  # ... and its weight, in samples
CELLS_PER_BULK = 1000  # assumed, for the sampling variance of a mixture of cells
ROUNDS = 60  # of both fits, at most: later rounds fit differences between donors


class Fit(NamedTuple):
    """Result of the alternating fits."""

    proportions: np.ndarray  # samples x types, of cells, rows sum to 1
    amounts: np.ndarray  # samples x types: x, on the scale of `scaled`
    factors: np.ndarray  # 1 x genes, or samples x genes: f
    residual_variance: np.ndarray  # the same shape


def scaled(bulk: np.ndarray, reference: Reference) -> np.ndarray:
    """Bulk, samples x genes, scaled to the counts of the mean reference cell, so that the amounts sum to about 1.

    Raises
    ------
    ValueError
        For a sample that does not express any of these genes.
    """
    return bulk / sample_totals(bulk) * reference.mean.mean(axis=0).sum()


def non_negative_least_squares(gram: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Minimise x'Gx / 2 - t'x over x >= 0, for many t: samples x types.

    Parameters
    ----------
    gram
        1 x types x types, or one matrix per sample; positive definite.
    target
        Samples x types.
    """
    x = np.linalg.solve(gram, target[..., None])[..., 0]
    negative = np.flatnonzero((x < 0).any(axis=1))  # the others are solved
    roots = np.linalg.cholesky(gram)
    right = np.linalg.solve(roots, target[..., None])[..., 0]
    for i in negative:
        x[i] = scipy.optimize.nnls(roots[i % len(roots)].T, right[i])[0]
    return x


def fit_regression(
    bulk: np.ndarray, reference: Reference, per_sample: bool = False, adaptive: bool = True, rounds: int | None = None
) -> Fit:
    """Fit amounts and platform factors in turn to bulk samples.

    Parameters
    ----------
    bulk
        Samples x genes of the reference, in any unit proportional to the number of transcripts.
    per_sample
        True: each sample has its own platform factors; False: all samples share them.
    adaptive
        False: all factors are 1, one weighted non-negative regression.
    rounds
        At most; None: `ROUNDS`.
    """
    counts_per_cell = reference.mean.sum(axis=1)
    reference = equal_totals(reference)  # types have equal weight, whatever their counts per cell
    y, mean = scaled(bulk, reference), reference.mean
    gene_mean = mean.mean(axis=0)
    sampling_variance = reference.variance.mean(axis=0) / CELLS_PER_BULK
    n_groups, per_group = (len(y), 1) if per_sample else (1, len(y))
    factors = np.ones((n_groups, y.shape[1]))
    residual_variance = np.tile((RESIDUAL_SHARE * gene_mean) ** 2 + sampling_variance, (n_groups, 1))
    # the first regression gives a low weight to genes whose means are uncertain
    mean_variance = (reference.variance / np.maximum(reference.n_cells, 1)[:, None]).sum(axis=0)
    x = fit_amounts(y, mean, factors, 10 * gene_mean[None] ** 2 + mean_variance)
    for _ in range((rounds or ROUNDS) if adaptive else 0):
        before = x
        fitted = x @ mean
        factors = fit_platform_factors(y, fitted, factors, residual_variance)
        # level of a gene: mean of fitted and reference; for a single sample, the fit itself would favour genes that are fitted too low
        level = gene_mean if per_sample else (factors * fitted.mean(axis=0) + gene_mean) / 2
        prior_variance = (RESIDUAL_SHARE * level) ** 2 + sampling_variance
        squares = grouped((y - fitted * factors) ** 2, n_groups)
        residual = squares / max(per_group - 2, 1)
        residual_variance = (per_group * residual + RESIDUAL_SAMPLES * prior_variance) / (per_group + RESIDUAL_SAMPLES)
        x = fit_amounts(y, mean, factors, residual_variance)
        if np.abs(x - before).max() < 1e-5:
            break
    x = x * (counts_per_cell.mean() / np.maximum(counts_per_cell, 1e-12))  # from equal totals back to cells
    total = x.sum(axis=1, keepdims=True)
    proportions = np.where(total > 0, x / np.where(total > 0, total, 1), 1 / x.shape[1])
    return Fit(proportions, x, factors, residual_variance)


def fit_amounts(y: np.ndarray, mean: np.ndarray, factors: np.ndarray, residual_variance: np.ndarray) -> np.ndarray:
    """Amounts of the types, samples x types, given the platform factors: weighted non-negative least squares."""
    n_types = len(mean)
    products = (mean[:, None] * mean[None]).reshape(n_types**2, -1)
    gram = (factors**2 / residual_variance @ products.T).reshape(-1, n_types, n_types)
    gram = gram + 1e-8 * np.trace(gram, axis1=1, axis2=2)[:, None, None] * np.eye(n_types)
    return non_negative_least_squares(gram, (y * factors / residual_variance) @ mean.T)


def fit_platform_factors(
    y: np.ndarray, fitted: np.ndarray, factors: np.ndarray, residual_variance: np.ndarray
) -> np.ndarray:
    """Platform factors given the amounts: three Newton steps on log f.

    They minimise squared residuals over their variance, with Student's t as the prior of log f. At each step the prior is a
    normal distribution whose variance depends on log f: s^2 (v + (log f / s)^2) / (v + 1), with v degrees of freedom and scale s.
    """
    cross, square = (
        grouped(y * fitted, len(factors)) / residual_variance,
        grouped(fitted**2, len(factors)) / residual_variance,
    )
    log_f = np.log(factors)
    for _ in range(3):
        f = np.exp(log_f)
        precision = (PLATFORM_FREEDOM + 1) / (PLATFORM_FREEDOM * PLATFORM_SD**2 + log_f**2)
        slope = f * (f * square - cross) + log_f * precision
        curvature = np.maximum(f * (2 * f * square - cross), 0.5 * f**2 * square) + precision
        log_f = log_f - np.clip(slope / curvature, -0.5, 0.5)
    return np.exp(log_f)


def grouped(values: np.ndarray, n_groups: int) -> np.ndarray:
    """Sum over the samples if they share one set of factors (n_groups = 1)."""
    return values.sum(axis=0, keepdims=True) if n_groups == 1 else values


def all_factors(bulk: np.ndarray, reference: Reference, amounts: np.ndarray, per_sample: bool) -> np.ndarray:
    """Platform factors of all genes, not only the signature genes, given the amounts: 1 x genes, or samples x genes."""
    fitted = amounts @ reference.mean
    y = bulk / bulk.sum(axis=1, keepdims=True) * fitted.sum(axis=1, keepdims=True)
    gene_mean = reference.mean.mean(axis=0)
    residual_variance = (RESIDUAL_SHARE * gene_mean) ** 2 + reference.variance.mean(axis=0) / CELLS_PER_BULK + 1e-12
    n_groups = len(bulk) if per_sample else 1
    factors, residual_variance = np.ones((n_groups, bulk.shape[1])), np.tile(residual_variance, (n_groups, 1))
    for _ in range(5):
        factors = fit_platform_factors(y, fitted, factors, residual_variance)
    return factors
