"""Bulk2Single's beta-VAE: cells of a type are made by encoding real ones of that type and decoding them with other noise.

    z | x ~ Normal(mean(x), variance(x))            genes-2048-1024-512-256, and the same in reverse
    loss  = |x - decoder(z)|^2 + 4 KL(q(z|x) || Normal(0, 1)),  x = log(1 + counts per 10,000), sums over genes and dimensions

Source: omicverse's Bulk2Single (Zeng et al., omicverse, Nature Communications 15, 5983, 2024), after Bulk2Space (Liao et al., Nature
Communications 13, 6498, 2022); beta: Higgins et al., ICLR 2017. Theirs are the sizes and the settings. Ours: the decoder's
bias starts at the mean expression, counts are drawn (lib/drawing.py), q(z|x) starts narrow, and the weight of the KL rises over
the first epochs: otherwise z is noise when the decoder begins to learn, stays unused (pbmc3k), and all types are made alike.
"""

from collections.abc import Iterator

import numpy as np
import scipy.sparse as sp
import torch
import torch.nn.functional as F
from torch import nn

from lib.baselines import expression_sampling as drawing
from lib.data.batches import Batch, CellDataset
from lib.models.layers import SparseLinear
from lib.models.likelihoods import gaussian_kl
from lib.models.profiles import type_profiles

SETTINGS = {
    "epochs": 5000, "batch_size": 512, "learning_rate": 1e-4, "weight_decay": 5e-4, "patience": 50, "optimizer": "adamw",
    "kl_weight": (0.0, 1.0), "kl_warmup_epochs": 100,
}  # fmt: skip
HIDDEN = (2048, 1024, 512)
BETA = 4.0
START_LOG_VARIANCE = -6.0  # of q(z|x)


