"""The same cells at four stages of the GMVAE, and clusters of generated cells too small to be of a type."""

import anndata as ad
import numpy as np
import pandas as pd
import scanpy as sc
import scipy.sparse as sp
import torch
from sklearn.manifold import TSNE

from lib.batches import CellDataset
from lib.embedding import MIN_CELLS, embed, principal_components
from lib.gmvae import GMVAE


@torch.no_grad()
def latent_and_reconstructed(model: GMVAE, cells: ad.AnnData, seed: int) -> tuple[np.ndarray, ad.AnnData]:
    """z of cells of known type, drawn from q(z|x,y), (n_cells, n_latent), and cells drawn from p(x|z) at the cells' own library sizes."""
    device = model.log_theta.device
    generator = torch.Generator(device).manual_seed(seed)
    z, counts = [], []
    for batch in CellDataset(cells.X, cells.obs["cell_type"].cat.codes, device).in_order(256):
        mean, log_var = model.q_z(model.see(batch), batch)
        z.append(mean + (0.5 * log_var).exp() * torch.randn(mean.shape, generator=generator, device=device))
        counts.append(model.p_x(z[-1], batch.library_size).sample(generator))
    made = ad.AnnData(sp.vstack(counts, format="csr"), obs=cells.obs[["cell_type"]].copy(), var=cells.var[[]].copy())
    return torch.cat(z).cpu().numpy(), made


def four_embeddings(model: GMVAE, cells: ad.AnnData, generated: ad.AnnData, n_top_genes: int, n_pcs: int, n_neighbors: int, seed: int):
    """t-SNE and UMAP of input, latent, reconstructed and generated cells, each of its own: for `panels.four_stages`.

    Returns
    -------
    {"t-SNE": four arrays, cells x 2; "UMAP": the same}, and the types of the cells of each stage.
    """
    z, reconstructed = latent_and_reconstructed(model, cells, seed)
    features = [principal_components(part, n_top_genes, n_pcs) for part in (cells, reconstructed, generated)]
    features.insert(1, z.astype(np.float32))
    tsne = [TSNE(perplexity=min(30, (len(x) - 1) / 3), init="pca", random_state=seed).fit_transform(x) for x in features]
    umap = [embed(x, n_neighbors, seed).obsm["X_umap"] for x in features]
    types = [cells.obs["cell_type"], cells.obs["cell_type"], cells.obs["cell_type"], generated.obs["cell_type"]]
    return {"t-SNE": tsne, "UMAP": umap}, types


def in_large_clusters(cells: ad.AnnData, least: int, n_top_genes: int, n_pcs: int, n_neighbors: int, resolution: float, seed: int) -> np.ndarray:
    """Mask of the cells whose Leiden cluster has `least` cells or more: the noise filter of Bulk2Single.

    Highly variable genes, principal components, neighbours, Leiden (igraph); says how many cells of how many clusters are small.

    Raises
    ------
    ValueError
        If no cluster is large enough.
    """
    if cells.n_obs < MIN_CELLS:
        raise ValueError(f"{cells.n_obs} cells are too few to be filtered by clusters; expected at least {MIN_CELLS}")
    graph = embed_neighbours(principal_components(cells, n_top_genes, n_pcs), n_neighbors, seed)
    sc.tl.leiden(graph, resolution=resolution, flavor="igraph", n_iterations=2, directed=False, random_state=seed)
    clusters = graph.obs["leiden"].astype(str).to_numpy()
    sizes = pd.Series(clusters).value_counts()
    kept = sizes[clusters].to_numpy() >= least
    if not kept.any():
        raise ValueError(f"all {len(sizes)} clusters of the generated cells have fewer than {least} cells (the largest: {sizes.max()}); lower NOISE_CLUSTER_CELLS")
    print(f"noise filter: {np.sum(~kept):,} of {len(kept):,} cells dropped, in {np.sum(sizes < least)} of {len(sizes)} clusters of fewer than {least} cells")
    return kept


def embed_neighbours(pcs: np.ndarray, n_neighbors: int, seed: int) -> ad.AnnData:
    adata = ad.AnnData(obsm={"X_pca": pcs})
    sc.pp.neighbors(adata, n_neighbors=min(n_neighbors, adata.n_obs - 1), use_rep="X_pca", random_state=seed)
    return adata
