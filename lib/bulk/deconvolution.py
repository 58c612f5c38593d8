"""Proportions of cell types in bulk samples, by any method, how reliable they are, and the tables that hold them."""

from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import anndata as ad
import numpy as np
import pandas as pd
from scipy import stats
from scipy.sparse.csgraph import connected_components

from lib.bulk import bulk_encoder, regression, sctape
from lib.bulk.regression import Reference, fit_regression, signature_genes
from lib.bulk.rna_content import to_cells, to_rna
from lib.data.counts import write_h5ad
from lib.run import detail, replacing

Method = Literal[
    "regression", "regression-per-sample", "regression-unadapted",
    "sctape", "sctape-adapted", "sctape-per-sample", "bulk_encoder",
]  # fmt: skip
# modes of the regression: per_sample and adaptive of `fit_regression`
MODES = {"regression": (False, True), "regression-per-sample": (True, True), "regression-unadapted": (False, False)}
ADAPTATION: dict[str, sctape.Adaptation] = {
    "sctape": "none", "sctape-adapted": "overall", "sctape-per-sample": "per-sample",
}  # fmt: skip
RNA_HEADER = "sample (shares of RNA)"  # of the index column of predicted_rna_proportions.csv, to distinguish it from shares of cells
MEMBER_ROUNDS = 30  # of the fits of each member of the ensemble; more do not change the spread
PLATFORM_TYPE_SD = 0.3  # error of the log amount of a type on another platform (selected with cross_reference.py)
INTERVAL = 0.95  # probability of an interval
INSEPARABLE = 0.6  # types are merged if their sum has a spread below this share of what independent errors would give
FAR_ABOVE = 5  # a gene is called unexplained if the bulk has more than so many times what the reference predicts
MIN_R = 0.5  # samples with a lower correlation with the reference get a warning


class Estimate(NamedTuple):
    """Result for bulk samples; NaN, no columns or None for what a method does not give."""

    proportions: pd.DataFrame  # samples x types, of cells, rows sum to 1
    spread: pd.DataFrame  # samples x types: standard deviation of `proportions`
    rna_proportions: pd.DataFrame  # samples x types, of RNA, rows sum to 1
    rna_spread: pd.DataFrame  # samples x types: standard deviation of `rna_proportions`
    merged: pd.DataFrame  # sums of types that the bulk hardly distinguishes, as in `merged_proportions`
    samples: pd.DataFrame  # one row per sample, as in `sample_quality`
    signature: pd.DataFrame | None  # types x genes: counts per cell, times the mean platform factors
    expression: np.ndarray | None  # samples x types x genes, of the methods "...-per-sample"
    n_members: int = 0  # size of the ensemble that gives the spread
    states: pd.DataFrame | None = None  # of the cells, as in `bulk_encoder.predict`

    def interval(self) -> tuple[pd.DataFrame, pd.DataFrame]:
        """Lower and upper ends of the 95 % intervals of `proportions`."""
        return interval(self.proportions, self.spread, self.n_members)

    def rna_interval(self) -> tuple[pd.DataFrame, pd.DataFrame]:
        """Lower and upper ends of the 95 % intervals of `rna_proportions`."""
        return interval(self.rna_proportions, self.rna_spread, self.n_members)


class Deconvolution(NamedTuple):
    """What stage 5 knows about its bulk."""

    method: str
    checkpoint: dict[str, Any]  # of stage 4
    bulk: pd.DataFrame  # samples x genes, TPM
    estimate: Estimate
    content: pd.DataFrame | None  # `rna_content.rna_per_cell`, if shares of cells were computed from it
    bulk_file: str | None  # None: the bulk is the sum of the test cells


def methods_of(checkpoint: dict[str, Any]) -> tuple[str, ...]:
    """Values of DECONVOLUTION that a checkpoint of stage 4 serves: models/bulk_encoder.pt one, models/sctape.pt all others."""
    return ("bulk_encoder",) if "gmvae_id" in checkpoint else (*MODES, *ADAPTATION)


