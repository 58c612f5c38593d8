"""Generative genomics' conditional VAE on principal components, its samples turned back into genes.

    c = components (log(1 + counts per 10,000) - mean)
    z | c, y ~ Normal(mean(c, y), variance(c, y))   label embedding 64; 2048-1024-512-256, to 512; GELU, dropout, LayerNorm
    loss     = |c - decoder(z, y)|^2 + weight x KL(q(z|c,y) || Normal(0, 1)),  weight from 0.1 to 1

Cells are drawn so that each type is seen as often as any other, and the learning rate follows one cycle. The principal
components are fitted block by block (incremental PCA: Ross et al., IJCV 77, 2008), so no number of cells is too large.
Source: the Generative genomics project (its README, and its model's sizes). Ours, where it says nothing: the number of
components, the learning rate, the number of epochs, the batch size, and how counts are drawn (lib/drawing.py).
"""

from collections.abc import Iterator

import numpy as np
import scipy.sparse as sp
import torch
from sklearn.decomposition import IncrementalPCA
from torch import nn

from lib.baselines import expression_sampling as drawing
from lib.data.batches import Batch, CellDataset
from lib.data.counts import log_normalize
from lib.models.likelihoods import gaussian_kl

SETTINGS = {
    "epochs": 150, "batch_size": 256, "learning_rate": 1e-3, "weight_decay": 1e-2, "patience": 50, "optimizer": "adamw",
    "balanced": True, "one_cycle": True, "kl_weight": (0.1, 1.0), "kl_warmup_epochs": 50,
}  # fmt: skip
HIDDEN = (2048, 1024, 512, 256)
N_PCS = 100
PCA_CELLS = 1024  # cells of which the components learn at a time, dense: 50-100 MB


