"""The default deconvolution: a weighted non-negative regression on the reference profiles, with platform factors.

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
import pandas as pd
import scipy.optimize

from lib.bulk.reference import TECHNICAL, Reference, equal_totals, signature_genes
from lib.bulk.tables import sample_totals

# Selected on mixtures of held-out train cells, with and without simulated platform factors; never on a real bulk.
MODES = ("regression", "regression-per-sample", "regression-unadapted")
PLATFORM_SD = 1.0  # scale of log f: full-length TPM and UMI counts differ by a factor of 3 in a typical gene
PLATFORM_FREEDOM = (
    3.0  # degrees of freedom of log f: single genes that differ a hundredfold must not change the amounts
)
RESIDUAL_SHARE = 0.5  # prior standard deviation of the residual, as a share of the gene's level ...
RESIDUAL_SAMPLES = 4  # ... and its weight, in samples
CELLS_PER_BULK = 1000  # assumed, for the sampling variance of a mixture of cells
ROUNDS = 60  # of both fits, at most: later rounds fit differences between donors
MEMBER_ROUNDS = 30  # for each member of the ensemble; more do not change the spread
FAR_ABOVE = 5  # a gene is called unexplained if the bulk has more than so many times what the reference predicts
MIN_R = 0.5  # samples with a lower correlation with the reference get a warning


class Fit(NamedTuple):
    """Result of the alternating fits."""

    proportions: np.ndarray  # samples x types, of cells, rows sum to 1
    amounts: np.ndarray  # samples x types: x, on the scale of `scaled`
    factors: np.ndarray  # 1 x genes, or samples x genes: f
    residual_variance: np.ndarray  # the same shape


class Estimate(NamedTuple):
    """Result for bulk samples; None for what a method does not give."""

    proportions: pd.DataFrame  # samples x types, of cells, rows sum to 1
    rna_proportions: pd.DataFrame  # samples x types, of RNA, rows sum to 1
    spread: pd.DataFrame  # samples x types: standard deviation of `proportions` over the ensemble
    samples: pd.DataFrame  # one row per sample: genes used, correlation with the reference, unexplained genes, warning
    signature: (
        pd.DataFrame | None
    )  # types x genes: counts per cell, times the mean platform factors where these are fitted
    expression: np.ndarray | None  # samples x types x genes, with "regression-per-sample"


def deconvolve(
    reference: Reference,
    bulk: pd.DataFrame,
    mode: str = "regression",
    n_members: int = 10,
    seed: int = 0,
    min_coverage: float = 0.5,
    rna_per_cell: np.ndarray | None = None,
) -> Estimate:
    """Proportions of cell types in bulk samples, their spread, and the adapted signature matrix. One sample is enough.

    Parameters
    ----------
    reference
        All genes of the single cells.
    bulk
        Samples x genes, in any unit proportional to the number of transcripts (TPM, counts per million). Genes that the
        reference lacks are ignored.
    mode
        "regression": all samples share one set of platform factors; "regression-per-sample": each sample has its own, and the
        expression of each type in it is estimated as well; "regression-unadapted": all platform factors are 1.
    n_members
        Size of the ensemble for the spread; 0: the spread is NaN.
    min_coverage
        Share of the signature genes that the bulk must have.
    rna_per_cell
        (n_types,) mRNA content of a cell of each type, in any unit (`rna_content.rna_per_cell`), which turns shares of RNA into
        shares of cells. None: the counts per cell of the reference, which is right for a sum of such cells.

    Raises
    ------
    ValueError
        For an unknown mode, if the bulk has too few of the signature genes, or if a sample does not express any of them.
    """
    if mode not in MODES:
        raise ValueError(f"mode is {mode!r}; expected one of {', '.join(MODES)}")
    wanted = [reference.gene_names[g] for g in signature_genes(reference)]
    coverage = pd.Index(wanted).isin(bulk.columns).mean()
    if coverage < min_coverage:
        raise ValueError(
            f"the bulk has {coverage:.0%} of the {len(wanted):,} signature genes, expected at least {min_coverage:.0%} (its genes: "
            f"{', '.join(map(str, bulk.columns[:3]))}; the signature's: {', '.join(wanted[:3])}); "
            "are species and gene names the same? (GENE_IDS) "
            "For a panel or an array of few genes, lower MIN_GENE_COVERAGE of stage 4 and expect a larger spread"
        )
    shared = reference.of_genes(np.flatnonzero(pd.Index(reference.gene_names).isin(bulk.columns)))
    values = bulk[shared.gene_names].to_numpy(dtype=np.float64)
    genes = signature_genes(shared)
    used, chosen = values[:, genes], shared.of_genes(genes)
    print(f"deconvolution on {len(genes):,} signature genes; the bulk has {coverage:.1%} of those of the reference")
    how = {"per_sample": mode == "regression-per-sample", "adaptive": mode != "regression-unadapted"}
    fit = fit_regression(used, chosen, **how)
    factors = (
        all_factors(values, shared, fit.amounts, how["per_sample"])
        if how["adaptive"]
        else np.ones((1, values.shape[1]))
    )
    factors[:, genes] = fit.factors
    signature = shared.mean * factors.mean(axis=0)
    expression = (
        cell_type_expression(values, fit.amounts, shared.mean * factors[:, None]) if how["per_sample"] else None
    )
    counts_per_cell = reference.mean.sum(axis=1)
    rna = to_rna(fit.proportions, counts_per_cell)
    content = counts_per_cell if rna_per_cell is None else rna_per_cell
    deviation = np.full(rna.shape, np.nan)
    if n_members:
        deviation = spread(used, chosen, n_members, seed, counts_per_cell / content, **how)
    return Estimate(
        pd.DataFrame(to_cells(rna, content), bulk.index, shared.cell_types),
        pd.DataFrame(rna, bulk.index, shared.cell_types),
        pd.DataFrame(deviation, bulk.index, shared.cell_types),
        sample_quality(values, shared, fit.amounts, genes).set_index(bulk.index),
        pd.DataFrame(signature, shared.cell_types, shared.gene_names),
        expression,
    )


def sample_quality(values: np.ndarray, shared: Reference, amounts: np.ndarray, genes: np.ndarray) -> pd.DataFrame:
    """Correlation of each sample with the fitted mixture of the reference, and the genes that the mixture does not explain."""
    r = reconstruction_r(values[:, genes], shared.of_genes(genes), amounts)
    fitted = amounts @ shared.mean
    y = values * (fitted[:, genes].sum(axis=1) / values[:, genes].sum(axis=1))[:, None]
    technical = np.array([TECHNICAL.match(name) is not None for name in shared.gene_names])
    above = np.where((y > FAR_ABOVE * fitted) & ~technical, y - fitted, 0)
    names = np.array(shared.gene_names)
    top = [", ".join(names[[g for g in np.argsort(-row)[:5] if row[g] > 0]]) for row in above]
    table = pd.DataFrame({"signature_genes": len(genes), "reference_r": r, "unexplained_genes": top})
    table["warning"] = np.where(r < MIN_R, "unlike the reference", "")
    return table


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


def spread(
    bulk: np.ndarray, reference: Reference, n_members: int, seed: int, cells_per_cell: np.ndarray, **how
) -> np.ndarray:
    """Standard deviation of each proportion over an ensemble, samples x types.

    cells_per_cell: (n_types,) counts per cell of the reference over mRNA per cell, which converts shares of cells by counts into
    shares of cells by mRNA content.

    Every member uses a bootstrap sample of the genes, and mean profiles with random errors as large as their sampling errors. The
    spread therefore covers genes that behave differently on another platform, and types with few cells in the reference. It does
    not cover cell types that the reference lacks.
    """
    members = []
    error = np.sqrt(reference.variance / np.maximum(reference.n_cells, 1)[:, None])
    for member in range(n_members):
        rng = np.random.default_rng([seed, member])
        genes = rng.integers(0, bulk.shape[1], size=bulk.shape[1])
        mean = np.maximum(reference.mean + error * rng.standard_normal(error.shape), 0)
        resampled = reference._replace(mean=mean).of_genes(np.asarray(genes))
        found = fit_regression(bulk[:, genes], resampled, rounds=MEMBER_ROUNDS, **how).proportions
        members.append(to_rna(found, cells_per_cell))
    return np.std(members, axis=0)


def reconstruction_r(bulk: np.ndarray, reference: Reference, proportions: np.ndarray) -> np.ndarray:
    """Pearson's r of each sample with the fitted mixture of the reference, on log(1 + transcripts per 10,000)."""
    mixed = proportions @ reference.mean
    a, b = (np.log1p(values / values.sum(axis=1, keepdims=True) * 1e4) for values in (bulk, mixed))
    a, b = a - a.mean(axis=1, keepdims=True), b - b.mean(axis=1, keepdims=True)
    return (a * b).sum(axis=1) / np.maximum(np.sqrt((a**2).sum(axis=1) * (b**2).sum(axis=1)), 1e-12)


