"""bulk2sc's bulk encoder: reads out of a bulk profile how many cells of each type it holds, and what state they are in.

    profile -> 600 -> 300 -> proportions; for each type, the mean and the scale of its cells' z

It learns them from mixtures of real cells that favour some states (lib/states.py), whose cells' z are known. New cells of a
bulk are then drawn from the type's prior, moved and scaled as the bulk says: the bulk moves the cells themselves, not only
their numbers. What a bulk cannot tell is left where the train cells have it, since the mean squared error is least there.

Source: bulk2sc (Kang et al.), whose bulk encoder learns the mean, variance and proportion of each component of a Gaussian
mixture; theirs are the sizes of the layers and Adam at 1e-3. Ours: the mixtures, and axes in place of single dimensions of z.
"""

from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import nn

from lib.counts import digest
from lib.layers import mlp
from lib.sctape import complete, scale


INPUT_NOISE = 2.0  # added to each gene of a training profile, in units of its spread: no gene is relied upon alone
MIN_CELLS = 60  # train cells that a type needs to be moved; the states of fewer are not known


class Shift(NamedTuple):
    """An affine map of z for groups of new cells (bulk sample x type): z becomes matrix @ z + offset."""

    matrix: torch.Tensor  # (n_groups, n_latent, n_latent)
    offset: torch.Tensor  # (n_groups, n_latent)


class BulkEncoder(nn.Module):
    """
    Parameters
    ----------
    n_genes, n_cell_types, n_axes
        Sizes of a profile, of the proportions, and of a type's state.
    hidden, n_latent, dropout
        Sizes of the two layers, and share of their units left out.
    """

    def __init__(self, n_genes: int, n_cell_types: int, n_axes: int, hidden: int = 600, n_latent: int = 300, dropout: float = 0.1):
        super().__init__()
        self.arguments = dict(n_genes=n_genes, n_cell_types=n_cell_types, n_axes=n_axes, hidden=hidden, n_latent=n_latent, dropout=dropout)
        self.shape = (n_cell_types, n_axes)
        self.body = mlp((n_genes, hidden, n_latent), dropout)
        self.to_proportions = nn.Linear(n_latent, n_cell_types)
        self.to_mean, self.to_log_scale = (nn.Linear(n_latent, n_cell_types * n_axes) for _ in range(2))
        for head in (self.to_mean, self.to_log_scale):
            nn.init.zeros_(head.weight), nn.init.zeros_(head.bias)
        self.register_buffer("gene_mean", torch.zeros(n_genes))
        self.register_buffer("gene_scale", torch.ones(n_genes))
        self.register_buffer("moves", torch.ones(n_cell_types))  # 0: a type that stays where it is

    def initialise(self, profiles: torch.Tensor, n_cells: np.ndarray) -> None:
        """Keep the genes' mean and spread over the training mixtures, and which types have the train cells, `n_cells`, to be moved."""
        self.moves.copy_(torch.from_numpy(n_cells >= MIN_CELLS))
        self.gene_mean.copy_(profiles.mean(dim=0))
        self.gene_scale.copy_(profiles.std(dim=0) + 0.01)

    def encode(self, profiles: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Proportions (n_samples, n_cell_types), which sum to 1; means and log-scales, each (n_samples, n_cell_types, n_axes).

        profiles: as `sctape.scale` gives them, (n_samples, n_genes).
        """
        standardised = (profiles - self.gene_mean) / self.gene_scale
        if self.training:
            standardised = standardised + INPUT_NOISE * torch.randn_like(standardised)
        h = self.body(standardised)
        mean, log_scale = (head(h).unflatten(1, self.shape) * self.moves[:, None] for head in (self.to_mean, self.to_log_scale))
        return self.to_proportions(h).softmax(dim=1), mean, log_scale

    def forward(self, profiles: torch.Tensor, proportions: torch.Tensor, mean: torch.Tensor, log_scale: torch.Tensor) -> dict[str, torch.Tensor]:
        """Errors of the three, and their sum: absolute for proportions, times the number of types; squared for the states, over types present."""
        p, m, s = self.encode(profiles)
        present = ((proportions > 0) * self.moves)[:, :, None]
        present = present / (self.shape[1] * present.sum()).clamp(min=1)
        losses = {
            "proportion_loss": (p - proportions).abs().mean(),
            "mean_loss": ((m - mean).square() * present).sum(),
            "scale_loss": ((s - log_scale).square() * present).sum(),
        }
        return {"loss": self.shape[0] * losses["proportion_loss"] + losses["mean_loss"] + losses["scale_loss"]} | losses


@torch.no_grad()
def read(checkpoint: dict[str, Any], bulk: pd.DataFrame) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What the encoder reads out of bulk samples (TPM): proportions, means, log-scales, as `BulkEncoder.encode` gives them.

    Raises
    ------
    ValueError
        If the bulk has too few of the encoder's genes.
    """
    gene_names = checkpoint["gene_names"]
    coverage, least = np.isin(gene_names, bulk.columns).mean(), checkpoint["constants"]["MIN_GENE_COVERAGE"]
    if coverage < least:
        raise ValueError(
            f"the bulk has {coverage:.0%} of the {len(gene_names):,} genes that the bulk encoder was trained on, expected at least {least:.0%}; "
            "train on the bulk's genes: _4_train_sctape.py --deconvolver bulk_encoder --bulk-file"
        )
    model = BulkEncoder(**checkpoint["arguments"])
    model.load_state_dict(checkpoint["weights"])
    profiles = scale(complete(bulk, gene_names, checkpoint["mean_profile"].numpy()))
    return tuple(part.numpy() for part in model.eval().encode(torch.from_numpy(profiles)))


def predict(checkpoint: dict[str, Any], bulk: pd.DataFrame) -> pd.DataFrame:
    """Cell-type proportions of bulk samples, samples x cell types, rows sum to 1. bulk: samples x genes, TPM."""
    return pd.DataFrame(read(checkpoint, bulk)[0], index=bulk.index, columns=checkpoint["cell_types"])


def shift(checkpoint: dict[str, Any], bulk: pd.DataFrame) -> Shift:
    """How z of new cells moves, for every sample of the bulk and, within it, every type.

    On the axes, a cell's place about its type's middle is multiplied by the scale and moved by the mean; what lies beside the
    axes stays.
    """
    means, log_scales = (torch.from_numpy(part) for part in read(checkpoint, bulk)[1:])
    axes = checkpoint["axes"]
    vectors, middle = axes["axes"], axes["middle"].repeat(len(bulk), 1)
    n_latent, n_axes = vectors.shape
    means, scales = means.reshape(-1, n_axes), log_scales.reshape(-1, n_axes).exp()
    matrix = torch.eye(n_latent) + torch.einsum("ia,ga,ja->gij", vectors, scales - 1, vectors)
    offset = middle - torch.einsum("gij,gj->gi", matrix, middle) + (means * axes["spread"]) @ vectors.T
    return Shift(matrix, offset)


def weights_id(model: nn.Module) -> str:
    """Twelve hexadecimal digits that change with any weight: the encoder serves the GMVAE it was trained for alone."""
    return digest([], *(value.cpu().numpy() for value in model.state_dict().values()))
