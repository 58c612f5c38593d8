"""Principal components, UMAP, MDE and Leiden clusters of cells, computed in the same way for real and generated cells."""

from types import ModuleType
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import scanpy as sc
import scipy.sparse as sp
import torch
from anndata.experimental import read_elem_lazy
from sklearn.neighbors import KNeighborsClassifier

from lib.data.counts import BLOCK_CELLS

MIN_CELLS = 10  # fewer cells have no meaningful neighbours


def lazy(adata: ad.AnnData, rows: np.ndarray) -> ad.AnnData:
    """Some cells of a count file (`rows` ascending), their counts a dask array that is read in blocks when it is used."""
    counts = read_elem_lazy(adata.X.group, chunks=(BLOCK_CELLS, adata.n_vars))
    return ad.AnnData(counts[rows], var=adata.var[[]].copy())


def principal_components(counts: ad.AnnData, n_top_genes: int | None, n_pcs: int) -> np.ndarray:
    """Normalise to the median library size, log1p, select highly variable genes, PCA (scanpy), all cells together.

    Parameters
    ----------
    counts
        Cells x genes, raw counts, sparse, in memory or as a dask array.
    n_top_genes
        Number of highly variable genes; None for all genes.

    Returns
    -------
    Cells x components, float32.

    Raises
    ------
    ValueError
        If there are fewer than `MIN_CELLS` cells.
    """
    if counts.n_obs < MIN_CELLS:
        raise ValueError(f"{counts.n_obs} cells are too few for an embedding; expected at least {MIN_CELLS}")
    adata = ad.AnnData(counts.X.copy(), var=counts.var[[]].copy())
    sc.pp.normalize_total(adata)
    sc.pp.log1p(adata)
    if n_top_genes is not None and adata.n_vars > n_top_genes:
        sc.pp.highly_variable_genes(adata, n_top_genes=n_top_genes)
        adata = adata[:, adata.var["highly_variable"]].copy()
    n_comps = min(n_pcs, adata.n_obs - 1, adata.n_vars - 1)
    # both are deterministic; arpack computes these components alone, but needs the cells in memory
    sc.pp.pca(adata, n_comps=n_comps, svd_solver="arpack" if sp.issparse(adata.X) else "covariance_eigh")
    return np.asarray(adata.obsm["X_pca"], dtype=np.float32)


def variable_genes(cells: ad.AnnData, n_genes: int) -> np.ndarray:
    """Indices of the genes with the most variance beyond chance, ascending.

    Ranked by the variance of Pearson residuals (Lause, Berens and Kobak, Genome Biology 2021).
    """
    counts = ad.AnnData(cells.X)
    sc.experimental.pp.highly_variable_genes(counts, n_top_genes=min(n_genes, cells.n_vars))
    return np.flatnonzero(counts.var["highly_variable"])


def neighbour_graph(pcs: np.ndarray, n_neighbors: int, seed: int) -> ad.AnnData:
    """Nearest neighbours (scanpy) of cells x principal components: `obsp`."""
    graph = ad.AnnData(obsm={"X_pca": pcs})
    sc.pp.neighbors(graph, n_neighbors=min(n_neighbors, graph.n_obs - 1), use_rep="X_pca", random_state=seed)
    return graph


def embed(pcs: np.ndarray, n_neighbors: int, seed: int, min_dist: float = 0.5) -> ad.AnnData:
    """Neighbour graph and UMAP (scanpy) of cells x principal components: `obsp`, `obsm["X_umap"]`. min_dist: scanpy's."""
    graph = neighbour_graph(pcs, n_neighbors, seed)
    sc.tl.umap(graph, min_dist=min_dist, random_state=seed)
    return graph


def mde(pcs: np.ndarray, n_neighbors: int, seed: int) -> np.ndarray:
    """Minimum-distortion embedding that preserves neighbours (pymde; Agrawal, Ali and Boyd 2021), cells x 2."""
    pymde = load_pymde()
    pymde.seed(seed)
    problem = pymde.preserve_neighbors(
        torch.from_numpy(pcs), embedding_dim=2, n_neighbors=min(n_neighbors, len(pcs) - 1)
    )
    return problem.embed().cpu().numpy()


def load_pymde() -> ModuleType:
    """Import pymde, which is not in requirements.txt: it needs a torchvision of the same build as torch.

    Raises
    ------
    ImportError
        If pymde or its torchvision cannot be imported.
    """
    try:
        import pymde
    except (ImportError, RuntimeError) as error:  # RuntimeError: torchvision of another build than torch
        raise ImportError(
            f"MDE needs pymde and a torchvision that fits torch ({error}); pip install pymde, or set MDE to False"
        ) from error
    return pymde


def leiden(graph: ad.AnnData, resolution: float, seed: int, n_iterations: int = 2) -> np.ndarray:
    """Leiden cluster of each cell of a neighbour graph (igraph), as text."""
    settings: dict[str, Any] = {"flavor": "igraph", "n_iterations": n_iterations, "directed": False}
    sc.tl.leiden(graph, resolution=resolution, random_state=seed, **settings)
    return graph.obs["leiden"].astype(str).to_numpy()


def labels_of_neighbours(pcs: np.ndarray, known: np.ndarray, labels: np.ndarray, n_neighbors: int) -> np.ndarray:
    """Label of every cell: its own for the `known` cells, the majority of its nearest known neighbours for the rest."""
    all_labels = np.empty(len(pcs), dtype=object)
    all_labels[known] = labels
    rest = np.setdiff1d(np.arange(len(pcs)), known)
    if len(rest):
        all_labels[rest] = KNeighborsClassifier(n_neighbors).fit(pcs[known], labels).predict(pcs[rest])
    return all_labels


def in_large_clusters(
    cells: ad.AnnData, min_cells: int, n_top_genes: int, n_pcs: int, n_neighbors: int, resolution: float, seed: int
) -> np.ndarray:
    """Small-cluster filter of Bulk2Single: mask of the cells whose Leiden cluster has at least `min_cells` cells.

    Parameters
    ----------
    cells
        Generated cells, raw counts.
    min_cells
        Size of the smallest cluster that is kept.
    n_top_genes, n_pcs, n_neighbors, resolution
        Of the clusters: highly variable genes, principal components, neighbours of a cell, Leiden's resolution.

    Raises
    ------
    ValueError
        If there are too few cells, or no cluster is large enough.
    """
    if cells.n_obs < MIN_CELLS:
        raise ValueError(f"{cells.n_obs} cells are too few for the small-cluster filter; expected at least {MIN_CELLS}")
    graph = neighbour_graph(principal_components(cells, n_top_genes, n_pcs), n_neighbors, seed)
    clusters = leiden(graph, resolution, seed)
    sizes = pd.Series(clusters).value_counts()
    kept = sizes[clusters].to_numpy() >= min_cells
    if not kept.any():
        raise ValueError(
            f"all {len(sizes)} clusters of the generated cells have fewer than {min_cells} cells (the largest: {sizes.max()}); "
            "lower MIN_CLUSTER_CELLS"
        )
    n_small = np.sum(sizes < min_cells)
    print(
        f"small-cluster filter: {np.sum(~kept):,} of {len(kept):,} cells dropped, in {n_small} of {len(sizes)} clusters "
        f"of fewer than {min_cells} cells"
    )
    return kept