def to_rna(proportions: np.ndarray, library_size: np.ndarray) -> np.ndarray:
    """Shares of RNA from shares of cells, rows sum to 1: each type times its mean counts per cell."""
    rna = proportions * library_size
    return rna / rna.sum(axis=1, keepdims=True)


def to_cells(rna: np.ndarray, rna_per_cell: np.ndarray) -> np.ndarray:
    """Shares of cells from shares of RNA, rows sum to 1: each type divided by its mRNA per cell."""
    return to_rna(rna, 1 / rna_per_cell)


def cell_type_expression(bulk: np.ndarray, amounts: np.ndarray, signature: np.ndarray) -> np.ndarray:
    """Expression of each type in each sample: samples x types x genes, counts per cell on the scale of the reference.

    The residual of a sample is distributed among the types as the posterior mean of normal deviations (Rahmani et al., Nature
    Communications 10, 3417 (2019), eq. 5), with a standard deviation of each type proportional to its expression:

    z_k = S_k + x_k S_k^2 (y - sum_j x_j S_j) / (sum_j x_j^2 S_j^2 + s^2), at least 0.

    Parameters
    ----------
    bulk
        Samples x genes.
    amounts
        Samples x types, from `fit_regression`.
    signature
        Types x genes, or samples x types x genes: reference profiles times platform factors.
    """
    per_sample = np.broadcast_to(signature, (len(bulk), *signature.shape[-2:]))
    contribution = amounts[:, :, None] * per_sample
    fitted = contribution.sum(axis=1)
    y = bulk / bulk.sum(axis=1, keepdims=True) * fitted.sum(axis=1, keepdims=True)
    residual_variance = (RESIDUAL_SHARE * fitted) ** 2
    share = contribution * per_sample / (np.square(contribution).sum(axis=1) + residual_variance + 1e-12)[:, None]
    return np.maximum(per_sample + share * (y - fitted)[:, None], 0)


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
