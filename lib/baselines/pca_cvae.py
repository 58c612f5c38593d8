"""The conditional VAE of Generative genomics: it models principal components, which are transformed back to genes.

    c        principal components of standardised genes, log(1 + counts per 10,000) (lib/data/components.py)
    z | c, y ~ Normal(mean(c, y), variance(c, y))   label embedding 64; 2048-1024-512-256, to 512; GELU, dropout, LayerNorm
    loss     = |c - decoder(z, y)|^2 + weight x KL(q(z|c,y) || Normal(0, 1)),  weight from 0.1 to 1 over ten epochs

Batches are class-balanced: each type is sampled equally often. The learning rate follows the first half of one cycle.
Source: the Generative genomics project (RodMcN/generative-genomics: its README, configuration and sources), for 828,328 cells. Ours:
fewer components and smaller batches where the data are smaller (`fitting_sizes`), the best of all epochs instead of stopping after
five epochs without a lower loss, and how counts are sampled (lib/baselines/expression_sampling.py).
"""

from itertools import pairwise
from typing import Any

import torch
from torch import nn

from lib.baselines import expression_sampling as sampling
from lib.data.batches import Batch, CellDataset
from lib.data.components import fit_components, n_components
from lib.models.layers import scaled_columns
from lib.models.likelihoods import standard_normal_kl

SETTINGS = {
    "epochs": 100, "batch_size": 5000, "learning_rate": 1e-3, "weight_decay": 1e-3, "patience": 100, "optimizer": "adamw",
    "balanced": True, "cycle": 2.0, "kl_weight": (0.1, 1.0), "kl_warmup_epochs": 9,
}  # fmt: skip
HIDDEN = (2048, 1024, 512, 256)
N_PCS = 2500
MIN_BATCHES = 8  # of an epoch, at least: smaller data have smaller batches (ours)


def fitting_sizes(
    settings: dict[str, Any], arguments: dict[str, Any], train: CellDataset
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Settings and arguments with a batch size and a number of components that the train cells allow; messages say what changes."""
    batch_size = max(1, min(settings["batch_size"], len(train) // MIN_BATCHES))
    if batch_size < settings["batch_size"]:
        print(f"batches of {batch_size:,} cells instead of {settings['batch_size']:,}: {len(train):,} train cells")
    n_pcs = n_components(arguments.get("n_pcs", N_PCS), len(train), train.n_genes)
    return settings | {"batch_size": batch_size}, arguments | {"n_pcs": n_pcs}


class PCACVAE(nn.Module):
    """
    Parameters
    ----------
    n_genes, n_cell_types
        Sizes of the data.
    n_pcs
        Number of principal components, at most as many as there are train cells and genes (`fitting_sizes`).
    n_latent, hidden, n_label, dropout
        Dimensions of z; hidden layers of the encoder, and of the decoder in reverse; dimensions of the label embedding; dropout
        probability.
    """

    components: torch.Tensor
    gene_mean: torch.Tensor
    gene_scale: torch.Tensor

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
        self.register_buffer("gene_scale", torch.ones(n_genes))
        self.prior: dict[str, torch.Tensor] = {}

    @torch.no_grad()
    def initialise(self, dataset: CellDataset) -> None:
        """Fit the principal components to the train cells, block by block."""
        found = fit_components(lambda: (counts for counts, _ in dataset.blocks()), self.components.shape[1])
        for buffer, values in zip((self.gene_mean, self.gene_scale, self.components), found):
            buffer.copy_(torch.from_numpy(values))

    def pcs(self, batch: Batch) -> torch.Tensor:
        """Principal components of cells: (n_cells, n_pcs)."""
        x = scaled_columns(batch.log_normalized(sampling.TARGET), 1 / self.gene_scale)
        return x @ self.components - (self.gene_mean / self.gene_scale) @ self.components

    def decode(self, z: torch.Tensor, cell_type_idx: torch.Tensor) -> torch.Tensor:
        """Principal components: (n_cells, n_pcs)."""
        return self.decoder(torch.cat([z, self.label(cell_type_idx)], dim=1)).float()

    def forward(self, batch: Batch, epsilon: torch.Tensor, kl_weight: float = 1.0) -> dict[str, torch.Tensor]:
        """Mean loss per cell and its parts. epsilon: (n_cells, n_latent), standard normal."""
        pcs = self.pcs(batch)
        mean, log_var = self.encoder(torch.cat([pcs, self.label(batch.cell_type_idx)], dim=1)).float().chunk(2, dim=1)
        log_var = log_var.clamp(-10, 6)
        error = self.decode(mean + (0.5 * log_var).exp() * epsilon, batch.cell_type_idx) - pcs
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
        standardised = self.decode(z, cell_type_idx) @ self.components.T
        return self.gene_mean + self.gene_scale * standardised, library_size

    sample = sampling.sample_cells


def _layers(sizes: tuple[int, ...], dropout: float) -> list[nn.Module]:
    return [
        layer
        for n_in, n_out in pairwise(sizes)
        for layer in (nn.Linear(n_in, n_out), nn.GELU(), nn.Dropout(dropout), nn.LayerNorm(n_out))
    ]