def estimate(
    checkpoint: dict[str, Any], bulk: pd.DataFrame, method: str, n_members: int, seed: int, content: pd.DataFrame | None = None
) -> Estimate:  # fmt: skip
    """Proportions of bulk samples, by a checkpoint of stage 4: models/sctape.pt or models/bulk_encoder.pt.

    method: a mode of `deconvolve`, whose parameters are the same; "sctape": the scTAPE network as trained, "sctape-adapted" and
    "sctape-per-sample": adapted to all samples, or to each; "bulk_encoder", which ignores `content`. The networks give no spread.
    """
    if method == "bulk_encoder":
        shares, states = bulk_encoder.predict(checkpoint, bulk)
        unknown, samples = shares * np.nan, pd.DataFrame(index=bulk.index)
        return Estimate(shares, unknown, unknown, unknown, pd.DataFrame(), samples, None, None, states=states)
    reference, coverage = scaled_reference(checkpoint), checkpoint["constants"]["MIN_GENE_COVERAGE"]
    if method in MODES:
        return deconvolve(reference, bulk, method, n_members, seed, coverage, content)
    # how well the reference explains a sample is taken from a regression
    fitted = deconvolve(reference, bulk, "regression-unadapted", 0, seed, coverage, content)
    predicted = sctape.predict(checkpoint, bulk, ADAPTATION[method])
    rna = to_rna(predicted.proportions.to_numpy(), rna_of_types(reference, content_of_mixtures(checkpoint)))
    table = partial(pd.DataFrame, index=bulk.index, columns=reference.cell_types)
    return fitted._replace(
        proportions=table(to_cells(rna, rna_of_types(reference, content))),
        rna_proportions=table(rna),
        signature=pd.DataFrame(predicted.signatures.mean(axis=0), checkpoint["cell_types"], checkpoint["gene_names"]),
        expression=predicted.signatures if method == "sctape-per-sample" else None,
    )


def nnls(checkpoint: dict[str, Any], bulk: pd.DataFrame, content: pd.DataFrame | None) -> pd.DataFrame:
    """The baseline of `regression.nnls_on_markers`, shares of cells; arguments as in `estimate`."""
    reference = scaled_reference(checkpoint)
    rna = to_rna(regression.nnls_on_markers(bulk, reference).to_numpy(), rna_of_types(reference, None))
    return pd.DataFrame(to_cells(rna, rna_of_types(reference, content)), bulk.index, reference.cell_types)


def rna_of_types(reference: Reference, content: pd.DataFrame | None) -> np.ndarray:
    """(n_types,) RNA per cell: of the table, or the counts per cell of the reference."""
    return reference.mean.sum(axis=1) if content is None else content["rna_per_cell"].to_numpy()


def content_of_mixtures(checkpoint: dict[str, Any]) -> pd.DataFrame | None:
    """mRNA per cell in the mixtures of stage 2, in the form of `rna_content.rna_per_cell`; None: the cells' own counts."""
    known = checkpoint.get("rna_per_cell")
    return None if known is None else pd.DataFrame({"rna_per_cell": known, "log_sd": 0.0}, checkpoint["cell_types"])


def scaled_reference(checkpoint: dict[str, Any]) -> Reference:
    """The mean profiles of the train cells, per gene length if the bulk is (`USE_GENE_LENGTHS`)."""
    reference, lengths = Reference.from_checkpoint(checkpoint["reference"]), checkpoint["gene_length_bp"]
    return reference if lengths is None else reference.per_length(pd.Series(lengths))


# --- the regression


