"""The bulk encoder: predicts, from a bulk profile, the proportions of the cell types and the states of each type's cells.

    profile -> 600 -> 300 -> proportions; for each type, mean and log-scale of its cells' z on the state axes

It is trained on mixtures of train cells that favour some states (lib/bulk/bulk_states.py); the z of their cells are known. For
a new bulk, z is sampled from the prior of each type, then shifted and scaled as the encoder predicts: the bulk changes the
cells themselves, not only their numbers. The encoder minimises squared errors, so what a bulk does not tell is predicted as
the mean of the train cells. Only DECONVOLUTION = "bulk_encoder" uses it.

Source: bulk2sc (scGMVAE, bulk encoder), an older system of the same authors (Kang et al.), whose bulk encoder learns mean,
variance and proportion of each component of a Gaussian mixture. The layer sizes (hidden 600, latent 300) and Adam at 1e-3 are those
of its current code. Ours: batch size, dropout and early stopping (constants of stage 4; theirs: 200 + 1,000 epochs), the
training mixtures, axes in place of single dimensions of z, and `with_genes`, which changes single genes where bulk and
generated cells differ more than genes do in general; z cannot express a state that the GMVAE was not trained on.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch
from torch import nn

from lib.bulk.network_input import check_coverage, complete, scale
from lib.bulk.pseudobulk import largest_remainder, tpm
from lib.data.counts import digest
from lib.files import replacing
from lib.models.gmvae import GMVAE
from lib.models.layers import mlp
from lib.models.sampling import Shift, generate

INPUT_NOISE = 2.0  # standard deviations of Gaussian noise on each gene in training, so that no gene decides alone
THRESHOLD = 2.0  # a gene changes by the part of its log ratio, bulk over cells, beyond so many standard deviations
GENES_ALIKE = 500  # genes of similar expression, over which this standard deviation is taken
PSEUDO_TPM = 20.0  # added to both sides of the ratio, which shrinks the ratios of lowly expressed genes
CELLS_SUMMED = 1000  # generated cells per sample whose sum is compared with the bulk
MIN_CELLS = 60  # train cells that a type needs to be shifted; the states of rarer types are not known well enough


class BulkEncoder(nn.Module):
    """
    Parameters
    ----------
    n_genes, n_cell_types, n_axes
        Length of a profile, number of proportions, and number of state axes.
    hidden, n_latent, dropout
        Sizes of the two layers, and their dropout rate.
    """

    gene_mean: torch.Tensor  # (n_genes,) over the training mixtures
    gene_scale: torch.Tensor  # (n_genes,) standard deviation over the training mixtures, plus 0.01
    moves: torch.Tensor  # (n_cell_types,) 1: cells of the type are shifted; 0: they are not

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
            nn.init.zeros_(head.weight)
            nn.init.zeros_(head.bias)
        self.register_buffer("gene_mean", torch.zeros(n_genes))
        self.register_buffer("gene_scale", torch.ones(n_genes))
        self.register_buffer("moves", torch.ones(n_cell_types))

    def initialise(self, profiles: torch.Tensor, n_cells: np.ndarray) -> None:
        """Store each gene's mean and standard deviation over the training mixtures, and which types are shifted.

        n_cells: (n_cell_types,) number of train cells; a type with fewer than `MIN_CELLS` is not shifted.
        """
        self.moves.copy_(torch.from_numpy(n_cells >= MIN_CELLS))
        self.gene_mean.copy_(profiles.mean(dim=0))
        self.gene_scale.copy_(profiles.std(dim=0) + 0.01)

    def encode(self, profiles: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Predict proportions and states.

        Parameters
        ----------
        profiles
            Output of `network_input.scale`, (n_samples, n_genes).

        Returns
        -------
        proportions
            (n_samples, n_cell_types), rows sum to 1.
        mean, log_scale
            Each (n_samples, n_cell_types, n_axes): mean of the type's cells on the axes, in standard deviations of the train
            cells, and logarithm of their standard deviation over that of the train cells.
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
        """Errors of proportions, means and log-scales, and their sum, the training loss.

        Proportions: absolute error, times the number of types. States: squared error, over the types present in a mixture.
        """
        p, m, s = self.encode(profiles)
        present = ((proportions > 0) * self.moves)[:, :, None]
        present = present / (self.shape[1] * present.sum()).clamp(min=1)
        losses = {
            "proportion_loss": (p - proportions).abs().mean(),
            "mean_loss": ((m - mean).square() * present).sum(),
            "scale_loss": ((s - log_scale).square() * present).sum(),
        }
        return {"loss": self.shape[0] * losses["proportion_loss"] + losses["mean_loss"] + losses["scale_loss"]} | losses

    def validate(self, *data: torch.Tensor) -> dict[str, torch.Tensor]:
        """The losses, and `stopping_criterion`: their sum. data: as for `forward`."""
        losses = self(*data)
        return losses | {"stopping_criterion": losses["loss"]}


@torch.no_grad()
def read(checkpoint: dict[str, Any], bulk: pd.DataFrame) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Predict proportions, means and log-scales of bulk samples (TPM), in the form of `BulkEncoder.encode`.

    Raises
    ------
    ValueError
        If the bulk has too few of the encoder's genes.
    """
    check_coverage(checkpoint, bulk, "the bulk encoder", "_4_train_sctape.py --network bulk_encoder --bulk-file")
    model = BulkEncoder(**checkpoint["arguments"])
    model.load_state_dict(checkpoint["weights"])
    profiles = scale(complete(bulk, checkpoint["gene_names"], checkpoint["mean_profile"].numpy()))
    proportions, mean, log_scale = model.eval().encode(torch.from_numpy(profiles))
    return proportions.numpy(), mean.numpy(), log_scale.numpy()


