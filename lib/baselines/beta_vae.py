"""The beta-VAE of Bulk2Single: a new cell of a type is a train cell of that type, encoded, sampled and decoded.

    z | x ~ Normal(mean(x), variance(x))            genes-2048-1024-512-256, and the same in reverse
    loss  = |x - decoder(z)|^2 + 4 KL(q(z|x) || Normal(0, 1)),  x = log(1 + counts per 10,000), sums over genes and dimensions

Source: Bulk2Single in omicverse (Zeng et al., Nature Communications 15, 5983, 2024), after Bulk2Space (Liao et al., Nature
Communications 13, 6498, 2022); beta: Higgins et al., ICLR 2017. Sizes and settings are the published ones. Ours: the decoder's
bias starts at the mean expression, q(z|x) starts narrow and the weight of the KL rises over the first epochs (otherwise, on
pbmc3k, z stays unused and all generated types are alike), and counts are sampled (lib/baselines/expression_sampling.py).
"""

from itertools import pairwise
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from lib.baselines import expression_sampling as sampling
from lib.data.batches import Batch, CellDataset
from lib.models.layers import SparseLinear, scaled_columns
from lib.models.likelihoods import standard_normal_kl
from lib.models.profiles import log_fold_changes, top_genes, type_profiles

SETTINGS = {
    "epochs": 5000, "batch_size": 512, "learning_rate": 1e-4, "weight_decay": 5e-4, "patience": 50, "optimizer": "adamw",
    "kl_weight": (0.0, 1.0), "kl_warmup_epochs": 100,
}  # fmt: skip
HIDDEN = (2048, 1024, 512)
BETA = 4.0
START_LOG_VARIANCE = -6.0  # of q(z|x)
START_MEAN_SCALE = 3  # factor of the weights of q(z|x)'s mean


class BetaVAE(nn.Module):
    """
    Parameters
    ----------
    n_genes, n_cell_types
        Sizes of the data.
    n_latent, hidden
        Dimensions of z; hidden layers of the encoder, and of the decoder in reverse.
    top_markers
        Number of marker genes of each type that the encoder uses; None for all genes. The decoder always returns all genes.
    """

    is_used: torch.Tensor

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
        self.register_buffer("is_used", torch.ones(n_genes))  # 1 for the genes that the encoder uses
        self.prior: dict[str, torch.Tensor] = {}

    @torch.no_grad()
    def initialise(self, dataset: CellDataset) -> None:
        """Set the start: the decoder's bias to the train cells' mean expression, q(z|x) narrow; select the marker genes."""
        total = torch.zeros(dataset.n_genes, device=dataset.device)
        for batch in dataset.in_order(512):
            total += batch.log_normalized(sampling.TARGET).to_dense().sum(dim=0)
        to_genes, to_z = cast(nn.Linear, self.decoder[-1]), cast(nn.Linear, self.encoder[-1])
        to_genes.bias.copy_((total / len(dataset)).cpu())
        to_z.weight[: self.n_latent] *= START_MEAN_SCALE
        to_z.bias[self.n_latent :] = START_LOG_VARIANCE
        if self.top_markers is not None:
            self.is_used.zero_()[torch.from_numpy(marker_genes(dataset, self.n_cell_types, self.top_markers))] = 1.0

    def q_z(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """q(z|x): mean and log-variance, each (n_cells, n_latent). x: sparse, n_cells x n_genes."""
        hidden = self.from_genes(x if self.top_markers is None else scaled_columns(x, self.is_used))
        mean, log_var = self.encoder(F.relu(hidden + self.from_genes_bias)).float().chunk(2, dim=1)
        return mean, log_var.clamp(-10, 6)

    def forward(self, batch: Batch, epsilon: torch.Tensor, kl_weight: float = 1.0) -> dict[str, torch.Tensor]:
        """Mean loss per cell and its parts. epsilon: (n_cells, n_latent), standard normal."""
        x = batch.log_normalized(sampling.TARGET)
        mean, log_var = self.q_z(x)
        reconstructed = self.decoder(mean + (0.5 * log_var).exp() * epsilon).float()
        reconstruction_loss = (reconstructed - x.to_dense()).square().sum(dim=1).mean()
        kl_z = standard_normal_kl(mean, log_var).mean()
        loss = reconstruction_loss + BETA * kl_weight * kl_z
        return {"loss": loss, "reconstruction_loss": reconstruction_loss, "kl_z": kl_z}

    @torch.no_grad()
    def fit_prior(self, dataset: CellDataset, seed: int) -> None:
        """Keep q(z|x) of train cells, from which new cells are sampled."""
        self.prior = sampling.select_train_cells(dataset, self.n_cell_types, seed)
        batches = (batch.log_normalized(sampling.TARGET) for batch in dataset.in_order(512))
        q_z = torch.cat([torch.stack(self.q_z(x), dim=1).cpu() for x in batches])
        self.prior["z"] = q_z[self.prior["rows"]]  # (n_selected, 2, n_latent): mean, log-variance
        self.prior["gene_ratio"] = sampling.fit_gene_ratio(self, dataset, seed)

    def sample_expression(
        self, cell_type_idx: torch.Tensor, latent_spread: float, generator: torch.Generator
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """log(1 + counts per 10,000), (n_cells, n_genes), and library size, (n_cells,), of new cells."""
        train_cells, library_size = sampling.sample_train_cells(self.prior, cell_type_idx, generator)
        mean, log_var = self.prior["z"][train_cells].to(cell_type_idx.device).unbind(dim=1)
        epsilon = torch.randn(mean.shape, generator=generator, device=mean.device)
        return self.decoder(mean + latent_spread * (0.5 * log_var).exp() * epsilon), library_size

    sample = sampling.sample_cells


def _layers(sizes: tuple[int, ...]) -> list[nn.Module]:
    return [layer for n_in, n_out in pairwise(sizes) for layer in (nn.Linear(n_in, n_out), nn.ReLU())]


def marker_genes(dataset: CellDataset, n_cell_types: int, n_markers: int) -> np.ndarray:
    """Indices of the `n_markers` genes of largest fold change of each type over the other types: the union over types."""
    expression = sampling.TARGET * type_profiles(dataset, n_cell_types)
    return np.unique(top_genes(log_fold_changes(expression), n_markers))
