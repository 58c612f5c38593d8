"""Statistics of one set of cells: of single genes, pairs of genes, cell types, cells.

Cells are AnnData, cells x genes, raw counts (csr) in memory, with obs["cell_type"].
"""

from typing import NamedTuple

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp
from scipy.cluster.hierarchy import linkage
from scipy.spatial.distance import squareform

from lib.data.counts import log_normalize
from lib.models import profiles


def gene_statistics(cells: ad.AnnData) -> pd.DataFrame:
    """Genes x (mean, variance, zeros): of log(1 + counts per 10,000); zeros: share of cells without a count."""
    values = log_normalize(cells.X, 1e4).astype(np.float64)
    mean = np.asarray(values.mean(axis=0)).ravel()
    variance = np.asarray(values.power(2).mean(axis=0)).ravel() - mean**2
    zeros = 1 - values.getnnz(axis=0) / cells.n_obs
    return pd.DataFrame({"mean": mean, "variance": variance, "zeros": zeros}, index=cells.var_names)


def gene_correlation(cells: ad.AnnData, genes: np.ndarray) -> np.ndarray:
    """Pearson's r between genes, over cells, of log(1 + counts per 10,000): genes x genes; 0 where a gene does not vary."""
    values = log_normalize(cells.X, 1e4)[:, genes].toarray()
    values -= values.mean(axis=0)
    norm = np.linalg.norm(values, axis=0)
    values /= np.where(norm > 0, norm, 1)
    return values.T @ values


def cluster_tree(correlation: np.ndarray) -> np.ndarray:
    """Linkage (scipy) of the genes that puts correlated genes next to each other: average linkage on 1 - r."""
    distance = np.clip(1 - correlation, 0, 2)
    np.fill_diagonal(distance, 0)
    return linkage(squareform(distance, checks=False), method="average", optimal_ordering=True)


def log_fold_changes(cells: ad.AnnData) -> pd.DataFrame:
    """Genes x types: log2 of the mean counts per 10,000 in the type over the mean in all other cells (+ 0.1 on both sides).

    Types without cells are left out.
    """
    per_10k = sp.diags_array(1e4 / np.maximum(np.asarray(cells.X.sum(axis=1)).ravel(), 1)) @ cells.X
    types = [name for name in cells.obs["cell_type"].cat.categories if (cells.obs["cell_type"] == name).any()]
    if len(types) < 2:
        return pd.DataFrame(index=cells.var_names)
    masks = [(cells.obs["cell_type"] == name).to_numpy() for name in types]
    means = np.array([np.asarray(per_10k[mask].mean(axis=0)).ravel() for mask in masks], dtype=np.float64)
    changes = profiles.log_fold_changes(means, np.sum(masks, axis=1))
    return pd.DataFrame(changes.T, index=cells.var_names, columns=types)


def mean_expression(cells: ad.AnnData, genes: np.ndarray) -> pd.DataFrame:
    """Types x genes: mean log(1 + counts per 10,000); NaN for a type without cells."""
    values = log_normalize(cells.X, 1e4)[:, genes]
    table = {}
    for name in cells.obs["cell_type"].cat.categories:
        mask = (cells.obs["cell_type"] == name).to_numpy()
        table[name] = np.asarray(values[mask].mean(axis=0)).ravel() if mask.any() else np.full(values.shape[1], np.nan)
    return pd.DataFrame.from_dict(table, orient="index")


def type_proportions(sets: dict[str, pd.DataFrame], max_samples: int = 20) -> pd.DataFrame:
    """Proportions of the cell types: one row per set of cells, or one per sample of a set that has several.

    Parameters
    ----------
    sets
        Name -> table of cells (obs) with `cell_type`, and `sample` if there are samples.
    max_samples
        Of each set: the first ones.
    """
    types = next(iter(sets.values()))["cell_type"].cat.categories
    rows = {}
    for name, obs in sets.items():
        sample = obs["sample"].astype(str) if "sample" in obs else pd.Series("", index=obs.index)
        for one in pd.unique(sample)[:max_samples]:
            row = obs["cell_type"][sample == one].value_counts(normalize=True).reindex(types, fill_value=0.0)
            rows[name if sample.nunique() == 1 else f"{name}, {one}"] = row.to_numpy()
    return pd.DataFrame(rows, index=types).T


def library_and_genes(cells: ad.AnnData) -> tuple[np.ndarray, np.ndarray]:
    """Library size (counts) and number of genes detected of each cell."""
    return np.asarray(cells.X.sum(axis=1)).ravel(), np.diff(cells.X.indptr)


class CellStatistics(NamedTuple):
    """What `plots_cells.fidelity` plots of one set of cells."""

    library_size: np.ndarray  # (n_cells,) counts
    n_genes: np.ndarray  # (n_cells,) genes detected
    genes: pd.DataFrame  # genes x (mean, variance, zeros), from `gene_statistics`
    fold_changes: pd.DataFrame  # genes x types, log2, from `log_fold_changes`


def summarise(cells: ad.AnnData) -> CellStatistics:
    """The statistics that `plots_cells.fidelity` plots."""
    return CellStatistics(*library_and_genes(cells), gene_statistics(cells), log_fold_changes(cells))