def deconvolve(
    reference: Reference, bulk: pd.DataFrame, mode: str = "regression", n_members: int = 10, seed: int = 0, min_coverage: float = 0.5,
    content: pd.DataFrame | None = None,
) -> Estimate:  # fmt: skip
    """Proportions of cell types in bulk samples (samples x genes, in any unit proportional to transcripts) by the regression.

    mode: "regression": all samples share one set of platform factors; "regression-per-sample": each sample has its own, and the
    expression of each type in it is estimated as well; "regression-unadapted": all platform factors are 1. content: mRNA per cell of
    each type (`rna_content.rna_per_cell`), to turn shares of RNA into shares of cells; None: the counts per cell of the reference,
    right for a sum of such cells. n_members: of the ensemble that gives the spread. ValueError as in `signature_coverage`.
    """
    per_sample, adaptive = MODES[mode]
    coverage = signature_coverage(reference, bulk, min_coverage)
    shared = reference.of_genes(np.flatnonzero(pd.Index(reference.gene_names).isin(bulk.columns)))
    values = bulk[shared.gene_names].to_numpy(dtype=np.float64)
    genes = signature_genes(shared)
    used, of_used = values[:, genes], shared.of_genes(genes)
    detail(f"deconvolution on {len(genes):,} signature genes; the bulk has {coverage:.1%} of those of the reference")
    fit = fit_regression(used, of_used, per_sample, adaptive)
    signature = shared.mean[None]  # 1 or samples x types x genes
    if adaptive:
        factors = regression.all_factors(values, shared, fit.amounts, per_sample)
        factors[:, genes] = fit.factors
        signature = shared.mean * factors[:, None]

    by_counts = ensemble(used, of_used, n_members, seed, per_sample, adaptive)
    rna, rna_members = (to_rna(p, rna_of_types(reference, None)) for p in (fit.proportions, by_counts))
    cells, members = (to_cells(p, rna_of_types(reference, content)) for p in (rna, rna_members))
    scale_sd = rna_scale_sd = np.zeros(len(reference.cell_types))  # of cells measured by the reference's platform
    if content is not None:
        rna_scale_sd = scale_sd + PLATFORM_TYPE_SD
        scale_sd = np.hypot(rna_scale_sd, content["log_sd"].to_numpy())

    table = partial(pd.DataFrame, index=bulk.index, columns=shared.cell_types)
    return Estimate(
        table(cells),
        table(spread(cells, members, scale_sd)),
        table(rna),
        table(spread(rna, rna_members, rna_scale_sd)),
        merged_proportions(table(cells), members, scale_sd),
        sample_quality(values, shared, fit.amounts, genes).set_index(bulk.index),
        pd.DataFrame(signature.mean(axis=0), shared.cell_types, shared.gene_names),
        cell_type_expression(values, fit.amounts, signature) if per_sample else None,
        n_members,
    )


def signature_coverage(reference: Reference, bulk: pd.DataFrame, min_coverage: float) -> float:
    """Share of the signature genes that the bulk has; ValueError below `min_coverage`."""
    wanted = reference.of_genes(signature_genes(reference)).gene_names
    coverage = pd.Index(wanted).isin(bulk.columns).mean()
    if coverage < min_coverage:
        raise ValueError(
            f"the bulk has {coverage:.0%} of the {len(wanted):,} signature genes, such as {', '.join(wanted[:3])}; expected at least "
            f"{min_coverage:.0%}: are species and gene names the same (GENE_IDS)? For a panel of genes, lower MIN_GENE_COVERAGE of stage 4"
        )
    return coverage


# --- how reliable the proportions are


def ensemble(
    bulk: np.ndarray, reference: Reference, n_members: int, seed: int, per_sample: bool = False, adaptive: bool = True
) -> np.ndarray:
    """Proportions by the counts of the reference from each member of an ensemble: members x samples x types.

    Every member uses a bootstrap sample of the genes, and mean profiles with random errors as large as their sampling errors.
    """
    members = np.empty((n_members, len(bulk), len(reference.cell_types)))
    error = np.sqrt(reference.mean_variance)
    for member in range(n_members):
        rng = np.random.default_rng([seed, member])
        genes = rng.integers(0, bulk.shape[1], size=(bulk.shape[1],))
        mean = np.maximum(reference.mean + error * rng.standard_normal(error.shape), 0)
        resampled = reference._replace(mean=mean).of_genes(genes)
        members[member] = fit_regression(bulk[:, genes], resampled, per_sample, adaptive, MEMBER_ROUNDS).proportions
    return members