def predict(checkpoint: dict[str, Any], bulk: pd.DataFrame) -> pd.DataFrame:
    """Predict cell-type proportions: samples x cell types, rows sum to 1. bulk: samples x genes, TPM."""
    return pd.DataFrame(read(checkpoint, bulk)[0], index=bulk.index, columns=checkpoint["cell_types"])


def states(checkpoint: dict[str, Any], bulk: pd.DataFrame) -> pd.DataFrame:
    """The states of the cells as a table: one row for each sample, cell type and state axis.

    Columns: sample, cell_type, axis (1, 2, ...; the first varies most between train cells), mean and spread of the type's cells on
    this axis. The unit is the standard deviation of the type's train cells, whose mean is 0 and whose spread is 1.
    """
    _, mean, log_scale = read(checkpoint, bulk)
    axes = range(1, mean.shape[2] + 1)
    rows = pd.MultiIndex.from_product(
        [bulk.index, checkpoint["cell_types"], axes], names=["sample", "cell_type", "axis"]
    )
    return pd.DataFrame({"mean": mean.ravel(), "spread": np.exp(log_scale).ravel()}, index=rows).reset_index()


def write_states(checkpoint: dict[str, Any], bulk: pd.DataFrame, path: Path) -> Path:
    """Write the table of `states` as csv to `path`, which is returned."""
    with replacing(path) as temporary:
        states(checkpoint, bulk).to_csv(temporary, index=False, float_format="%.6f")
    return path


def shift(checkpoint: dict[str, Any], bulk: pd.DataFrame) -> Shift:
    """The affine map of z for every sample of the bulk and, within the sample, every type.

    On the axes, a cell's coordinate relative to its type's mean is multiplied by the predicted scale, then the predicted mean is
    added. Components of z orthogonal to the axes stay.
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
    """Add to a shift the log ratio of each gene, bulk over the sum of the shifted cells, as far as it stands out.

    Of each log ratio only the part beyond `THRESHOLD` standard deviations is kept. The standard deviation is taken over genes of
    similar expression (median absolute deviation x 1.4826). It is set by platform differences, which affect all genes, so
    platform differences change no gene.

    Parameters
    ----------
    gene_names
        The GMVAE's genes; those that the bulk lacks do not change.
    gene_length_bp
        Lengths by which the bulk's counts were divided; genes without a length do not change. None if they were not divided.
    proportions
        Samples x cell types.
    bulk
        Samples x genes, TPM.
    """
    n_samples, n_types = proportions.shape
    n_cells = largest_remainder(proportions, CELLS_SUMMED)
    groups = np.arange(n_samples * n_types).repeat(n_cells.ravel())
    counts = generate(model, groups % n_types, seed, shift=moved, groups=groups)
    summed = sp.csr_matrix((np.ones(len(groups)), (groups // n_types, np.arange(len(groups))))) @ counts
    shared = np.isin(gene_names, bulk.columns) & (gene_length_bp is None or np.isin(gene_names, list(gene_length_bp)))
    genes = np.asarray(gene_names)[shared]
    lengths = None if gene_length_bp is None else pd.Series(gene_length_bp)[genes].to_numpy()
    observed = tpm(bulk[genes].to_numpy()) + PSEUDO_TPM
    generated = tpm(summed[:, shared].toarray(), lengths) + PSEUDO_TPM
    log_ratio = np.zeros((n_samples, len(gene_names)), np.float32)
    for i in range(n_samples):
        log_ratio[i, shared] = excess(np.log(observed[i] / generated[i]), observed[i] * generated[i])
    return moved._replace(log_ratio=torch.from_numpy(log_ratio))


def excess(log_ratio: np.ndarray, expression: np.ndarray) -> np.ndarray:
    """The part of each gene's log ratio beyond `THRESHOLD` standard deviations of genes of similar expression, 0 for most."""
    found = np.zeros(len(log_ratio))
    for alike in np.array_split(np.argsort(expression, kind="stable"), max(1, len(found) // GENES_ALIKE)):
        deviation = log_ratio[alike] - np.median(log_ratio[alike])
        spread = 1.4826 * np.median(np.abs(deviation))
        found[alike] = np.sign(deviation) * np.maximum(np.abs(deviation) - THRESHOLD * spread, 0)
    return found


def weights_id(model: nn.Module) -> str:
    """Twelve hexadecimal digits that change with any weight; they name the one GMVAE whose z a bulk encoder was trained on."""
    return digest([], *(value.cpu().numpy() for value in model.state_dict().values()))
