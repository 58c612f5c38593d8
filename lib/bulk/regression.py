"""Proportions of cell types in bulk samples of another platform: the adaptive stage of the deconvolution.

A bulk sample is modelled as y_g = f_g * sum_k x_k S_kg + noise: x_k cells of type k, S the types' mean counts per cell in the
single-cell reference (the decoder's signature matrix), and f_g what the bulk's platform sees of gene g in proportion to what
the single cells' platform sees (length, 3' bias, mapping): log f_g ~ N(0, PLATFORM_SD^2). Decoder steps (f, given x) and
encoder steps (x, given f) alternate on the unlabelled bulk, as in scTAPE's adaptive stage, until neither moves: block-wise
descent to the maximum of the posterior. Platform factors as random effects: Cable, D. M. et al., "Robust decomposition of
cell type mixtures in spatial transcriptomics", Nature Biotechnology 40, 517-526 (2022).
"""

from typing import NamedTuple

import numpy as np
import pandas as pd
import scipy.optimize

from lib.bulk.reference import TECHNICAL, Reference, signature_genes
from lib.bulk.tables import sample_totals

# Chosen on mixtures of train cells that were held out of the reference, clean and with simulated platforms; never on a bulk.
PLATFORM_SD = 1.0  # of log f: full-length TPM and UMI counts differ by a factor of 3 in a typical gene
NOISE_SHARE = 0.5  # prior standard deviation of the noise, as a share of the gene's mean over types ...
NOISE_SAMPLES = 4  # ... which weighs as much as so many samples
CELLS_PER_BULK = 1000  # noise of a mixture of finitely many cells
ROUNDS = 100  # of decoder and encoder steps, at most
MEMBER_ROUNDS = 30  # of those for each member of the ensemble: the spread has settled by then
FAR_ABOVE = 5  # times what the reference expects: that much of a gene is called unexplained
MIN_R = 0.5  # correlation with the reference below which a sample is warned about


class Fit(NamedTuple):
    """Where the alternating steps end."""

    proportions: np.ndarray  # samples x types, of cells, rows sum to 1
    amounts: np.ndarray  # samples x types: the x of the model, on the scale of `scaled`
    factors: np.ndarray  # 1 x genes, or samples x genes: f
    noise: np.ndarray  # the same shape: variance of the noise


class Estimate(NamedTuple):
    """What is told of bulk samples."""

    proportions: pd.DataFrame  # samples x types, of cells, rows sum to 1
    spread: pd.DataFrame  # samples x types: standard deviation over the ensemble
    samples: pd.DataFrame  # one row a sample: genes used, agreement with the reference, unexplained genes, warning
    signature: (
        pd.DataFrame
    )  # types x genes: counts per cell as the bulk's platform would see them (overall), or the reference's
    expression: np.ndarray | None  # samples x types x genes, in high-resolution mode


def deconvolve(
    reference: Reference,
    bulk: pd.DataFrame,
    mode: str = "overall",
    n_members: int = 10,
    seed: int = 0,
    min_coverage: float = 0.5,
) -> Estimate:
    """Everything that can be read out of bulk samples; one sample is enough.

    Parameters
    ----------
    reference
        All genes of the single cells.
    bulk
        Samples x genes, in any unit that is proportional to the number of transcripts (TPM, counts per million); genes that
        the reference lacks do no harm.
    mode
        "overall": platform factors shared by all samples; "high-resolution": factors of each sample, and its cell-type-specific
        expression; "none": no adaptation.
    n_members
        Size of the ensemble for the spread; 0 leaves the spread missing.
    min_coverage
        Share of the signature genes that the bulk must have.

    Raises
    ------
    ValueError
        If the bulk has too few of the signature's genes, or a sample none of their expression.
    """
    wanted = [reference.gene_names[g] for g in signature_genes(reference)]
    coverage = pd.Index(wanted).isin(bulk.columns).mean()
    if coverage < min_coverage:
        raise ValueError(
            f"the bulk has {coverage:.0%} of the {len(wanted):,} signature genes, expected at least {min_coverage:.0%} (its genes: "
            f"{', '.join(map(str, bulk.columns[:3]))}; the signature's: {', '.join(wanted[:3])}); are these the same species and names? (GENE_IDS)"
        )
    shared = reference.of_genes(np.flatnonzero(pd.Index(reference.gene_names).isin(bulk.columns)))
    values = bulk[shared.gene_names].to_numpy(dtype=np.float64)
    genes = signature_genes(shared)
    used, chosen = values[:, genes], shared.of_genes(genes)
    print(f"deconvolution on {len(genes):,} signature genes; the bulk has {coverage:.1%} of all that would be used")
    how = {"per_sample": mode == "high-resolution", "adaptive": mode != "none"}
    fit = adapt(used, chosen, **how)
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
    deviation = spread(used, chosen, n_members, seed, **how) if n_members else np.full(fit.proportions.shape, np.nan)
    tables = (pd.DataFrame(table, bulk.index, shared.cell_types) for table in (fit.proportions, deviation))
    samples = sample_quality(values, shared, fit.amounts, genes).set_index(bulk.index)
    return Estimate(*tables, samples, pd.DataFrame(signature, shared.cell_types, shared.gene_names), expression)


