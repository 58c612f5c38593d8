"""Principal components, UMAP, MDE and Leiden clusters of cells, computed in the same way for real and generated cells."""

import contextlib
from collections.abc import Iterator
from types import ModuleType

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
CONNECT_S = 20  # seconds that a dask scheduler has to answer


def lazy(adata: ad.AnnData, rows: np.ndarray | None = None) -> ad.AnnData:
    """Some cells of a file (`rows`, ascending), their counts a dask array that is read in blocks when it is used."""
    counts = read_elem_lazy(adata.X.group, chunks=(BLOCK_CELLS, adata.n_vars))
    return ad.AnnData(counts if rows is None else counts[rows], var=adata.var[[]].copy())


@contextlib.contextmanager
def scheduler(address: str | None) -> Iterator[None]:
    """Compute dask arrays in this process (None), in one per processor ("local"), or by the workers of a running scheduler.

    These need the same packages and the same path of the data. ValueError if the scheduler does not answer.
    """
    if address is None:
        yield
        return
    try:
        from distributed import Client

        local = {"processes": True, "threads_per_worker": 1, "dashboard_address": None}
        client = Client(**local) if address == "local" else Client(address, timeout=CONNECT_S)
    except (ImportError, OSError, ValueError) as error:
        expected = "the address of a running dask scheduler, local or none, and the package distributed"
        raise ValueError(
            f"DASK_SCHEDULER is {address!r}, but does not answer ({error}); expected {expected}"
        ) from error
    with client:
        yield


def quality_metrics(adata: ad.AnnData) -> pd.DataFrame:
    """scanpy's quality metrics of the cells of a file: total_counts, n_genes_by_counts, and pct_counts_mt (of genes called MT-...)."""
    names = ["total_counts", "n_genes_by_counts", "pct_counts_mt"]
    var = pd.DataFrame({"mt": adata.var_names.str.upper().str.startswith("MT-")}, index=adata.var_names)
    if not var["mt"].any():
        print("no gene is called MT-...: no mitochondrial counts are known")

    def of_block(counts: sp.csr_matrix) -> np.ndarray:  # of a whole dask array, scanpy needs all counts in memory
        cells = ad.AnnData(counts, var=var)
        return sc.pp.calculate_qc_metrics(cells, qc_vars=["mt"], percent_top=None, log1p=False)[0][names].to_numpy()

    counts = lazy(adata).X
    values = counts.map_blocks(of_block, chunks=(counts.chunks[0], (len(names),)), meta=np.empty((0, 0))).compute()
    return pd.DataFrame(values, columns=names).fillna(0)  # without any count, the percentage is not a number


def principal_components(counts: ad.AnnData, n_top_genes: int | None, n_pcs: int) -> np.ndarray:
    """Normalise to the median library size, log1p, select highly variable genes (None: all), PCA (scanpy): cells x components, float32.

    counts: cells x genes, raw, sparse, in memory or as a dask array; ValueError for fewer than `MIN_CELLS` cells.
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
    """Indices of the genes with the most variance of Pearson residuals, ascending (Lause, Berens and Kobak, Genome Biology 2021)."""
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


def load_pymde() -> ModuleType:
    """Import pymde, which is not in requirements.txt: it needs a torchvision of the same build as torch."""
    try:
        import pymde
    except (ImportError, RuntimeError) as error:  # RuntimeError: torchvision of another build than torch
        needs = f"pymde and a torchvision that fits torch ({error})"
        raise ImportError(f"MDE needs {needs}; pip install pymde, or set MDE to False") from error
    return pymde


def mde(pcs: np.ndarray, n_neighbors: int, seed: int) -> np.ndarray:
    """Minimum-distortion embedding that preserves neighbours (pymde; Agrawal, Ali and Boyd 2021), cells x 2."""
    pymde = load_pymde()
    pymde.seed(seed)
    n_neighbors = min(n_neighbors, len(pcs) - 1)
    problem = pymde.preserve_neighbors(torch.from_numpy(pcs), embedding_dim=2, n_neighbors=n_neighbors)
    return problem.embed().cpu().numpy()


def leiden(graph: ad.AnnData, resolution: float, seed: int, n_iterations: int = 2) -> np.ndarray:
    """Leiden cluster of each cell of a neighbour graph (igraph), as text."""
    sc.tl.leiden(graph, resolution, random_state=seed, flavor="igraph", n_iterations=n_iterations, directed=False)
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
    """Small-cluster filter of Bulk2Single: mask of the generated cells (raw counts) whose Leiden cluster has at least `min_cells` cells.

    ValueError if no cluster is large enough.
    """
    graph = neighbour_graph(principal_components(cells, n_top_genes, n_pcs), n_neighbors, seed)
    clusters = leiden(graph, resolution, seed)
    sizes = pd.Series(clusters).value_counts()
    n, largest = len(sizes), sizes.max()
    if largest < min_cells:
        raise ValueError(
            f"all {n} clusters have fewer than {min_cells} cells (the largest: {largest}); lower MIN_CLUSTER_CELLS"
        )
    kept, n_small = sizes[clusters].to_numpy() >= min_cells, np.sum(sizes < min_cells)
    print(f"small-cluster filter: {np.sum(~kept):,} of {len(kept):,} cells dropped, in {n_small} of {n} clusters")
    return kept
