"""Principal components and UMAP of cells, the same way for real and generated ones."""

import anndata as ad
import numpy as np
import scanpy as sc

from lib.counts import log_normalize

MIN_CELLS = 10  # fewer have no neighbourhood to speak of


def embed(counts: ad.AnnData, n_top_genes: int, n_pcs: int, n_neighbors: int, seed: int) -> ad.AnnData:
    """Median normalisation, log1p, highly variable genes, PCA, neighbours, UMAP (scanpy), on all given cells jointly.

    Parameters
    ----------
    counts
        Cells x genes, raw counts.

    Returns
    -------
    A new object with the variable genes only: `obsm["X_pca"]`, `obsm["X_umap"]`, the neighbour graph in `obsp`.

    Raises
    ------
    ValueError
        If there are too few cells.
    """
    if counts.n_obs < MIN_CELLS:
        raise ValueError(f"{counts.n_obs} cells are too few for an embedding; expected at least {MIN_CELLS}")
    library_size = np.asarray(counts.X.sum(axis=1)).ravel()
    adata = ad.AnnData(log_normalize(counts.X, float(np.median(library_size))), obs=counts.obs.copy(), var=counts.var[[]].copy())
    if adata.n_vars > n_top_genes:
        sc.pp.highly_variable_genes(adata, n_top_genes=n_top_genes)
        adata = adata[:, adata.var["highly_variable"]].copy()
    n_pcs = min(n_pcs, adata.n_obs - 1, adata.n_vars - 1)
    sc.pp.pca(adata, n_comps=n_pcs, random_state=seed)
    sc.pp.neighbors(adata, n_neighbors=min(n_neighbors, adata.n_obs - 1), n_pcs=n_pcs, random_state=seed)
    sc.tl.umap(adata, random_state=seed)
    return adata