class PCACVAE(nn.Module):
    """
    Parameters
    ----------
    n_genes, n_cell_types
        Sizes of the data.
    n_pcs
        Principal components; fewer where there are fewer cells or genes.
    n_latent, hidden, n_label, dropout
        Dimensions of z; layers of the encoder, and of the decoder in reverse; of the label's embedding; share of units left out.
    """

    def __init__(
        self, n_genes: int, n_cell_types: int, n_pcs: int = N_PCS, n_latent: int = 512, hidden: tuple[int, ...] = HIDDEN,
        n_label: int = 64, dropout: float = 0.25,
    ):  # fmt: skip
        super().__init__()
        self.arguments = dict(
            n_genes=n_genes,
            n_cell_types=n_cell_types,
            n_pcs=n_pcs,
            n_latent=n_latent,
            hidden=tuple(hidden),
            n_label=n_label,
            dropout=dropout,
        )
        self.n_cell_types, self.n_latent = n_cell_types, n_latent
        self.label = nn.Embedding(n_cell_types, n_label)
        self.encoder = nn.Sequential(*_layers((n_pcs + n_label, *hidden), dropout), nn.Linear(hidden[-1], 2 * n_latent))
        self.decoder = nn.Sequential(
            *_layers((n_latent + n_label, *reversed(hidden)), dropout), nn.Linear(hidden[0], n_pcs)
        )
        self.register_buffer("components", torch.zeros(n_genes, n_pcs))
        self.register_buffer("gene_mean", torch.zeros(n_genes))
        self.register_buffer("pc_scale", torch.ones(n_pcs))
        self.prior: dict[str, torch.Tensor] | None = None

    @torch.no_grad()
    def initialise(self, dataset: CellDataset) -> None:
        """Fit the principal components to the train cells, some at a time."""
        pca, n_pcs = None, len(self.pc_scale)
        for cells in _dense_bands(dataset, n_pcs):
            pca = pca or IncrementalPCA(min(n_pcs, *cells.shape))
            pca.partial_fit(cells)
        found = pca.n_components_
        self.components[:, :found] = torch.from_numpy(pca.components_.T.astype(np.float32))
        self.gene_mean.copy_(torch.from_numpy(pca.mean_.astype(np.float32)))
        self.pc_scale[:found] = torch.from_numpy(np.sqrt(pca.explained_variance_) + 1e-3)

    def pcs(self, batch: Batch) -> torch.Tensor:
        """Principal components of cells, each in units of its spread, (n_cells, n_pcs)."""
        return (
            batch.log_normalized(drawing.TARGET) @ self.components - self.gene_mean @ self.components
        ) / self.pc_scale

    def decode(self, z: torch.Tensor, cell_type_idx: torch.Tensor) -> torch.Tensor:
        return self.decoder(torch.cat([z, self.label(cell_type_idx)], dim=1)).float()

    def forward(self, batch: Batch, noise: torch.Tensor, kl_weight: float = 1.0) -> dict[str, torch.Tensor]:
        """Mean loss per cell and its parts. noise: (n_cells, n_latent), standard normal."""
        pcs = self.pcs(batch)
        mean, log_var = self.encoder(torch.cat([pcs, self.label(batch.cell_type_idx)], dim=1)).float().chunk(2, dim=1)
        log_var = log_var.clamp(-10, 6)
        error = (self.decode(mean + (0.5 * log_var).exp() * noise, batch.cell_type_idx) - pcs) * self.pc_scale
        reconstruction_loss = error.square().sum(dim=1).mean()
        kl_z = gaussian_kl(mean, log_var, torch.zeros_like(mean), torch.zeros_like(mean)).mean()
        return {
            "loss": reconstruction_loss + kl_weight * kl_z,
            "reconstruction_loss": reconstruction_loss,
            "kl_z": kl_z,
        }

    def fit_prior(self, dataset: CellDataset, seed: int) -> None:
        """z of new cells is standard normal; library sizes are those of train cells of the type."""
        self.prior = drawing.train_cells(dataset, self.n_cell_types, np.random.default_rng(seed))
        self.prior["gene_ratio"] = drawing.gene_ratio(self, dataset, self.n_cell_types, seed)

    def draw(
        self, cell_type_idx: torch.Tensor, noise_factor: float, generator: torch.Generator
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Expected expression and library size of new cells: see lib/drawing.py."""
        point = drawing.pick(self.prior, cell_type_idx, generator).cpu()
        z = noise_factor * torch.randn(
            len(cell_type_idx), self.n_latent, generator=generator, device=cell_type_idx.device
        )
        pcs = self.decode(z, cell_type_idx) * self.pc_scale
        return self.gene_mean + pcs @ self.components.T, self.prior["library_size"][point].to(z.device)

    def sample(
        self, cell_type_idx: np.ndarray, seed: int, noise_factor: float = 1.0, blocks: range | None = None
    ) -> Iterator[sp.csr_matrix]:
        """New cells of the given types: as `GMVAE.sample`."""
        return drawing.sample(self, cell_type_idx, seed, noise_factor, blocks)


def _layers(sizes: tuple[int, ...], dropout: float) -> list[nn.Module]:
    return [
        layer
        for n_in, n_out in zip(sizes, sizes[1:])
        for layer in (nn.Linear(n_in, n_out), nn.LayerNorm(n_out), nn.GELU(), nn.Dropout(dropout))
    ]


def _dense_bands(dataset: CellDataset, n_pcs: int) -> Iterator[np.ndarray]:
    """All cells as log(1 + counts per 10,000), in bands of equal size, none with fewer cells than components."""
    held = sp.csr_matrix((0, dataset.n_genes), dtype=np.float32)
    for counts, _ in dataset.blocks():
        held = sp.vstack([held, log_normalize(counts, drawing.TARGET)], format="csr")
        while held.shape[0] >= 2 * max(PCA_CELLS, n_pcs):
            yield held[:PCA_CELLS].toarray()
            held = held[PCA_CELLS:]
    n_bands = max(1, held.shape[0] // max(PCA_CELLS, n_pcs))
    for rows in np.array_split(np.arange(held.shape[0]), n_bands):
        yield held[rows].toarray()
