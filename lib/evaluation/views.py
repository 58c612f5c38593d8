"""The same cells at four stages of the GMVAE: input, latent, reconstructed, generated (bulk2sc's picture)."""

import anndata as ad
import numpy as np
import scipy.sparse as sp
import torch
from sklearn.manifold import TSNE

from lib.data.batches import CellDataset
from lib.data.embedding import embed, principal_components
from lib.models.gmvae import GMVAE


@torch.no_grad()
def latent_and_reconstructed(model: GMVAE, cells: ad.AnnData, seed: int) -> tuple[np.ndarray, ad.AnnData]:
    """z of cells of known type, drawn from q(z|x,y), (n_cells, n_latent), and cells drawn from p(x|z) at the cells' own library sizes."""
    device = model.log_theta.device
    generator = torch.Generator(device).manual_seed(seed)
    z, counts = [], []
    for batch in CellDataset(cells.X, cells.obs["cell_type"].cat.codes, device).in_order(256):
        mean, log_var = model.q_z(model.encode_genes(batch), batch)
        z.append(mean + (0.5 * log_var).exp() * torch.randn(mean.shape, generator=generator, device=device))
        counts.append(model.p_x(z[-1], batch.library_size, batch.cell_type_idx).sample(generator))
    made = ad.AnnData(sp.vstack(counts, format="csr"), obs=cells.obs[["cell_type"]].copy(), var=cells.var[[]].copy())
    return torch.cat(z).cpu().numpy(), made


def four_embeddings(
    model: GMVAE, cells: ad.AnnData, generated: ad.AnnData, n_top_genes: int, n_pcs: int, n_neighbors: int, seed: int
):
    """t-SNE and UMAP of input, latent, reconstructed and generated cells, each of its own: for `panels.four_stages`.

    Returns
    -------
    {"t-SNE": four arrays, cells x 2; "UMAP": the same}, and the types of the cells of each stage.
    """
    z, reconstructed = latent_and_reconstructed(model, cells, seed)
    features = [principal_components(part, n_top_genes, n_pcs) for part in (cells, reconstructed, generated)]
    features.insert(1, z.astype(np.float32))
    tsne = [
        TSNE(perplexity=min(30, (len(x) - 1) / 3), init="pca", random_state=seed).fit_transform(x) for x in features
    ]
    umap = [embed(x, n_neighbors, seed).obsm["X_umap"] for x in features]
    types = [cells.obs["cell_type"], cells.obs["cell_type"], cells.obs["cell_type"], generated.obs["cell_type"]]
    return {"t-SNE": tsne, "UMAP": umap}, types
