"""scTAPE: an autoencoder that reads cell-type proportions out of a bulk profile.

Chen, Y. et al., "Deep autoencoder for interpretable tissue-adaptive deconvolution and cell-type-specific gene analysis",
Nature Communications 13, 6735 (2022). The bottleneck holds the proportions; the decoder, linear and without bias, maps them
back to the profile, so the product of its weights is the signature matrix. This is the part trained on simulated mixtures; the
adaptive stage is in `lib/deconvolution.py`.
"""

from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import nn

from lib.bulk.tables import sample_totals

HIDDEN = (512, 256, 128, 64)  # of the encoder; of the decoder in reverse


class ScTAPE(nn.Module):
    """
    Parameters
    ----------
    n_genes, n_cell_types
        Sizes of a profile and of the proportions.
    dropout
        Before every layer of the encoder but the last.
    """

    def __init__(self, n_genes: int, n_cell_types: int, dropout: float):
        super().__init__()
        self.arguments = dict(n_genes=n_genes, n_cell_types=n_cell_types, dropout=dropout)
        sizes = (n_genes, *HIDDEN)
        layers = []
        for n_in, n_out in zip(sizes, sizes[1:]):
            layers += [nn.Dropout(dropout), nn.Linear(n_in, n_out), nn.CELU()]
        self.encoder = nn.Sequential(*layers, nn.Linear(HIDDEN[-1], n_cell_types))
        sizes = (n_cell_types, *reversed(HIDDEN), n_genes)
        self.decoder = nn.Sequential(*(nn.Linear(n_in, n_out, bias=False) for n_in, n_out in zip(sizes, sizes[1:])))
        self.register_buffer("gene_mean", torch.zeros(n_genes))
        self.register_buffer("gene_scale", torch.ones(n_genes))

    @staticmethod
    def from_checkpoint(checkpoint: dict[str, Any]) -> "ScTAPE":
        model = ScTAPE(**checkpoint["arguments"])
        model.load_state_dict(checkpoint["weights"])
        return model.eval()

    def initialise(self, profiles: torch.Tensor) -> None:
        """Keep the genes' mean and spread over the training mixtures: the network sees each gene in units of its spread."""
        self.gene_mean.copy_(profiles.mean(dim=0))
        self.gene_scale.copy_(profiles.std(dim=0) + 0.01)

    def standardised(self, profiles: torch.Tensor) -> torch.Tensor:
        return (profiles - self.gene_mean) / self.gene_scale

    def forward(self, profiles: torch.Tensor, proportions: torch.Tensor) -> dict[str, torch.Tensor]:
        """Mean absolute errors of the proportions and of the reconstructed profile, and their sum: what to minimise.

        profiles: as `scale` gives them, (n_samples, n_genes); proportions: (n_samples, n_cell_types).
        """
        standardised = self.standardised(profiles)
        raw = self.encoder(standardised)
        proportion_loss = (raw - proportions).abs().mean()
        reconstruction_loss = (self.decoder(raw) - standardised).abs().mean()
        return {
            "loss": proportion_loss + reconstruction_loss,
            "proportion_loss": proportion_loss,
            "reconstruction_loss": reconstruction_loss,
        }

    def proportions(self, profiles: torch.Tensor) -> torch.Tensor:
        """What is predicted: the raw proportions without their negative part, scaled to sum to 1."""
        positive = (
            torch.relu(self.encoder(self.standardised(profiles))) + 1e-9
        )  # a sample without any positive part: all types alike
        return positive / positive.sum(dim=1, keepdim=True)

    def signature_matrix(self) -> torch.Tensor:
        """(n_cell_types, n_genes): the decoded profile of each pure type, on the scale of `scale`."""
        with torch.no_grad():
            pure = torch.eye(self.arguments["n_cell_types"], device=self.gene_mean.device)
            return torch.relu(self.decoder(pure) * self.gene_scale + self.gene_mean)


def scale(tpm: np.ndarray) -> np.ndarray:
    """What the network sees of profiles: log(1 + transcripts per 10,000 of the given genes).

    The original takes log(1 + TPM), scaled to 0..1 within each sample. Per million, a gene of a few counts weighs as much as
    one of thousands: on held-out cells of pbmc3k's train part that costs a third of the accuracy.

    Parameters
    ----------
    tpm
        Samples x the network's genes, non-negative, in any unit that is proportional to the number of transcripts. The
        genes that a bulk has besides do not count, so both sides are on one scale.

    Returns
    -------
    float32, same shape.

    Raises
    ------
    ValueError
        For a sample without expression in these genes.
    """
    return np.log1p(tpm / sample_totals(tpm) * 1e4).astype(np.float32)


def complete(bulk: pd.DataFrame, gene_names: list[str], mean_profile: np.ndarray) -> np.ndarray:
    """The bulk's values for the network's genes; a gene that the bulk lacks gets its mean share in the training mixtures.

    Parameters
    ----------
    bulk
        Samples x genes, TPM.
    gene_names, mean_profile
        The network's genes and their mean share of a training mixture, in the same order.

    Returns
    -------
    Samples x the network's genes.
    """
    values = bulk.reindex(columns=gene_names).to_numpy(dtype=np.float64)
    missing = ~np.isin(gene_names, bulk.columns)
    if missing.any():
        share = mean_profile[missing] / mean_profile[~missing].sum()
        values[:, missing] = values[:, ~missing].sum(axis=1, keepdims=True) * share
    return values


@torch.no_grad()
def predict(checkpoint: dict[str, Any], bulk: pd.DataFrame) -> pd.DataFrame:
    """Cell-type proportions of bulk samples.

    Parameters
    ----------
    checkpoint
        models/sctape.pt.
    bulk
        Samples x genes, TPM (or counts per million, for UMI counts); more genes than the network's do no harm.

    Returns
    -------
    Samples x cell types, rows sum to 1.

    Raises
    ------
    ValueError
        If the bulk has too few of the network's genes.
    """
    gene_names = checkpoint["gene_names"]
    coverage = np.isin(gene_names, bulk.columns).mean()
    least = checkpoint["constants"]["MIN_GENE_COVERAGE"]
    if coverage < least:
        known = set(gene_names)
        raise ValueError(
            f"the bulk has {coverage:.0%} of the {len(gene_names):,} genes that scTAPE was trained on, expected at least {least:.0%} "
            f"(its genes: {', '.join(map(str, bulk.columns[:3]))}; {sum(g in known for g in bulk.columns):,} of {bulk.shape[1]:,} are known); "
            "train on the bulk's genes: _4_train_sctape.py --bulk-file"
        )
    if coverage < 1:
        print(
            f"the bulk has {coverage:.1%} of scTAPE's {len(gene_names):,} genes; the others take their mean share in the training mixtures"
        )
    model = ScTAPE.from_checkpoint(checkpoint)
    profiles = scale(complete(bulk, gene_names, checkpoint["mean_profile"].numpy()))
    return pd.DataFrame(
        model.proportions(torch.from_numpy(profiles)).numpy(), index=bulk.index, columns=checkpoint["cell_types"]
    )
