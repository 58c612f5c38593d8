"""bulk2sc's bulk encoder: reads out of a bulk profile how many cells of each type it holds, and what state they are in.

    profile -> 600 -> 300 -> proportions; for each type, the mean and the scale of its cells' z

It learns them from mixtures of real cells that favour some states (lib/states.py), whose cells' z are known. New cells of a
bulk are then drawn from the type's prior, moved and scaled as the bulk says: the bulk moves the cells themselves, not only
their numbers. What a bulk cannot tell is left where the train cells have it, since the mean squared error is least there.

Source: bulk2sc (Kang et al.), whose bulk encoder learns the mean, variance and proportion of each component of a Gaussian
mixture; theirs are the sizes of the layers and Adam at 1e-3. Ours: the mixtures, axes in place of single dimensions of z, and
`with_genes`, which moves single genes where a bulk differs from the moved cells more than genes in general do: z can express
no state that the GMVAE has not seen.
"""

from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch
from torch import nn

from lib.bulk.pseudobulk import largest_remainder, tpm
from lib.bulk.sctape import complete, scale
from lib.data.counts import digest
from lib.models.gmvae import GMVAE
from lib.models.layers import mlp

INPUT_NOISE = 2.0  # added to each gene of a training profile, in units of its spread: no gene is relied upon alone
THRESHOLD = 2.0  # spreads of the genes' log ratios, bulk over cells, by which all are drawn to 0
GENES_ALIKE = 500  # of like expression, of which a spread is taken
PSEUDO_TPM = 20.0  # added to both sides of the ratio: a gene of fewer transcripts per million says little
CELLS_SUMMED = 1000  # of each sample, to be compared with the bulk
MIN_CELLS = 60  # train cells that a type needs to be moved; the states of fewer are not known


class Shift(NamedTuple):
    """An affine map of z for groups of new cells (bulk sample x type): z becomes matrix @ z + offset."""

    matrix: torch.Tensor  # (n_groups, n_latent, n_latent)
    offset: torch.Tensor  # (n_groups, n_latent)
    log_ratio: torch.Tensor | None = None  # (n_samples, n_genes), added to the logits of all of a sample's cells


class BulkEncoder(nn.Module):
    """
    Parameters
    ----------
    n_genes, n_cell_types, n_axes
        Sizes of a profile, of the proportions, and of a type's state.
    hidden, n_latent, dropout
        Sizes of the two layers, and share of their units left out.
    """

    def __init__(
        self, n_genes: int, n_cell_types: int, n_axes: int, hidden: int = 600, n_latent: int = 300, dropout: float = 0.1
    ):
        super().__init__()
        self.arguments = dict(
            n_genes=n_genes, n_cell_types=n_cell_types, n_axes=n_axes, hidden=hidden, n_latent=n_latent, dropout=dropout
        )
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
        mean, log_scale = (
            head(h).unflatten(1, self.shape) * self.moves[:, None] for head in (self.to_mean, self.to_log_scale)
        )
        return self.to_proportions(h).softmax(dim=1), mean, log_scale

    def forward(
        self, profiles: torch.Tensor, proportions: torch.Tensor, mean: torch.Tensor, log_scale: torch.Tensor
    ) -> dict[str, torch.Tensor]:
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


def with_genes(
    moved: Shift,
    model: GMVAE,
    gene_names: list[str],
    gene_length_bp: dict[str, float] | None,
    proportions: np.ndarray,
    bulk: pd.DataFrame,
    seed: int,
) -> Shift:
    """The shift with a log ratio of every gene, of what the bulk has over what the moved cells sum to.

    A gene's ratio counts as far as it exceeds `THRESHOLD` times the spread of the ratios of genes of like expression (the median
    absolute deviation, scaled to a standard deviation): differences of platform, which all genes share, set that spread and
    move nothing.

    Parameters
    ----------
    gene_names
        The GMVAE's genes; those that the bulk lacks stay.
    gene_length_bp
        By which the bulk's counts were divided; genes without a length stay. None if they were not divided.
    proportions
        Samples x types.
    bulk
        Samples x genes, TPM.
    """
    n_samples, n_types = proportions.shape
    n_cells = largest_remainder(proportions, CELLS_SUMMED)
    groups = np.arange(n_samples * n_types).repeat(n_cells.ravel())
    counts = sp.vstack(list(model.sample(groups % n_types, seed, shift=moved, groups=groups)), format="csr")
    summed = sp.csr_matrix((np.ones(len(groups)), (groups // n_types, np.arange(len(groups))))) @ counts
    shared = np.isin(gene_names, bulk.columns) & (gene_length_bp is None or np.isin(gene_names, list(gene_length_bp)))
    genes = np.asarray(gene_names)[shared]
    lengths = None if gene_length_bp is None else pd.Series(gene_length_bp)[genes].to_numpy()
    seen = tpm(bulk[genes].to_numpy()) + PSEUDO_TPM
    made = tpm(summed[:, shared].toarray(), lengths) + PSEUDO_TPM
    ratio = np.log(seen / made)
    log_ratio = np.zeros((n_samples, len(gene_names)), np.float32)
    for i in range(n_samples):
        excess = np.zeros(len(genes))
        by_expression = np.argsort(seen[i] * made[i], kind="stable")
        for alike in np.array_split(by_expression, max(1, len(genes) // GENES_ALIKE)):
            beyond = ratio[i, alike] - np.median(ratio[i, alike])
            spread = 1.4826 * np.median(np.abs(beyond))
            excess[alike] = np.sign(beyond) * np.maximum(np.abs(beyond) - THRESHOLD * spread, 0)
        log_ratio[i, shared] = excess
    return moved._replace(log_ratio=torch.from_numpy(log_ratio))


def weights_id(model: nn.Module) -> str:
    """Twelve hexadecimal digits that change with any weight: the encoder serves the GMVAE it was trained for alone."""
    return digest([], *(value.cpu().numpy() for value in model.state_dict().values()))