def spread(
    proportions: np.ndarray, members: np.ndarray, scale_sd: np.ndarray, in_group: np.ndarray | None = None
) -> np.ndarray:
    """Standard deviation of each proportion (samples x types): over the ensemble, and from errors that all samples and members share.

    A type whose amount is too large by a factor exp(e_j), in all samples, changes the proportion p_k by p_j (1[j = k] - p_k) e_j;
    scale_sd, (n_types,): standard deviation of e_j. members: members x samples x types, fewer than two give NaN; in_group: groups x
    types, 1 where the type is in the group, for sums of types.
    """
    if len(members) < 2:
        return np.full(proportions.shape, np.nan)
    in_group = np.eye(proportions.shape[1]) if in_group is None else in_group
    change = in_group[None] - (proportions @ in_group.T)[:, :, None]  # samples x groups x types
    shared = np.square(change * (proportions * scale_sd)[:, None]).sum(axis=2)
    return np.sqrt(np.var(members @ in_group.T, axis=0, ddof=1) + shared)


def interval(shares: Any, spread: Any, n_members: int) -> tuple[Any, Any]:
    """Lower and upper ends of the 95 % intervals of shares, by Student's t, within 0 and 1; NaN without a spread."""
    half = stats.t.ppf((1 + INTERVAL) / 2, n_members - 1) * spread
    return (shares - half).clip(0, 1), (shares + half).clip(0, 1)


def merged_proportions(cells: pd.DataFrame, members: np.ndarray, scale_sd: np.ndarray) -> pd.DataFrame:
    """Sums of types that the bulk hardly distinguishes, one row per sample and group of types (a tuple); low, high: 95 % interval.

    One of these types gains what the other loses: over the ensemble, the variance of their sum is far below the sum of their variances.
    """
    rows: list[tuple] = []
    if len(members) > 1:
        deviation = members - members.mean(axis=0)
        covariance = np.einsum("msi,msj->ij", deviation, deviation)
        independent = np.add.outer(np.diag(covariance), np.diag(covariance))
        together = independent + 2 * covariance < INSEPARABLE**2 * independent
        np.fill_diagonal(together, False)
        label = connected_components(together)[1]
        for in_group in (label == group for group in np.unique(label) if (label == group).sum() > 1):
            total = cells.loc[:, in_group].sum(axis=1).to_numpy()
            sd = spread(cells.to_numpy(), members, scale_sd, in_group[None].astype(float))[:, 0]
            names = [tuple(cells.columns[in_group])] * len(cells)
            rows += zip(cells.index, names, total, sd, *interval(total, sd, len(members)))
    return pd.DataFrame(rows, columns=["sample", "cell_types", "proportion", "spread", "low", "high"])


def sample_quality(values: np.ndarray, shared: Reference, amounts: np.ndarray, genes: np.ndarray) -> pd.DataFrame:
    """How well the fitted mixture of the reference explains each sample, by its values (samples x genes of `shared`).

    Columns: n_genes (used signature genes); reference_r (Pearson's r on log(1 + transcripts per 10,000) of these); is_unlike_reference
    (r below `MIN_R`); unexplained_genes (tuple of at most five names, the most unexplained one first).
    """
    fitted = amounts @ shared.mean
    a, b = (np.log1p(x[:, genes] / x[:, genes].sum(axis=1, keepdims=True) * 1e4) for x in (values, fitted))
    r = pd.DataFrame(a).corrwith(pd.DataFrame(b), axis=1).to_numpy()
    y = values * (fitted[:, genes].sum(axis=1) / values[:, genes].sum(axis=1))[:, None]
    technical = np.array([regression.TECHNICAL.match(name) is not None for name in shared.gene_names])
    above = np.where((y > FAR_ABOVE * fitted) & ~technical, y - fitted, 0)
    unexplained = [tuple(shared.gene_names[g] for g in np.argsort(-row)[:5] if row[g] > 0) for row in above]
    table = {"n_genes": len(genes), "reference_r": r, "is_unlike_reference": ~(r >= MIN_R)}
    return pd.DataFrame(table | {"unexplained_genes": unexplained})


