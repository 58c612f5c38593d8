"""Generated cells that are of no type: those in clusters too small to be one."""

import anndata as ad
import numpy as np
import pandas as pd
import scanpy as sc

from lib.data.embedding import MIN_CELLS, principal_components


def in_large_clusters(
    cells: ad.AnnData, least: int, n_top_genes: int, n_pcs: int, n_neighbors: int, resolution: float, seed: int
) -> np.ndarray:
    """Mask of the cells whose Leiden cluster has `least` cells or more: the noise filter of Bulk2Single.

    Highly variable genes, principal components, neighbours, Leiden (igraph); says how many cells of how many clusters are small.

    Raises
    ------
    ValueError
        If no cluster is large enough.
    """
    if cells.n_obs < MIN_CELLS:
        raise ValueError(f"{cells.n_obs} cells are too few to be filtered by clusters; expected at least {MIN_CELLS}")
    graph = ad.AnnData(obsm={"X_pca": principal_components(cells, n_top_genes, n_pcs)})
    sc.pp.neighbors(graph, n_neighbors=min(n_neighbors, graph.n_obs - 1), use_rep="X_pca", random_state=seed)
    sc.tl.leiden(graph, resolution=resolution, flavor="igraph", n_iterations=2, directed=False, random_state=seed)
    clusters = graph.obs["leiden"].astype(str).to_numpy()
    sizes = pd.Series(clusters).value_counts()
    kept = sizes[clusters].to_numpy() >= least
    if not kept.any():
        raise ValueError(
            f"all {len(sizes)} clusters of the generated cells have fewer than {least} cells (the largest: {sizes.max()}); lower NOISE_CLUSTER_CELLS"
        )
    print(
        f"noise filter: {np.sum(~kept):,} of {len(kept):,} cells dropped, in {np.sum(sizes < least)} of {len(sizes)} clusters of fewer than {least} cells"
    )
    return kept