def sample_quality(values: np.ndarray, shared: Reference, amounts: np.ndarray, genes: np.ndarray) -> pd.DataFrame:
    """How much each sample looks like the reference mixed in its proportions, and which genes that leaves unexplained."""
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
    """Samples x genes, each sample scaled to the sum of the reference's mean cell, so that the amounts sum to about 1.

    Raises
    ------
    ValueError
        For a sample without expression in these genes.
    """
    return bulk / sample_totals(bulk) * reference.mean.mean(axis=0).sum()


def non_negative_least_squares(gram: np.ndarray, target: np.ndarray) -> np.ndarray:
    """min_x x'Gx / 2 - t'x over x >= 0, for many t.

    Parameters
    ----------
    gram
        1 x types x types, or one for each sample, positive definite.
    target
        Samples x types.
    """
    x = np.linalg.solve(gram, target[..., None])[..., 0]
    negative = np.flatnonzero((x < 0).any(axis=1))  # the others are at their minimum
    roots = np.linalg.cholesky(gram)
    right = np.linalg.solve(roots, target[..., None])[..., 0]
    for i in negative:
        x[i] = scipy.optimize.nnls(roots[i % len(roots)].T, right[i])[0]
    return x


def adapt(
    bulk: np.ndarray, reference: Reference, per_sample: bool = False, adaptive: bool = True, rounds: int | None = None
) -> Fit:
    """Alternate encoder and decoder steps on bulk samples.

    Parameters
    ----------
    bulk
        Samples x the reference's genes, in any unit that is proportional to the number of transcripts.
    per_sample
        Platform factors of each sample (high-resolution mode); False shares them between the samples (overall mode).
    adaptive
        False leaves all factors at 1: one weighted non-negative regression on the reference as it is.
    rounds
        None takes `ROUNDS`.
    """
    y, mean = scaled(bulk, reference), reference.mean
    gene_mean = mean.mean(axis=0)
    prior_noise = (NOISE_SHARE * gene_mean) ** 2 + reference.variance.mean(axis=0) / CELLS_PER_BULK
    n_groups, per_group = (len(y), 1) if per_sample else (1, len(y))
    factors, noise = np.ones((n_groups, y.shape[1])), np.tile(prior_noise, (n_groups, 1))
    # the first regression also weighs down the genes whose means are uncertain
    unsure = (reference.variance / np.maximum(reference.n_cells, 1)[:, None]).sum(axis=0)
    x = fit_amounts(y, mean, factors, 10 * gene_mean[None] ** 2 + unsure)
    for _ in range((rounds or ROUNDS) if adaptive else 0):
        before = x
        fitted = x @ mean
        factors = fit_platform_factors(y, fitted, factors, noise)
        squares = grouped((y - fitted * factors) ** 2, n_groups)
        residual = squares / max(per_group - 2, 1)
        noise = (per_group * residual + NOISE_SAMPLES * prior_noise) / (per_group + NOISE_SAMPLES)
        x = fit_amounts(y, mean, factors, noise)
        if np.abs(x - before).max() < 1e-5:
            break
    total = x.sum(axis=1, keepdims=True)
    proportions = np.where(total > 0, x / np.where(total > 0, total, 1), 1 / x.shape[1])
    return Fit(proportions, x, factors, noise)


def fit_amounts(y: np.ndarray, mean: np.ndarray, factors: np.ndarray, noise: np.ndarray) -> np.ndarray:
    """Amounts of the types, samples x types: weighted non-negative least squares on the signature times the factors."""
    n_types = len(mean)
    products = (mean[:, None] * mean[None]).reshape(n_types**2, -1)
    gram = (factors**2 / noise @ products.T).reshape(-1, n_types, n_types)
    gram = gram + 1e-8 * np.trace(gram, axis1=1, axis2=2)[:, None, None] * np.eye(n_types)
    return non_negative_least_squares(gram, (y * factors / noise) @ mean.T)


