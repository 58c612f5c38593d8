"""Proportions of cell types in bulk samples, estimated with a checkpoint of stage 4 and written to tables."""

from pathlib import Path
from typing import Any, Literal

import anndata as ad
import numpy as np
import pandas as pd

from lib.bulk import bulk_encoder, sctape
from lib.bulk.deconvolution import MODES, Estimate, deconvolve
from lib.bulk.reference import Reference, nnls_on_markers
from lib.bulk.rna_content import to_cells, to_rna
from lib.data.hdf5 import write_h5ad
from lib.files import replacing

Method = Literal[
    "regression", "regression-per-sample", "regression-unadapted", "sctape", "sctape-adapted", "sctape-per-sample", "bulk_encoder"
]  # fmt: skip
ADAPTATION: dict[str, sctape.Adaptation] = {
    "sctape": "none", "sctape-adapted": "overall", "sctape-per-sample": "per-sample",
}  # fmt: skip

RNA_HEADER = "sample (shares of RNA)"  # of the index column of predicted_rna_proportions.csv, to distinguish it from shares of cells


def methods_of(checkpoint: dict[str, Any]) -> tuple[str, ...]:
    """Values of DECONVOLUTION that a checkpoint of stage 4 serves: models/bulk_encoder.pt one, models/sctape.pt all others."""
    return ("bulk_encoder",) if "gmvae_id" in checkpoint else (*MODES, *ADAPTATION)


def estimate(
    checkpoint: dict[str, Any],
    bulk: pd.DataFrame,
    method: str,
    n_members: int,
    seed: int,
    content: pd.DataFrame | None = None,
) -> Estimate:
    """Proportions of bulk samples, and what can be said about their reliability.

    Parameters
    ----------
    checkpoint
        models/sctape.pt, which holds the reference profiles and the network, or models/bulk_encoder.pt.
    bulk
        Samples x genes, TPM.
    method
        A mode of `lib.bulk.deconvolution.deconvolve`; "sctape": the scTAPE network as trained, "sctape-adapted" and
        "sctape-per-sample": adapted to all samples, or to each; "bulk_encoder". The networks give no spread.
    n_members
        Size of the ensemble that gives the spread; 0 for none.
    content
        mRNA per cell of the types (`rna_content.rna_per_cell`); None for sums of cells like the train cells, which have the RNA of
        their counts. The bulk encoder ignores it.
    """
    if method == "bulk_encoder":
        shares = bulk_encoder.predict(checkpoint, bulk)
        unknown, samples = shares * np.nan, pd.DataFrame({"warning": ""}, shares.index)
        return Estimate(shares, unknown, unknown, unknown, pd.DataFrame(), samples, None, None)
    reference, coverage = scaled_reference(checkpoint), checkpoint["constants"]["MIN_GENE_COVERAGE"]
    if method in MODES:
        return deconvolve(reference, bulk, method, n_members, seed, coverage, content)
    fitted = deconvolve(reference, bulk, "regression-unadapted", 0, seed, coverage, content)
    return _by_network(checkpoint, bulk, ADAPTATION[method], fitted, reference, content)


def _by_network(
    checkpoint: dict[str, Any], bulk: pd.DataFrame, adaptation: sctape.Adaptation, fitted: Estimate, reference: Reference,
    content: pd.DataFrame | None,
) -> Estimate:  # fmt: skip
    """Estimate of the scTAPE network; how well the reference explains a sample is taken from `fitted`, a regression."""
    predicted = sctape.predict(checkpoint, bulk, adaptation)
    rna = to_rna(predicted.proportions.to_numpy(), _rna_per_cell(reference, content_of_mixtures(checkpoint)))
    cells = to_cells(rna, _rna_per_cell(reference, content))
    return fitted._replace(
        proportions=pd.DataFrame(cells, bulk.index, reference.cell_types),
        rna_proportions=pd.DataFrame(rna, bulk.index, reference.cell_types),
        signature=pd.DataFrame(predicted.signatures.mean(axis=0), checkpoint["cell_types"], checkpoint["gene_names"]),
        expression=predicted.signatures if adaptation == "per-sample" else None,
    )


