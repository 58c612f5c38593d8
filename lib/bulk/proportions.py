"""Proportions of the cell types of a bulk, with any checkpoint of stage 4: read, written, and judged on mixtures of test cells."""

from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd

from lib.bulk import bulk_encoder, sctape
from lib.bulk.pseudobulk import read_test_mixtures
from lib.bulk.reference import Reference, nnls_on_markers, signature_genes
from lib.bulk.regression import Estimate, deconvolve, to_rna
from lib.evaluation import metrics, plots_bulk
from lib.files import replacing


def estimate(checkpoint: dict[str, Any], bulk: pd.DataFrame, mode: str, n_members: int, seed: int) -> Estimate:
    """What a checkpoint of stage 4 reads out of a bulk.

    Parameters
    ----------
    checkpoint
        models/sctape.pt or models/bulk_encoder.pt.
    bulk
        Samples x genes, TPM.
    mode
        Of `deconvolution.deconvolve`, or "network": scTAPE's own. The bulk encoder has but one, and no spread.
    n_members
        Of the ensemble that gives the spread.
    """
    if is_bulk_encoder(checkpoint):
        shares = bulk_encoder.predict(checkpoint, bulk)
        return Estimate(shares, shares * np.nan, pd.DataFrame({"warning": ""}, shares.index), None, None)
    reference, least = scaled_reference(checkpoint), checkpoint["constants"]["MIN_GENE_COVERAGE"]
    found = deconvolve(reference, bulk, "none" if mode == "network" else mode, n_members, seed, least)
    if mode == "network":
        network = sctape.ScTAPE.from_checkpoint(checkpoint)
        signature = pd.DataFrame(network.signature_matrix().numpy(), checkpoint["cell_types"], checkpoint["gene_names"])
        found = found._replace(
            proportions=sctape.predict(checkpoint, bulk), spread=found.spread * np.nan, signature=np.expm1(signature)
        )
    return found


def is_bulk_encoder(checkpoint: dict[str, Any]) -> bool:
    return "gmvae_id" in checkpoint


def scaled_reference(checkpoint: dict[str, Any]) -> Reference:
    """The train cells' profiles in the units of a bulk."""
    if "reference" not in checkpoint:
        raise ValueError(
            "models/sctape.pt is of an older version: it holds no reference profiles; run _4_train_sctape.py again"
        )
    lengths = checkpoint["gene_length_bp"]
    return Reference.from_checkpoint(checkpoint["reference"]).per_length(
        None if lengths is None else pd.Series(lengths)
    )


def write(found: Estimate, checkpoint: dict[str, Any], shares_of: str, data: Path) -> list[Path]:
    """The tables of an estimate, as far as it holds them; says which samples to trust less. shares_of: "cells" or "rna"."""
    shares = found.proportions
    if not is_bulk_encoder(checkpoint):
        if shares_of == "rna":
            rna_per_cell = Reference.from_checkpoint(checkpoint["reference"]).mean.sum(axis=1)
            shares = pd.DataFrame(to_rna(shares.to_numpy(), rna_per_cell), shares.index, shares.columns)
        summary = shares.map("{:.3f}".format) + " +- " + found.spread.map("{:.3f}".format)
        print(f"proportions of {shares_of} and their spread over the ensemble:")
        print(
            summary.head(10).to_string()
            + ("" if len(summary) <= 10 else f"\n... and {len(summary) - 10:,} more samples")
        )
    for sample, row in found.samples[found.samples["warning"] != ""].iterrows():
        print(
            f"WARNING: {sample}: {row['warning']} (r = {row['reference_r']:.2f}; unexplained: {row['unexplained_genes']}): "
            "another tissue, a type that the reference lacks, or other units?"
        )
    tables = {"predicted_proportions": shares}
    if not is_bulk_encoder(checkpoint):
        tables |= {
            "predicted_spread": found.spread,
            "predicted_samples": found.samples,
            "signature_matrix": found.signature,
        }
    paths = []
    for name, table in tables.items():
        paths.append(data / f"{name}.csv")
        with replacing(paths[-1]) as temporary:
            table.to_csv(temporary, float_format="%.6f" if name.startswith("predicted") else "%.6g")
    if found.expression is not None:
        obs = (
            found.proportions.rename(index=str)
            .stack()
            .rename_axis(["sample", "cell_type"])
            .rename("proportion")
            .reset_index()
        )
        obs.index = obs["sample"] + ": " + obs["cell_type"]
        expression = found.expression.astype(np.float32).reshape(len(obs), -1)
        cells = ad.AnnData(expression, obs=obs, var=pd.DataFrame(index=found.signature.columns))
        paths.append(data / "cell_type_expression.h5ad")
        with replacing(paths[-1]) as temporary:
            cells.write_h5ad(temporary)
    return paths


