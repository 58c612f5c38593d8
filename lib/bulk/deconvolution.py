"""The default deconvolution: proportions of bulk samples by the regression with platform factors, and how reliable they are."""

from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy.sparse.csgraph import connected_components

from lib.bulk import rna_content
from lib.bulk.reference import TECHNICAL, Reference, signature_genes
from lib.bulk.regression import RESIDUAL_SHARE, all_factors, fit_regression
from lib.bulk.rna_content import to_cells, to_rna
from lib.log import detail

MODES = ("regression", "regression-per-sample", "regression-unadapted")
MEMBER_ROUNDS = 30  # of the fits of each member of the ensemble; more do not change the spread
PLATFORM_TYPE_SD = (
    0.3  # error of the log amount of a type on another platform: 95 % of the truths of cross_reference.py are covered
)
INSEPARABLE = 0.6  # types are merged if their sum has a spread below this share of what independent errors would give
FAR_ABOVE = 5  # a gene is called unexplained if the bulk has more than so many times what the reference predicts
MIN_R = 0.5  # samples with a lower correlation with the reference get a warning


class Estimate(NamedTuple):
    """Result for bulk samples; None for what a method does not give."""

    proportions: pd.DataFrame  # samples x types, of cells, rows sum to 1
    spread: pd.DataFrame  # samples x types: standard deviation of `proportions`
    rna_proportions: pd.DataFrame  # samples x types, of RNA, rows sum to 1
    rna_spread: pd.DataFrame  # samples x types: standard deviation of `rna_proportions`
    merged: pd.DataFrame  # (sample, types that the bulk hardly distinguishes) x (proportion, spread) of their sum
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
    content: pd.DataFrame | None = None,
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
    content
        Table of `rna_content.rna_per_cell`: mRNA per cell of each type, which turns shares of RNA into shares of cells, and how
        uncertain it is. None: the counts per cell of the reference, which is right for a sum of such cells.

    Raises
    ------
    ValueError
        For an unknown mode, if the bulk has too few of the signature genes, or if a sample does not express any of them.
    """
    if mode not in MODES:
        raise ValueError(f"mode is {mode!r}; expected one of {', '.join(MODES)}")
    coverage = signature_coverage(reference, bulk, min_coverage)
    shared = reference.of_genes(np.flatnonzero(pd.Index(reference.gene_names).isin(bulk.columns)))
    values = bulk[shared.gene_names].to_numpy(dtype=np.float64)
    genes = signature_genes(shared)
    used, chosen = values[:, genes], shared.of_genes(genes)
    detail(f"deconvolution on {len(genes):,} signature genes; the bulk has {coverage:.1%} of those of the reference")
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
    rna_members = to_rna(ensemble(used, chosen, n_members, seed, **how), counts_per_cell)
    if content is None:  # a sum of cells like those of the reference, measured by the same platform
        content, platform_sd = rna_content.rna_per_cell("reference", reference), 0.0
    else:
        platform_sd = PLATFORM_TYPE_SD
    rna_per_cell = content["rna_per_cell"].to_numpy()
    cells, members = to_cells(rna, rna_per_cell), to_cells(rna_members, rna_per_cell)
    scale_sd = np.hypot(platform_sd, content["log_sd"].to_numpy())

    def table(array: np.ndarray) -> pd.DataFrame:
        return pd.DataFrame(array, bulk.index, shared.cell_types)

    return Estimate(
        table(cells),
        table(spread(cells, members, scale_sd)),
        table(rna),
        table(spread(rna, rna_members, np.full_like(scale_sd, platform_sd))),
        merged_proportions(table(cells), members, scale_sd),
        sample_quality(values, shared, fit.amounts, genes).set_index(bulk.index),
        pd.DataFrame(signature, shared.cell_types, shared.gene_names),
        expression,
    )


def signature_coverage(reference: Reference, bulk: pd.DataFrame, min_coverage: float) -> float:
    """Share of the signature genes that the bulk has; refused below `min_coverage`."""
    wanted = [reference.gene_names[g] for g in signature_genes(reference)]
    coverage = pd.Index(wanted).isin(bulk.columns).mean()
    if coverage < min_coverage:
        raise ValueError(
            f"the bulk has {coverage:.0%} of the {len(wanted):,} signature genes, expected at least {min_coverage:.0%} (its genes: "
            f"{', '.join(map(str, bulk.columns[:3]))}; the signature's: {', '.join(wanted[:3])}); "
            "are species and gene names the same? (GENE_IDS) "
            "For a panel or an array of few genes, lower MIN_GENE_COVERAGE of stage 4 and expect a larger spread"
        )
    return coverage


def ensemble(bulk: np.ndarray, reference: Reference, n_members: int, seed: int, **how: bool) -> np.ndarray:
    """Proportions by the counts of the reference from each member of an ensemble: members x samples x types.

    Every member uses a bootstrap sample of the genes, and mean profiles with random errors as large as their sampling errors. The
    members therefore differ by genes that behave differently on another platform, and by types with few cells in the reference.
    """
    members = np.empty((n_members, len(bulk), len(reference.cell_types)))
    error = np.sqrt(reference.variance / np.maximum(reference.n_cells, 1)[:, None])
    for member in range(n_members):
        rng = np.random.default_rng([seed, member])
        genes = rng.integers(0, bulk.shape[1], size=bulk.shape[1])
        mean = np.maximum(reference.mean + error * rng.standard_normal(error.shape), 0)
        resampled = reference._replace(mean=mean).of_genes(np.asarray(genes))
        members[member] = fit_regression(bulk[:, genes], resampled, rounds=MEMBER_ROUNDS, **how).proportions
    return members


def spread(
    proportions: np.ndarray, members: np.ndarray, scale_sd: np.ndarray, in_group: np.ndarray | None = None
) -> np.ndarray:
    """Standard deviation of each proportion: over the ensemble, and from errors that all samples and members share.

    A type whose amount is too large by a factor exp(e_j), in all samples, changes the proportion p_k by p_j (1[j = k] - p_k) e_j.

    Parameters
    ----------
    proportions
        Samples x types.
    members
        Members x samples x types; no members: the result is NaN.
    scale_sd
        (n_types,) standard deviation of e_j, from differences between platforms and unknown mRNA contents.
    in_group
        Groups x types, 1 where the type is in the group: the spread of sums of types. None: of the types.
    """
    if not len(members):
        return np.full(proportions.shape, np.nan)
    in_group = np.eye(proportions.shape[1]) if in_group is None else in_group
    change = in_group[None] - (proportions @ in_group.T)[:, :, None]  # samples x groups x types
    shared = np.square(change * (proportions * scale_sd)[:, None]).sum(axis=2)
    return np.sqrt(np.var(members @ in_group.T, axis=0) + shared)


def inseparable_types(members: np.ndarray) -> list[list[int]]:
    """Groups of types that the bulk hardly distinguishes: over the ensemble, what one gains the other loses.

    Two types belong together if their sum varies much less over the members than independent proportions would.
    """
    if len(members) < 2:
        return []
    deviation = members - members.mean(axis=0)
    covariance = np.einsum("msi,msj->ij", deviation, deviation) / deviation[..., 0].size
    variance = np.diag(covariance)
    independent = variance[:, None] + variance
    together = independent + 2 * covariance < INSEPARABLE**2 * independent
    np.fill_diagonal(together, False)
    _, label = connected_components(together)
    return [list(np.flatnonzero(label == group)) for group in np.unique(label) if (label == group).sum() > 1]


def merged_proportions(cells: pd.DataFrame, members: np.ndarray, scale_sd: np.ndarray) -> pd.DataFrame:
    """Sums of types that the bulk hardly distinguishes: one row per sample and group, with the proportion and its spread."""
    types, groups = list(cells.columns), inseparable_types(members)
    in_group = np.array([np.isin(np.arange(len(types)), group) for group in groups], dtype=float).reshape(
        -1, len(types)
    )
    names = [" + ".join(types[k] for k in group) for group in groups]
    index = pd.MultiIndex.from_product([cells.index, names], names=["sample", "cell_types"])
    values = cells.to_numpy()
    total = {"proportion": values @ in_group.T, "spread": spread(values, members, scale_sd, in_group)}
    return pd.DataFrame({name: table.ravel() if groups else [] for name, table in total.items()}, index)


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


def reconstruction_r(bulk: np.ndarray, reference: Reference, proportions: np.ndarray) -> np.ndarray:
    """Pearson's r of each sample with the fitted mixture of the reference, on log(1 + transcripts per 10,000)."""
    mixed = proportions @ reference.mean
    a, b = (np.log1p(values / values.sum(axis=1, keepdims=True) * 1e4) for values in (bulk, mixed))
    a, b = a - a.mean(axis=1, keepdims=True), b - b.mean(axis=1, keepdims=True)
    return (a * b).sum(axis=1) / np.maximum(np.sqrt((a**2).sum(axis=1) * (b**2).sum(axis=1)), 1e-12)


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
