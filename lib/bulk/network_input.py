"""The input of the two networks, scTAPE and the bulk encoder: its scale, missing genes, and the selection of genes for scTAPE."""

from collections.abc import Callable, Iterator
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd

from lib.bulk.pseudobulk import gene_lengths, is_for_fit, tpm
from lib.bulk.tables import sample_totals

# rows and counts of the training mixtures, block by block, of some genes (None: all): `pseudobulk.train_mixtures`
Blocks = Callable[[np.ndarray | None], Iterator[tuple[slice, np.ndarray]]]


def scale(tpm: np.ndarray, minmax: bool = False) -> np.ndarray:
    """The network's input: log(1 + transcripts per 10,000 of the network's genes).

    minmax: as in the original, log(1 + TPM), scaled to 0..1 within each sample. With transcripts per million, genes with a few
    counts weigh as much as genes with thousands, which costs a third of the accuracy on held-out cells of pbmc3k's train part.

    Parameters
    ----------
    tpm
        Samples x the network's genes, non-negative, in any unit proportional to the number of transcripts. The total is taken
        over these genes alone, so training mixtures and bulk are on one scale whatever other genes the bulk has.

    Returns
    -------
    float32, same shape.

    Raises
    ------
    ValueError
        If a sample has no expression in these genes.
    """
    logs = np.log1p(tpm / sample_totals(tpm) * (1e6 if minmax else 1e4))
    if minmax:
        low = logs.min(axis=1, keepdims=True)
        logs = (logs - low) / (logs.max(axis=1, keepdims=True) - low)
    return logs.astype(np.float32)


def complete(bulk: pd.DataFrame, gene_names: list[str], mean_profile: np.ndarray) -> np.ndarray:
    """Values of the network's genes in the bulk; a gene that the bulk lacks gets its mean share in the training mixtures.

    Parameters
    ----------
    bulk
        Samples x genes, TPM.
    gene_names, mean_profile
        The network's genes, and their mean share of a training mixture, in the same order.

    Returns
    -------
    Samples x the network's genes.
    """
    values = bulk.reindex(columns=gene_names).to_numpy(dtype=np.float64)
    missing = ~np.isin(gene_names, bulk.columns)
    if missing.any():
        share = mean_profile[missing] / mean_profile[~missing].sum()
        values[:, missing] = values[:, ~missing].sum(axis=1, keepdims=True) * share
    return values


def check_coverage(checkpoint: dict[str, Any], bulk: pd.DataFrame, network: str, command: str) -> float:
    """Share of the network's genes that the bulk has.

    Parameters
    ----------
    network, command
        Name of the network, and the command that trains it for the genes of a bulk; for the message.

    Raises
    ------
    ValueError
        If the share is below MIN_GENE_COVERAGE of stage 4.
    """
    gene_names = checkpoint["gene_names"]
    coverage = np.isin(gene_names, bulk.columns).mean()
    least = checkpoint["constants"]["MIN_GENE_COVERAGE"]
    if coverage < least:
        raise ValueError(
            f"the bulk has {coverage:.0%} of the {len(gene_names):,} genes that {network} was trained on, expected at least {least:.0%} "
            f"(the bulk's genes: {', '.join(map(str, bulk.columns[:3]))}; the network's: {', '.join(gene_names[:3])}); "
            f"train on the bulk's genes: {command}"
        )
    return coverage


def select_genes(mixtures: ad.AnnData, blocks: Blocks, usable: np.ndarray, n_genes: int) -> np.ndarray:
    """Select the genes whose expression the proportions explain best; returns their positions, ascending.

    For each gene, a linear regression on the proportions explains a part of its variance over the mixtures to train on, on the
    scale of `scale`. Genes are ranked by explained variance x R^2. Genes that vary at random, and genes that all types express
    alike, come last.

    Parameters
    ----------
    mixtures, blocks
        As `pseudobulk.read_train_mixtures` gives them, and their counts.
    usable
        Mask of the genes to select from.
    n_genes
        Number of genes, at most.

    Raises
    ------
    ValueError
        If fewer genes than cell types are left.
    """
    is_fit, proportions = is_for_fit(mixtures), mixtures.obsm["proportions"]
    lengths = gene_lengths(mixtures, usable)
    gram, cross, squares, total = 0.0, 0.0, 0.0, 0.0
    for rows, counts in blocks(None):
        p = proportions[rows][is_fit[rows]]
        logs = scale(tpm(counts[is_fit[rows]][:, usable], lengths)).astype(np.float64)
        gram, cross = gram + p.T @ p, cross + p.T @ logs
        squares, total = squares + np.square(logs).sum(axis=0), total + logs.sum(axis=0)
    n = is_fit.sum()
    variance = squares / n - (total / n) ** 2
    coefficients = np.linalg.lstsq(gram, cross, rcond=None)[0]
    explained = (coefficients * cross).sum(axis=0) / n - (total / n) ** 2
    score = np.where(variance > 1e-12, explained**2 / np.maximum(variance, 1e-12), 0)  # explained variance x R^2
    n_genes = min(n_genes, int(np.sum(score > 0)))
    if n_genes < proportions.shape[1]:
        raise ValueError(
            f"{n_genes} genes are left to predict the proportions of {proportions.shape[1]} cell types from; expected at least "
            "one gene per type: raise N_GENES, or give a bulk with more of these genes"
        )
    return np.sort(np.flatnonzero(usable)[np.argsort(-score, kind="stable")[:n_genes]])


def most_variable_genes(mixtures: ad.AnnData, blocks: Blocks, usable: np.ndarray, share: float) -> np.ndarray:
    """Select this share of the usable genes, those whose TPM vary most over the mixtures to train on (published); ascending.

    The original also asks that the genes vary as much in the bulk to be predicted, which was made of the test cells.
    """
    is_fit, lengths = is_for_fit(mixtures), gene_lengths(mixtures, usable)
    squares, total = np.zeros(usable.sum()), np.zeros(usable.sum())
    for rows, counts in blocks(None):
        values = tpm(counts[is_fit[rows]][:, usable], lengths)
        squares, total = squares + np.square(values).sum(axis=0), total + values.sum(axis=0)
    variance = squares / is_fit.sum() - (total / is_fit.sum()) ** 2
    return np.sort(np.flatnonzero(usable)[np.argsort(-variance, kind="stable")[: int(share * len(variance))]])


def read_profiles(
    mixtures: ad.AnnData, blocks: Blocks, genes: np.ndarray, minmax: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """The network's input for all mixtures, (n_mixtures, n_genes), and each gene's mean share of a mixture to train on."""
    is_fit, lengths = is_for_fit(mixtures), gene_lengths(mixtures, genes)
    profiles = np.empty((mixtures.n_obs, len(genes)), np.float32)
    share = np.zeros(len(genes))
    for rows, counts in blocks(genes):
        values = tpm(counts, lengths)
        profiles[rows] = scale(values, minmax)
        share += values[is_fit[rows]].sum(axis=0)
    return profiles, share / share.sum()
