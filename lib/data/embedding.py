"""Principal components, UMAP and MDE of cells, the same way for real and generated ones, in memory or larger than memory."""

from types import ModuleType

import anndata as ad
import numpy as np
import scanpy as sc
import torch
from anndata.experimental import read_elem_lazy
from sklearn.neighbors import KNeighborsClassifier

from lib.data.counts import BLOCK_CELLS

MIN_CELLS = 10  # fewer have no neighbourhood to speak of


def lazy(adata: ad.AnnData, rows: np.ndarray) -> ad.AnnData:
    """Some cells of a file, their counts a dask array, which reads them in blocks whenever they are needed. rows: ascending."""
    counts = read_elem_lazy(adata.X.group, chunks=(BLOCK_CELLS, adata.n_vars))
    return ad.AnnData(counts[rows], var=adata.var[[]].copy())


def principal_components(counts: ad.AnnData, n_top_genes: int, n_pcs: int) -> np.ndarray:
    """Median normalisation, log1p, highly variable genes, PCA (scanpy), on all given cells jointly.

    Parameters
    ----------
    counts
        Cells x genes, raw counts; sparse, in memory or as a dask array.

    Returns
    -------
    Cells x components, float32.

    Raises
    ------
    ValueError
        If there are too few cells.
    """
    if counts.n_obs < MIN_CELLS:
        raise ValueError(f"{counts.n_obs} cells are too few for an embedding; expected at least {MIN_CELLS}")
    adata = ad.AnnData(counts.X.copy(), var=counts.var[[]].copy())
    sc.pp.normalize_total(adata)
    sc.pp.log1p(adata)
    if adata.n_vars > n_top_genes:
        sc.pp.highly_variable_genes(adata, n_top_genes=n_top_genes)
        adata = adata[:, adata.var["highly_variable"]].copy()
    sc.pp.pca(
        adata, n_comps=min(n_pcs, adata.n_obs - 1, adata.n_vars - 1), svd_solver="covariance_eigh"
    )  # no random start
    return np.asarray(adata.obsm["X_pca"], dtype=np.float32)


def variable_genes(cells: ad.AnnData, n_genes: int) -> np.ndarray:
    """Indices of the genes with the most variance beyond chance, ascending.

    Ranked by the variance of Pearson residuals (Lause, Berens and Kobak, Genome Biology 2021).
    """
    counts = ad.AnnData(cells.X)
    sc.experimental.pp.highly_variable_genes(counts, n_top_genes=min(n_genes, cells.n_vars))
    return np.flatnonzero(counts.var["highly_variable"])


def embed(pcs: np.ndarray, n_neighbors: int, seed: int) -> ad.AnnData:
    """Neighbour graph and UMAP (scanpy) of cells x principal components: `obsp`, `obsm["X_umap"]`."""
    adata = ad.AnnData(obsm={"X_pca": pcs})
    sc.pp.neighbors(adata, n_neighbors=min(n_neighbors, adata.n_obs - 1), use_rep="X_pca", random_state=seed)
    sc.tl.umap(adata, random_state=seed)
    return adata


def mde(pcs: np.ndarray, n_neighbors: int, seed: int) -> np.ndarray:
    """Minimum-distortion embedding that preserves neighbours (pymde; Agrawal, Ali and Boyd 2021), cells x 2."""
    pymde = load_pymde()
    pymde.seed(seed)
    problem = pymde.preserve_neighbors(
        torch.from_numpy(pcs), embedding_dim=2, n_neighbors=min(n_neighbors, len(pcs) - 1)
    )
    return problem.embed().cpu().numpy()


def load_pymde() -> ModuleType:
    """
    Raises
    ------
    ImportError
        Without pymde, which is not among the requirements: it brings torchvision, which not every build of torch has.
    """
    try:
        import pymde
    except (ImportError, RuntimeError) as error:  # RuntimeError: torchvision of another build than torch
        raise ImportError(
            f"MDE needs pymde and a torchvision that fits torch ({error}); pip install pymde, or set MDE to False"
        ) from error
    return pymde


def labels_of_neighbours(pcs: np.ndarray, known: np.ndarray, labels: np.ndarray, n_neighbors: int) -> np.ndarray:
    """A label for every cell: its own, or what most of its nearest neighbours among the `known` cells have."""
    everyone = np.empty(len(pcs), dtype=object)
    everyone[known] = labels
    others = np.setdiff1d(np.arange(len(pcs)), known)
    if len(others):
        everyone[others] = KNeighborsClassifier(n_neighbors).fit(pcs[known], labels).predict(pcs[others])
    return everyone