def fit_platform_factors(y: np.ndarray, fitted: np.ndarray, factors: np.ndarray, noise: np.ndarray) -> np.ndarray:
    """Platform factors: three Newton steps on log f, of the squared errors over the noise plus log(f)^2 over the prior's variance."""
    cross, square = grouped(y * fitted, len(factors)) / noise, grouped(fitted**2, len(factors)) / noise
    log_f = np.log(factors)
    for _ in range(3):
        f = np.exp(log_f)
        slope = f * (f * square - cross) + log_f / PLATFORM_SD**2
        curvature = np.maximum(f * (2 * f * square - cross), 0.5 * f**2 * square) + 1 / PLATFORM_SD**2
        log_f = log_f - np.clip(slope / curvature, -0.5, 0.5)
    return np.exp(log_f)


def grouped(values: np.ndarray, n_groups: int) -> np.ndarray:
    """Sums over the samples that share their factors: all of them, or none."""
    return values.sum(axis=0, keepdims=True) if n_groups == 1 else values


def spread(bulk: np.ndarray, reference: Reference, n_members: int, seed: int, **how) -> np.ndarray:
    """Standard deviation of each proportion over an ensemble, samples x types.

    Every member sees genes drawn with replacement and type means drawn from their sampling error, so the spread tells of both
    what single genes do on another platform and how few cells a type has. It cannot tell of a type that the reference lacks.
    """
    drawn = []
    error = np.sqrt(reference.variance / np.maximum(reference.n_cells, 1)[:, None])
    for member in range(n_members):
        rng = np.random.default_rng([seed, member])
        genes = rng.integers(0, bulk.shape[1], bulk.shape[1])
        mean = np.maximum(reference.mean + error * rng.standard_normal(error.shape), 0)
        drawn.append(
            adapt(
                bulk[:, genes], reference._replace(mean=mean).of_genes(genes), rounds=MEMBER_ROUNDS, **how
            ).proportions
        )
    return np.std(drawn, axis=0)


def reconstruction_r(bulk: np.ndarray, reference: Reference, proportions: np.ndarray) -> np.ndarray:
    """Pearson's r of each sample with the reference mixed in the estimated proportions, on log(1 + transcripts per 10,000)."""
    mixed = proportions @ reference.mean
    a, b = (np.log1p(values / values.sum(axis=1, keepdims=True) * 1e4) for values in (bulk, mixed))
    a, b = a - a.mean(axis=1, keepdims=True), b - b.mean(axis=1, keepdims=True)
    return (a * b).sum(axis=1) / np.maximum(np.sqrt((a**2).sum(axis=1) * (b**2).sum(axis=1)), 1e-12)


def to_rna(proportions: np.ndarray, library_size: np.ndarray) -> np.ndarray:
    """Shares of the RNA instead of the cells, rows sum to 1: each type times its mean counts per cell over all genes."""
    rna = proportions * library_size
    return rna / rna.sum(axis=1, keepdims=True)


def cell_type_expression(bulk: np.ndarray, amounts: np.ndarray, signature: np.ndarray) -> np.ndarray:
    """What each type expresses in each sample: samples x types x genes, counts per cell on the scale of the reference.

    The sample's deviation from its fit is shared out among the types as the posterior mean of normal deviations does it
    (Rahmani et al., Nature Communications 10, 3417 (2019), eq. 5), each type's standard deviation being in proportion to its
    expression: z_k = S_k + x_k S_k^2 (y - sum_j x_j S_j) / (sum_j x_j^2 S_j^2 + s^2), not below 0.

    Parameters
    ----------
    bulk
        Samples x genes.
    amounts
        Samples x types, of `adapt`.
    signature
        Types x genes, or samples x types x genes: the reference times the platform factors.
    """
    per_sample = np.broadcast_to(signature, (len(bulk), *signature.shape[-2:]))
    contribution = amounts[:, :, None] * per_sample
    fitted = contribution.sum(axis=1)
    y = bulk / bulk.sum(axis=1, keepdims=True) * fitted.sum(axis=1, keepdims=True)
    noise = (NOISE_SHARE * fitted) ** 2
    share = contribution * per_sample / (np.square(contribution).sum(axis=1) + noise + 1e-12)[:, None]
    return np.maximum(per_sample + share * (y - fitted)[:, None], 0)


def all_factors(bulk: np.ndarray, reference: Reference, amounts: np.ndarray, per_sample: bool) -> np.ndarray:
    """Platform factors of every gene, the signature's or not, given the amounts: 1 x genes, or samples x genes."""
    fitted = amounts @ reference.mean
    y = bulk / bulk.sum(axis=1, keepdims=True) * fitted.sum(axis=1, keepdims=True)
    gene_mean = reference.mean.mean(axis=0)
    noise = (NOISE_SHARE * gene_mean) ** 2 + reference.variance.mean(axis=0) / CELLS_PER_BULK + 1e-12
    n_groups = len(bulk) if per_sample else 1
    factors, noise = np.ones((n_groups, bulk.shape[1])), np.tile(noise, (n_groups, 1))
    for _ in range(5):
        factors = fit_platform_factors(y, fitted, factors, noise)
    return factors
