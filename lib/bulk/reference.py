"""Reference of the deconvolution: mean counts of each cell type, their variance, and the genes that distinguish the types."""

import re
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import scipy.optimize
import scipy.sparse as sp
import torch
from anndata.abc import CSRDataset

from lib.data.counts import row_blocks
from lib.models.profiles import log_fold_changes, top_genes

# Selected on mixtures of held-out train cells, with and without simulated platform factors; never on a real bulk.
MIN_Z = 5.0  # of signature genes: difference between one type and the others, in standard errors
MIN_FOLD = 3.0  # of signature genes: the same difference as a ratio; smaller ones are not reproduced by another platform or donor
FOLD_OFFSET = 1e-5  # added to both sides of the ratio, as a share of the mean cell's counts
MIN_PER_TYPE = 20  # genes of largest ratio that each type has in any case, if their z is large enough
MAX_GENES = 3000  # signature genes at most: those with the largest z
N_MARKERS = 50  # of each type, for the NNLS baseline
# Genes whose share differs between platforms more than between cell types: ribosomal, mitochondrial, nuclear non-coding
TECHNICAL = re.compile(r"^(MT-|MRP[LS]\d|RP[LS](?!6K)|MALAT1$|NEAT1$|XIST$)", re.IGNORECASE)


class Reference(NamedTuple):
    """Profiles of the cell types."""

    gene_names: list[str]
    cell_types: list[str]
    mean: np.ndarray  # types x genes: counts per cell
    variance: np.ndarray  # types x genes: variance of counts between the cells of a type
    n_cells: np.ndarray  # (n_types,)

    def of_genes(self, genes: np.ndarray) -> "Reference":
        """The reference with some of its genes, given by their indices."""
        return self._replace(
            gene_names=[self.gene_names[g] for g in genes], mean=self.mean[:, genes], variance=self.variance[:, genes]
        )

    def per_length(self, gene_length_bp: pd.Series | None) -> "Reference":
        """Counts per base pair instead of counts, for TPM by gene length. Genes without a length are removed. None changes nothing."""
        if gene_length_bp is None:
            return self
        known = self.of_genes(np.flatnonzero(pd.Index(self.gene_names).isin(gene_length_bp.index)))
        per_bp = 1 / gene_length_bp[known.gene_names].to_numpy(dtype=np.float64)
        per_bp *= known.mean.sum() / (known.mean * per_bp).sum()  # on the scale of counts
        return known._replace(mean=known.mean * per_bp, variance=known.variance * per_bp**2)

    def to_checkpoint(self) -> dict[str, Any]:
        """As tensors and builtins, for a checkpoint."""
        arrays = {name: torch.from_numpy(np.asarray(getattr(self, name), np.float32)) for name in ("mean", "variance")}
        return self._asdict() | arrays | {"n_cells": torch.from_numpy(self.n_cells)}

    @staticmethod
    def from_checkpoint(saved: dict[str, Any]) -> "Reference":
        return Reference(
            **saved | {name: saved[name].numpy().astype(np.float64) for name in ("mean", "variance", "n_cells")}
        )


def reference_profiles(
    counts: sp.csr_matrix | CSRDataset, cell_type_idx: np.ndarray, gene_names: list[str], cell_types: list[str]
) -> Reference:
    """Mean and variance of the counts of each type, read in blocks. Cells of unknown type (-1) are ignored.

    Parameters
    ----------
    counts
        Cells x genes, raw, in memory or on disk.
    """
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
    scale = total.mean() / np.maximum(total, 1e-12)
    return reference._replace(mean=reference.mean * scale, variance=reference.variance * scale**2)


def signature_genes(reference: Reference, usable: np.ndarray | None = None) -> np.ndarray:
    """Indices of the genes that distinguish the types beyond the sampling error of the reference, without technical genes.

    All types are scaled to the same total counts first. z of a gene and type: mean counts in the type minus the mean over the
    other types, in standard errors; fold: their ratio, in either direction. A gene is used if a type has |z| >= `MIN_Z` and
    fold >= `MIN_FOLD`, or if it is among the `MIN_PER_TYPE` largest folds of a type with |z| >= `MIN_Z`. Sampling errors of genes
    below `MIN_Z` would bias all estimates towards each other (errors in variables).
    """
    reference = equal_totals(reference)
    mean, n_types = reference.mean, len(reference.cell_types)
    error = reference.variance / np.maximum(reference.n_cells, 1)[:, None]
    others = (mean.sum(axis=0) - mean) / (n_types - 1)
    others_error = (error.sum(axis=0) - error) / (n_types - 1) ** 2
    z = np.abs(mean - others) / np.sqrt(error + others_error + 1e-12)
    offset = FOLD_OFFSET * mean.sum(axis=1).mean()
    log_fold = np.abs(np.log((mean + offset) / (others + offset)))
    use = np.array([not TECHNICAL.match(name) for name in reference.gene_names])
    use &= mean.mean(axis=0) > 1e-3
    if usable is not None:
        use &= usable
    best_of_type = np.argsort(-np.where(use & (z >= MIN_Z), log_fold, 0), axis=1, kind="stable")[:, :MIN_PER_TYPE]
    is_clear = log_fold >= np.log(MIN_FOLD)
    np.put_along_axis(is_clear, best_of_type, True, axis=1)
    z = np.where(use, np.where(is_clear, z, 0).max(axis=0), 0)
    least = min(MIN_Z, np.sort(z)[::-1][: 10 * n_types][-1])  # with few cells: ten genes per type
    chosen = np.flatnonzero((z >= least) & (z > 0))
    return np.sort(chosen[np.argsort(-z[chosen], kind="stable")[:MAX_GENES]])


def marker_genes(reference: Reference) -> np.ndarray:
    """Indices of the `N_MARKERS` genes of each type with the largest fold change over the mean of the other types."""
    share = reference.mean / reference.mean.sum(axis=1, keepdims=True) * 1e4
    return np.unique(top_genes(log_fold_changes(share), N_MARKERS))


def nnls_on_markers(bulk: pd.DataFrame, reference: Reference) -> pd.DataFrame:
    """Baseline: non-negative least squares on marker genes of the reference; samples x types, rows sum to 1."""
    genes = marker_genes(reference)
    shared = pd.Index(reference.gene_names)[genes].isin(bulk.columns)
    markers = reference.of_genes(genes[shared])
    y = bulk[markers.gene_names].to_numpy(dtype=np.float64)
    y = y / np.maximum(y.sum(axis=1, keepdims=True), 1e-12)
    x = np.array([scipy.optimize.nnls(markers.mean.T, sample)[0] for sample in y])
    return pd.DataFrame(x / np.maximum(x.sum(axis=1, keepdims=True), 1e-12), bulk.index, reference.cell_types)
