"""The conditional VAE of Generative genomics: it models principal components, which are transformed back to genes.

    c        = components (log(1 + counts per 10,000) - mean)
    z | c, y ~ Normal(mean(c, y), variance(c, y))   label embedding 64; 2048-1024-512-256, to 512; GELU, dropout, LayerNorm
    loss     = |c - decoder(z, y)|^2 + weight x KL(q(z|c,y) || Normal(0, 1)),  weight from 0.1 to 1

Batches are class-balanced: each type is sampled equally often. The learning rate follows one cycle. The principal components
are fitted block by block (incremental PCA: Ross et al., IJCV 77, 2008), so the number of cells is not limited by memory.
Source: the Generative genomics project (its README and the sizes of its model). Ours, where it gives none: the number of
components, the learning rate, the number of epochs, the batch size, and how counts are sampled
(lib/baselines/expression_sampling.py).
"""

from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import scipy.sparse as sp
import torch
from sklearn.decomposition import IncrementalPCA
from torch import nn

from lib.baselines import expression_sampling as sampling
from lib.data.batches import Batch, CellDataset
from lib.data.counts import log_normalize
from lib.models.likelihoods import standard_normal_kl

SETTINGS = {
    "epochs": 150, "batch_size": 256, "learning_rate": 1e-3, "weight_decay": 1e-2, "patience": 50, "optimizer": "adamw",
    "balanced": True, "one_cycle": True, "kl_weight": (0.1, 1.0), "kl_warmup_epochs": 50,
}  # fmt: skip
HIDDEN = (2048, 1024, 512, 256)
N_PCS = 100
PCA_CELLS = 1024  # cells in one step of the incremental PCA, dense: 50-100 MB