def cell_type_expression(bulk: np.ndarray, amounts: np.ndarray, signature: np.ndarray) -> np.ndarray:
    """Expression of each type in each sample: samples x types x genes, counts per cell on the scale of the reference.

    The residual of a sample (bulk: samples x genes) is distributed among the types as the posterior mean of normal deviations, whose
    standard deviation is proportional to the expression S_k of the type (signature: 1 or samples x types x genes):
    z_k = S_k + x_k S_k^2 (y - sum_j x_j S_j) / (sum_j x_j^2 S_j^2 + s^2), at least 0. Rahmani et al., Nature Communications 10, 3417
    (2019), eq. 5.
    """
    contribution = amounts[:, :, None] * signature
    fitted = contribution.sum(axis=1)
    y = bulk / bulk.sum(axis=1, keepdims=True) * fitted.sum(axis=1, keepdims=True)
    residual_variance = (regression.RESIDUAL_SHARE * fitted) ** 2
    share = contribution * signature / (np.square(contribution).sum(axis=1) + residual_variance + 1e-12)[:, None]
    return np.maximum(signature + share * (y - fitted)[:, None], 0)


# --- the tables


def write(result: Estimate, data: Path) -> list[Path]:
    """Write the tables of an estimate and print its proportions and warnings."""
    tables = {"predicted_proportions": result.proportions}
    if result.signature is not None:
        merged = result.merged.assign(cell_types=result.merged["cell_types"].map(" + ".join))
        samples = result.samples.assign(unexplained_genes=result.samples["unexplained_genes"].map(", ".join))
        tables |= {
            "predicted_spread": result.spread,
            "predicted_rna_proportions": result.rna_proportions.rename_axis(RNA_HEADER),
            "predicted_rna_spread": result.rna_spread.rename_axis(RNA_HEADER),
            "predicted_merged": merged.set_index(["sample", "cell_types"]),
            "predicted_samples": samples,
            "signature_matrix": result.signature,
        }
        _print_estimate(result, merged, samples)
    if result.states is not None:
        tables["predicted_states"] = result.states
    for name, table in tables.items():
        with replacing(data / f"{name}.csv") as temporary:
            table.to_csv(temporary, float_format="%.6f" if name.startswith("predicted") else "%.6g")
    paths = [data / f"{name}.csv" for name in tables]
    if result.expression is not None and result.signature is not None:
        by_sample = result.proportions.rename(index=str).stack().rename_axis(["sample", "cell_type"])
        obs = by_sample.rename("proportion").reset_index()  # one row per sample and type
        obs.index = obs["sample"] + ": " + obs["cell_type"]
        expression = result.expression.astype(np.float32).reshape(len(obs), -1)
        paths.append(data / "cell_type_expression.h5ad")
        write_h5ad(ad.AnnData(expression, obs=obs, var=pd.DataFrame(index=result.signature.columns)), paths[-1])
    return paths


def _print_estimate(result: Estimate, merged: pd.DataFrame, samples: pd.DataFrame) -> None:
    shown, deviation = result.proportions.map("{:.3f}".format), ""
    if result.n_members > 1:
        shown, deviation = shown + " +- " + result.spread.map("{:.3f}".format), " (+- standard deviation)"
    print(f"proportions of cells{deviation}:\n{shown.to_string(max_rows=10)}")
    for names, total in merged.groupby("cell_types")[["proportion", "low", "high"]].mean().iterrows():
        print(
            f"the bulk hardly distinguishes {names}: more certain is their sum, on average {total['proportion']:.3f} "
            f"(95 % interval {total['low']:.3f} to {total['high']:.3f}; predicted_merged.csv)"
        )
    for sample, row in samples[samples["is_unlike_reference"]].iterrows():
        print(
            f"WARNING: {sample} is unlike the reference (r = {row['reference_r']:.2f}; unexplained: {row['unexplained_genes']}): "
            "another tissue, a type that the reference lacks, or other units?"
        )