class BetaVAE(nn.Module):
    """
    Parameters
    ----------
    n_genes, n_cell_types
        Sizes of the data.
    n_latent, hidden
        Dimensions of z; layers from the genes down, and in reverse.
    top_markers
        The encoder sees that many marker genes of each type alone; None for all genes. The decoder makes all in any case.
    """

    def __init__(
        self, n_genes: int, n_cell_types: int, n_latent: int = 256, hidden: tuple[int, ...] = HIDDEN, top_markers: int | None = None
    ):  # fmt: skip
        super().__init__()
        self.arguments = dict(
            n_genes=n_genes, n_cell_types=n_cell_types, n_latent=n_latent, hidden=tuple(hidden), top_markers=top_markers
        )
        self.n_cell_types, self.n_latent, self.top_markers = n_cell_types, n_latent, top_markers
        self.from_genes, self.from_genes_bias = SparseLinear(n_genes, hidden[0]), nn.Parameter(torch.zeros(hidden[0]))
        self.encoder = nn.Sequential(*_layers(hidden), nn.Linear(hidden[-1], 2 * n_latent))
        self.decoder = nn.Sequential(*_layers((n_latent, *reversed(hidden))), nn.Linear(hidden[0], n_genes))
        self.register_buffer("is_seen", torch.ones(n_genes))
        self.prior: dict[str, torch.Tensor] | None = None

    @torch.no_grad()
    def initialise(self, dataset: CellDataset) -> None:
        """Start at the train cells' mean expression; choose the marker genes."""
        total, n_cells = 0.0, 0
        for batch in dataset.in_order(512):
            total = total + batch.log_normalized(drawing.TARGET).to_dense().sum(dim=0)
            n_cells += batch.n_cells
        self.decoder[-1].bias.copy_((total / n_cells).cpu())
        self.encoder[-1].weight[: self.n_latent] *= 3  # z starts above its noise: wider means, narrower q(z|x)
        self.encoder[-1].bias[self.n_latent :] = START_LOG_VARIANCE
        if self.top_markers is not None:
            self.is_seen.zero_()[torch.from_numpy(marker_genes(dataset, self.n_cell_types, self.top_markers))] = 1.0

    def q_z(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """q(z|x): mean and log-variance, each (n_cells, n_latent). x: sparse, n_cells x n_genes."""
        seen = self.from_genes(x if self.top_markers is None else _masked(x, self.is_seen))
        mean, log_var = self.encoder(F.relu(seen + self.from_genes_bias)).float().chunk(2, dim=1)
        return mean, log_var.clamp(-10, 6)

    def forward(self, batch: Batch, noise: torch.Tensor, kl_weight: float = 1.0) -> dict[str, torch.Tensor]:
        """Mean loss per cell and its parts. noise: (n_cells, n_latent), standard normal."""
        x = batch.log_normalized(drawing.TARGET)
        mean, log_var = self.q_z(x)
        reconstructed = self.decoder(mean + (0.5 * log_var).exp() * noise).float()
        reconstruction_loss = (reconstructed - x.to_dense()).square().sum(dim=1).mean()
        kl_z = gaussian_kl(mean, log_var, torch.zeros_like(mean), torch.zeros_like(mean)).mean()
        return {
            "loss": reconstruction_loss + BETA * kl_weight * kl_z,
            "reconstruction_loss": reconstruction_loss,
            "kl_z": kl_z,
        }

    @torch.no_grad()
    def fit_prior(self, dataset: CellDataset, seed: int) -> None:
        """Keep where the train cells lie: new cells start there."""
        self.prior = drawing.train_cells(dataset, self.n_cell_types, np.random.default_rng(seed))
        encoded = [
            torch.stack(self.q_z(batch.log_normalized(drawing.TARGET)), dim=1).cpu() for batch in dataset.in_order(512)
        ]
        self.prior["z"] = torch.cat(encoded)[self.prior["rows"]]  # (n_points, 2, n_latent): mean, log-variance
        self.prior["gene_ratio"] = drawing.gene_ratio(self, dataset, self.n_cell_types, seed)

    def draw(
        self, cell_type_idx: torch.Tensor, noise_factor: float, generator: torch.Generator
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Expected expression and library size of new cells: see lib/drawing.py."""
        point = drawing.pick(self.prior, cell_type_idx, generator).cpu()
        mean, log_var = self.prior["z"][point].to(cell_type_idx.device).unbind(dim=1)
        noise = torch.randn(mean.shape, generator=generator, device=mean.device)
        return self.decoder(mean + noise_factor * (0.5 * log_var).exp() * noise), self.prior["library_size"][point].to(
            mean.device
        )

    def sample(
        self, cell_type_idx: np.ndarray, seed: int, noise_factor: float = 1.0, blocks: range | None = None
    ) -> Iterator[sp.csr_matrix]:
        """New cells of the given types: as `GMVAE.sample`."""
        return drawing.sample(self, cell_type_idx, seed, noise_factor, blocks)


def _layers(sizes: tuple[int, ...]) -> list[nn.Module]:
    return [layer for n_in, n_out in zip(sizes, sizes[1:]) for layer in (nn.Linear(n_in, n_out), nn.ReLU())]


def _masked(x: torch.Tensor, is_seen: torch.Tensor) -> torch.Tensor:
    """A sparse matrix without some columns' values."""
    return torch.sparse_csr_tensor(
        x.crow_indices(), x.col_indices(), x.values() * is_seen[x.col_indices()], x.shape, check_invariants=False
    )


def marker_genes(dataset: CellDataset, n_cell_types: int, n_markers: int) -> np.ndarray:
    """Places of the genes of largest fold change in each type over the mean of all types, the union over types."""
    profiles = type_profiles(dataset, n_cell_types)
    change = np.log((profiles + 1e-5) / (profiles.mean(axis=0) + 1e-5))  # 1e-5: a tenth of a count per 10,000
    return np.unique(np.argsort(-change, axis=1, kind="stable")[:, :n_markers])