def judge(
    checkpoint: dict[str, Any], found: Estimate, mode: str, seed: int, train: ad.AnnData, test: ad.AnnData, is_of_test_cells: bool,
    data: Path, fig: Path,
) -> list[Path]:  # fmt: skip
    """The deconvolution on the mixtures of test cells, beside baselines: what its proportions can be trusted for.

    found, mode: the estimate of the bulk at hand and how it was made; is_of_test_cells: that bulk is the sum of the test cells.
    """
    tpm, true = read_test_mixtures(data, test.uns["split_id"], checkpoint["gene_length_bp"] is not None)
    frequencies = train.obs["cell_type"].value_counts(normalize=True)[true.columns].to_numpy()
    constant = pd.DataFrame(np.tile(frequencies, (len(true), 1)), true.index, true.columns)
    others = {"constant: train frequencies": constant}
    modes = ("bulk_encoder",)
    if not is_bulk_encoder(checkpoint):
        modes = ("overall", "high-resolution", "none", "network")
        others["NNLS on markers"] = nnls_on_markers(tpm, scaled_reference(checkpoint))
    estimates = {name: estimate(checkpoint, tpm, name, 0, seed).proportions for name in modes}
    rows = []
    for kind in ("own", "dirichlet"):
        of_kind = true.index.str.startswith(kind)
        for name, table in (estimates | others).items():
            pair = true[of_kind].to_numpy(), table[of_kind].to_numpy()
            rows.append(
                [f"{kind} ({of_kind.sum()})", name, metrics.mae(*pair), metrics.ccc(*pair), metrics.pearson(*pair)]
            )
    table = pd.DataFrame(rows, columns=["mixtures of test cells", "deconvolution", "MAE", "CCC", "r"])
    print(table.to_string(index=False, float_format="{:.4f}".format))
    own_truth = None
    if is_of_test_cells:
        own_truth = test.obs["cell_type"].value_counts(normalize=True)[true.columns].to_frame("test_cells").T
        errors = metrics.mae(own_truth, found.proportions), metrics.mae(own_truth, frequencies)
        print(
            "all test cells as one bulk: MAE {:.4f}; the train frequencies score {:.4f}, so this one mixture says little".format(
                *errors
            )
        )
    random = ~true.index.str.startswith("own")
    plotted = estimates[mode if mode in modes else modes[0]][random]
    plots_bulk.proportions(
        true[random],
        plotted,
        metrics.proportion_agreement(true[random], plotted),
        metrics.mae(true[random], constant[random]),
        own_truth,
        found.proportions,
        found.spread,
        fig / "proportions.png",
    )
    if is_bulk_encoder(checkpoint):
        return [fig / "proportions.png"]
    reference = Reference.from_checkpoint(checkpoint["reference"])
    reference = reference.of_genes(signature_genes(reference))
    plots_bulk.signature(
        pd.DataFrame(reference.mean, reference.cell_types, reference.gene_names), found.signature, fig / "signature.png"
    )
    return [fig / "proportions.png", fig / "signature.png"]
