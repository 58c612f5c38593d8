"""Proportions of cell types in bulk samples, estimated with a checkpoint of stage 4 and written to tables."""

from pathlib import Path
from typing import Any, Literal

import anndata as ad
import numpy as np
import pandas as pd

from lib.bulk import bulk_encoder, sctape
from lib.bulk.reference import Reference
from lib.bulk.regression import MODES, Estimate, deconvolve, to_rna
from lib.files import replacing

Method = Literal["regression", "regression-per-sample", "regression-unadapted", "sctape", "bulk_encoder"]


def methods_of(checkpoint: dict[str, Any]) -> tuple[str, ...]:
    """Values of DECONVOLUTION that a checkpoint of stage 4 serves: models/bulk_encoder.pt one, models/sctape.pt all others."""
    return ("bulk_encoder",) if "gmvae_id" in checkpoint else (*MODES, "sctape")


def estimate(checkpoint: dict[str, Any], bulk: pd.DataFrame, method: str, n_members: int, seed: int) -> Estimate:
    """Proportions of bulk samples, and what can be said about their reliability.

    Parameters
    ----------
    checkpoint
        models/sctape.pt, which holds the reference profiles and the network, or models/bulk_encoder.pt.
    bulk
        Samples x genes, TPM.
    method
        A mode of `lib.bulk.regression.deconvolve`; "sctape": the network alone; "bulk_encoder". The networks give no spread.
    n_members
        Size of the ensemble that gives the spread; 0 for none.
    """
    if method == "bulk_encoder":
        shares = bulk_encoder.predict(checkpoint, bulk)
        return Estimate(shares, shares * np.nan, pd.DataFrame({"warning": ""}, shares.index), None, None)
    coverage = checkpoint["constants"]["MIN_GENE_COVERAGE"]
    mode = "regression-unadapted" if method == "sctape" else method
    found = deconvolve(scaled_reference(checkpoint), bulk, mode, n_members, seed, coverage)
    if method == "sctape":
        network = sctape.ScTAPE.from_checkpoint(checkpoint)
        signature = pd.DataFrame(network.signature_matrix().numpy(), checkpoint["cell_types"], checkpoint["gene_names"])
        found = found._replace(
            proportions=sctape.predict(checkpoint, bulk), spread=found.spread * np.nan, signature=np.expm1(signature)
        )
    return found


def scaled_reference(checkpoint: dict[str, Any]) -> Reference:
    """The mean profiles of the train cells, per gene length if the bulk is (`USE_GENE_LENGTHS`)."""
    lengths = checkpoint["gene_length_bp"]
    return Reference.from_checkpoint(checkpoint["reference"]).per_length(
        None if lengths is None else pd.Series(lengths)
    )


def write(found: Estimate, checkpoint: dict[str, Any], shares_of: str, data: Path) -> list[Path]:
    """Write the tables of an estimate and print its proportions and warnings. shares_of: "cells" or "rna"."""
    tables = {"predicted_proportions": found.proportions}
    if found.signature is not None:
        if shares_of == "rna":
            rna_per_cell = Reference.from_checkpoint(checkpoint["reference"]).mean.sum(axis=1)
            rna = to_rna(found.proportions.to_numpy(), rna_per_cell)
            tables["predicted_proportions"] = pd.DataFrame(rna, found.proportions.index, found.proportions.columns)
        tables |= {
            "predicted_spread": found.spread,
            "predicted_samples": found.samples,
            "signature_matrix": found.signature,
        }
        _print_proportions(tables["predicted_proportions"], found.spread, shares_of)
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


def _print_proportions(shares: pd.DataFrame, spread: pd.DataFrame, shares_of: str) -> None:
    summary = shares.map("{:.3f}".format) + " +- " + spread.map("{:.3f}".format)
    print(f"proportions of {shares_of} and their spread over the ensemble:\n{summary.head(10).to_string()}")
    if len(summary) > 10:
        print(f"... and {len(summary) - 10:,} more samples")


def _write_expression(found: Estimate, path: Path) -> None:
    """Expression of each type in each sample, one row per sample and type."""
    assert found.expression is not None and found.signature is not None
    by_sample = found.proportions.rename(index=str).stack().rename_axis(["sample", "cell_type"])
    obs = by_sample.rename("proportion").reset_index()
    obs.index = obs["sample"] + ": " + obs["cell_type"]
    expression = found.expression.astype(np.float32).reshape(len(obs), -1)
    with replacing(path) as temporary:
        ad.AnnData(expression, obs=obs, var=pd.DataFrame(index=found.signature.columns)).write_h5ad(temporary)