def nnls(checkpoint: dict[str, Any], bulk: pd.DataFrame, content: pd.DataFrame | None) -> pd.DataFrame:
    """The baseline of `reference.nnls_on_markers`, shares of cells; arguments as in `estimate`."""
    reference = scaled_reference(checkpoint)
    rna = to_rna(nnls_on_markers(bulk, reference).to_numpy(), _rna_per_cell(reference, None))
    return pd.DataFrame(to_cells(rna, _rna_per_cell(reference, content)), bulk.index, reference.cell_types)


def _rna_per_cell(reference: Reference, content: pd.DataFrame | None) -> np.ndarray:
    """(n_types,) RNA per cell: of the table, or the counts per cell of the reference."""
    return reference.mean.sum(axis=1) if content is None else content["rna_per_cell"].to_numpy()


def content_of_mixtures(checkpoint: dict[str, Any]) -> pd.DataFrame | None:
    """mRNA per cell in the mixtures of stage 2, in the form of `rna_content.rna_per_cell`; None: the cells' own counts."""
    known = checkpoint.get("rna_per_cell")
    return None if known is None else pd.DataFrame({"rna_per_cell": known, "log_sd": 0.0}, checkpoint["cell_types"])


def scaled_reference(checkpoint: dict[str, Any]) -> Reference:
    """The mean profiles of the train cells, per gene length if the bulk is (`USE_GENE_LENGTHS`)."""
    lengths = checkpoint["gene_length_bp"]
    return Reference.from_checkpoint(checkpoint["reference"]).per_length(
        None if lengths is None else pd.Series(lengths)
    )


def write(found: Estimate, data: Path) -> list[Path]:
    """Write the tables of an estimate and print its proportions and warnings."""
    tables = {"predicted_proportions": found.proportions}
    if found.signature is not None:
        tables |= {
            "predicted_spread": found.spread,
            "predicted_rna_proportions": found.rna_proportions.rename_axis(RNA_HEADER),
            "predicted_rna_spread": found.rna_spread.rename_axis(RNA_HEADER),
            "predicted_merged": found.merged,
            "predicted_samples": found.samples,
            "signature_matrix": found.signature,
        }
        _print_proportions(found.proportions, found.spread)
        _print_merged(found.merged)
    for sample, row in found.samples[found.samples["warning"] != ""].iterrows():
        print(
            f"WARNING: {sample}: {row['warning']} (r = {row['reference_r']:.2f}; unexplained: {row['unexplained_genes']}): "
            "another tissue, a type that the reference lacks, or other units?"
        )
    paths = []
    for name, table in tables.items():
        paths.append(data / f"{name}.csv")
        with replacing(paths[-1]) as temporary:
            table.to_csv(temporary, float_format="%.6f" if name.startswith("predicted") else "%.6g")
    if found.expression is not None:
        paths.append(data / "cell_type_expression.h5ad")
        _write_expression(found, paths[-1])
    return paths


def _print_merged(merged: pd.DataFrame) -> None:
    """Types that the bulk hardly distinguishes, with the mean over the samples of their sum."""
    for names, rows in merged.groupby("cell_types"):
        print(
            f"the bulk hardly distinguishes {names}: more certain is their sum, on average {rows['proportion'].mean():.3f} "
            f"+- {rows['spread'].mean():.3f} (predicted_merged.csv)"
        )


def _print_proportions(shares: pd.DataFrame, spread: pd.DataFrame) -> None:
    summary = shares.map("{:.3f}".format) + " +- " + spread.map("{:.3f}".format)
    print(f"proportions of cells and their spread (standard deviation):\n{summary.head(10).to_string()}")
    if len(summary) > 10:
        print(f"... and {len(summary) - 10:,} more samples")


def _write_expression(found: Estimate, path: Path) -> None:
    """Expression of each type in each sample, one row per sample and type."""
    assert found.expression is not None and found.signature is not None
    by_sample = found.proportions.rename(index=str).stack().rename_axis(["sample", "cell_type"])
    obs = by_sample.rename("proportion").reset_index()
    obs.index = obs["sample"] + ": " + obs["cell_type"]
    expression = found.expression.astype(np.float32).reshape(len(obs), -1)
    write_h5ad(ad.AnnData(expression, obs=obs, var=pd.DataFrame(index=found.signature.columns)), path)