class PCACVAE(nn.Module):
    """
    Parameters
    ----------
    n_genes, n_cell_types
        Sizes of the data.
    n_pcs
        Number of principal components; where there are fewer cells or genes, the remaining components are 0.
    n_latent, hidden, n_label, dropout
        Dimensions of z; hidden layers of the encoder, and of the decoder in reverse; dimensions of the label embedding; dropout
        probability.
    """

    components: torch.Tensor
    gene_mean: torch.Tensor
    pc_scale: torch.Tensor

    def __init__(
        self, n_genes: int, n_cell_types: int, n_pcs: int = N_PCS, n_latent: int = 512, hidden: tuple[int, ...] = HIDDEN,
        n_label: int = 64, dropout: float = 0.25,
    ):  # fmt: skip
        super().__init__()
        self.arguments = dict(
            n_genes=n_genes, n_cell_types=n_cell_types, n_pcs=n_pcs, n_latent=n_latent, hidden=tuple(hidden), n_label=n_label,
            dropout=dropout,
        )  # fmt: skip
        self.n_cell_types, self.n_latent = n_cell_types, n_latent
        self.label = nn.Embedding(n_cell_types, n_label)
        self.encoder = nn.Sequential(*_layers((n_pcs + n_label, *hidden), dropout), nn.Linear(hidden[-1], 2 * n_latent))
        self.decoder = nn.Sequential(
            *_layers((n_latent + n_label, *reversed(hidden)), dropout), nn.Linear(hidden[0], n_pcs)
        )
        self.register_buffer("components", torch.zeros(n_genes, n_pcs))
        self.register_buffer("gene_mean", torch.zeros(n_genes))
        self.register_buffer("pc_scale", torch.ones(n_pcs))
        self.prior: dict[str, torch.Tensor] = {}

    @torch.no_grad()
    def initialise(self, dataset: CellDataset) -> None:
        """Fit the principal components to the train cells, block by block."""
        blocks = _dense_blocks(dataset, len(self.pc_scale))
        first = next(blocks)
        pca = IncrementalPCA(min(len(self.pc_scale), *first.shape)).partial_fit(first)
        for cells in blocks:
            pca.partial_fit(cells)
        found = pca.n_components_
        self.components[:, :found] = torch.from_numpy(pca.components_.T.astype(np.float32))
        self.gene_mean.copy_(torch.from_numpy(pca.mean_.astype(np.float32)))
        self.pc_scale[:found] = torch.from_numpy(np.sqrt(pca.explained_variance_) + 1e-3)

    def pcs(self, batch: Batch) -> torch.Tensor:
        """Principal components of cells, each divided by its standard deviation: (n_cells, n_pcs)."""
        pcs = batch.log_normalized(sampling.TARGET) @ self.components - self.gene_mean @ self.components
        return pcs / self.pc_scale

    def decode(self, z: torch.Tensor, cell_type_idx: torch.Tensor) -> torch.Tensor:
        """Principal components, each divided by its standard deviation: (n_cells, n_pcs)."""
        return self.decoder(torch.cat([z, self.label(cell_type_idx)], dim=1)).float()

    def forward(self, batch: Batch, epsilon: torch.Tensor, kl_weight: float = 1.0) -> dict[str, torch.Tensor]:
        """Mean loss per cell and its parts. epsilon: (n_cells, n_latent), standard normal."""
        pcs = self.pcs(batch)
        mean, log_var = self.encoder(torch.cat([pcs, self.label(batch.cell_type_idx)], dim=1)).float().chunk(2, dim=1)
        log_var = log_var.clamp(-10, 6)
        error = (self.decode(mean + (0.5 * log_var).exp() * epsilon, batch.cell_type_idx) - pcs) * self.pc_scale
        reconstruction_loss = error.square().sum(dim=1).mean()
        kl_z = standard_normal_kl(mean, log_var).mean()
        loss = reconstruction_loss + kl_weight * kl_z
        return {"loss": loss, "reconstruction_loss": reconstruction_loss, "kl_z": kl_z}

    def fit_prior(self, dataset: CellDataset, seed: int) -> None:
        """Keep library sizes of train cells. z of new cells is standard normal."""
        self.prior = sampling.select_train_cells(dataset, self.n_cell_types, seed)
        self.prior["gene_ratio"] = sampling.fit_gene_ratio(self, dataset, seed)

    def sample_expression(
        self, cell_type_idx: torch.Tensor, latent_spread: float, generator: torch.Generator
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """log(1 + counts per 10,000), (n_cells, n_genes), and library size, (n_cells,), of new cells."""
        _, library_size = sampling.sample_train_cells(self.prior, cell_type_idx, generator)
        size = (len(cell_type_idx), self.n_latent)
        z = latent_spread * torch.randn(size, generator=generator, device=cell_type_idx.device)
        pcs = self.decode(z, cell_type_idx) * self.pc_scale
        return self.gene_mean + pcs @ self.components.T, library_size

    sample = sampling.sample_cells


def _layers(sizes: tuple[int, ...], dropout: float) -> list[nn.Module]:
    return [
        layer
        for n_in, n_out in pairwise(sizes)
        for layer in (nn.Linear(n_in, n_out), nn.LayerNorm(n_out), nn.GELU(), nn.Dropout(dropout))
    ]


def _dense_blocks(dataset: CellDataset, n_pcs: int) -> Iterator[np.ndarray]:
    """All cells as log(1 + counts per 10,000), in blocks with at least as many cells as components (if the data set has them)."""
    rest = sp.csr_matrix((0, dataset.n_genes), dtype=np.float32)
    for counts, _ in dataset.blocks():
        rest = sp.vstack([rest, log_normalize(counts, sampling.TARGET)], format="csr")
        while rest.shape[0] >= 2 * max(PCA_CELLS, n_pcs):
            yield rest[:PCA_CELLS].toarray()
            rest = rest[PCA_CELLS:]
    n_blocks = max(1, rest.shape[0] // max(PCA_CELLS, n_pcs))
    for rows in np.array_split(np.arange(rest.shape[0]), n_blocks):
        yield rest[rows].toarray()
