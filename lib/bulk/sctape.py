"""scTAPE: an autoencoder that predicts cell-type proportions from a bulk profile. DECONVOLUTION = "sctape..." uses it.

Chen, Y. et al., "Deep autoencoder for interpretable tissue-adaptive deconvolution and cell-type-specific gene analysis",
Nature Communications 13, 6735 (2022). The bottleneck holds the proportions. The decoder is linear without bias and maps the
proportions back to the profile, so the product of its weights is a signature matrix. `adapt` is the published adaptive stage,
which updates decoder and encoder in turn on an unlabelled bulk. Ours is the augmentation: in training, every mixture is
measured by a simulated platform of its own. The input of the network is at the end of this file.
"""

import copy
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import anndata as ad
import numpy as np
import pandas as pd
import torch
from sklearn.preprocessing import StandardScaler, minmax_scale
from torch import nn
from tqdm import tqdm

from lib.bulk.pseudobulk import gene_lengths, is_for_fit, sample_totals, tpm
from lib.run import detail

HIDDEN = (512, 256, 128, 64)  # hidden layers of the encoder; of the decoder in reverse order
ADAPT_ROUNDS, ADAPT_STEPS, ADAPT_LEARNING_RATE = 3, 300, 1e-4  # of the adaptive stage (original code)
MIN_DEPTH, MAX_DEPTH, MAX_MISSING = 2e4, 2e6, 0.2  # augmentation: transcripts in the network's genes; share of genes

Adaptation = Literal["none", "overall", "per-sample"]
# rows and counts of the training mixtures, block by block, of some genes (None: all): `pseudobulk.train_mixtures`
Blocks = Callable[[np.ndarray | None], Iterator[tuple[slice, np.ndarray]]]


class ScTAPE(nn.Module):
    """The network. dropout: rate before every layer of the encoder except the last; platform_sd: of `augment`, 0 for none.

    minmax: the input is scaled to 0..1 within each sample, as published, not standardised by gene; without augmentation only.
    """

    mixed_precision = True  # trained in bfloat16 on a GPU
    gene_mean: torch.Tensor  # (n_genes,) over the training mixtures
    gene_scale: torch.Tensor  # (n_genes,) standard deviation over the training mixtures, plus 0.01
    mean_share: torch.Tensor  # (n_genes,) share of a gene in a training mixture

    def __init__(self, n_genes: int, n_cell_types: int, dropout: float, platform_sd: float = 0.0, minmax: bool = False):
        super().__init__()
        if minmax and platform_sd:
            raise ValueError(
                f"PLATFORM_SD is {platform_sd}, but SCALING is minmax, which hides transcripts; expected 0"
            )
        self.arguments: dict[str, Any] = dict(
            n_genes=n_genes, n_cell_types=n_cell_types, dropout=dropout, platform_sd=platform_sd, minmax=minmax
        )
        self.platform_sd = platform_sd
        layers: list[nn.Module] = []
        for n_in, n_out in pairwise((n_genes, *HIDDEN)):
            layers += [nn.Dropout(dropout), nn.Linear(n_in, n_out), nn.CELU()]
        self.encoder = nn.Sequential(*layers, nn.Linear(HIDDEN[-1], n_cell_types))
        sizes = (n_cell_types, *reversed(HIDDEN), n_genes)
        self.decoder = nn.Sequential(*(nn.Linear(n_in, n_out, bias=False) for n_in, n_out in pairwise(sizes)))
        self.register_buffer("gene_mean", torch.zeros(n_genes))
        self.register_buffer("gene_scale", torch.ones(n_genes))
        self.register_buffer("mean_share", torch.ones(n_genes) / n_genes)

    def initialise(self, profiles: torch.Tensor) -> None:
        """Store each gene's mean and standard deviation over the training mixtures, to standardise the input."""
        if self.arguments["minmax"]:
            return
        self.gene_mean.copy_(profiles.mean(dim=0))
        self.gene_scale.copy_(profiles.std(dim=0) + 0.01)
        self.mean_share.copy_(torch.expm1(profiles).mean(dim=0) / 1e4)

    def standardised(self, profiles: torch.Tensor) -> torch.Tensor:
        return (profiles - self.gene_mean) / self.gene_scale

    def forward(
        self, profiles: torch.Tensor, proportions: torch.Tensor, measured: torch.Tensor | None = None
    ) -> dict[str, torch.Tensor]:
        """Mean absolute errors: proportion_loss, reconstruction_loss, their sum, the loss, and, in evaluation, the stopping_criterion.

        profiles: (n_samples, n_genes), output of `scale`; proportions: (n_samples, n_cell_types). measured: what the encoder gets,
        the profiles as other platforms measure them; None: the profiles, augmented in training. The losses are of the encoder's raw
        output, the stopping criterion is of the predicted proportions, which are not negative and sum to 1.
        """
        if measured is None:
            is_augmented = self.training and self.platform_sd
            measured = augment(profiles, self.mean_share, self.platform_sd) if is_augmented else profiles
        raw = self.encoder(self.standardised(measured))
        proportion_loss = (raw - proportions).abs().mean()
        reconstruction_loss = (self.decoder(raw) - self.standardised(profiles)).abs().mean()
        losses = {"loss": proportion_loss + reconstruction_loss}
        losses |= {"proportion_loss": proportion_loss, "reconstruction_loss": reconstruction_loss}
        if not self.training:
            losses["stopping_criterion"] = (non_negative_shares(raw) - proportions).abs().mean()
        return losses

    def proportions(self, profiles: torch.Tensor) -> torch.Tensor:
        """Predicted proportions, (n_samples, n_cell_types), rows sum to 1."""
        return non_negative_shares(self.encoder(self.standardised(profiles)))

    def signature_matrix(self) -> torch.Tensor:
        """(n_cell_types, n_genes) decoded profile of each pure type, on the scale of `scale`."""
        with torch.no_grad():
            pure = torch.eye(self.arguments["n_cell_types"], device=self.gene_mean.device)
            return torch.relu(self.decoder(pure) * self.gene_scale + self.gene_mean)


def non_negative_shares(raw: torch.Tensor) -> torch.Tensor:
    """Negative values set to 0, rows scaled to sum to 1; a row without any positive value gets equal shares."""
    positive = torch.relu(raw) + 1e-9
    return positive / positive.sum(dim=1, keepdim=True)


def augment(
    profiles: torch.Tensor, mean_share: torch.Tensor, platform_sd: float, generator: torch.Generator | None = None
) -> torch.Tensor:
    """Profiles, (n_samples, n_genes), output of `scale`, as simulated platforms would measure them, each by one of its own.

    Every gene is multiplied by a log-normal platform factor; the standard deviation of its logarithm is uniform between 0 and
    `platform_sd`. Sampling noise is added (normal, with the variance of Poisson counts) for a depth between `MIN_DEPTH` and `MAX_DEPTH`,
    log-uniform. Up to `MAX_MISSING` of the genes get their mean_share, (n_genes,), as in `bulk_profiles`. The mRNA content of cells
    needs no augmentation: the network predicts shares of cells by counts, which stand for shares of RNA.
    """
    n, device = len(profiles), profiles.device
    sd, log_depth, missing = torch.rand(3, n, 1, generator=generator, device=device)
    factors, noise = torch.randn(2, *profiles.shape, generator=generator, device=device)
    per_10k = torch.expm1(profiles) * torch.exp(platform_sd * sd * factors)
    depth = MIN_DEPTH * (MAX_DEPTH / MIN_DEPTH) ** log_depth
    per_10k = torch.relu(per_10k + torch.sqrt(per_10k * 1e4 / depth) * noise)
    present = torch.rand(profiles.shape, generator=generator, device=device) >= MAX_MISSING * missing
    per_share = (per_10k * present).sum(dim=1, keepdim=True) / (mean_share * present).sum(dim=1, keepdim=True)
    per_10k = torch.where(present, per_10k, mean_share * per_share)
    return torch.log1p(per_10k / per_10k.sum(dim=1, keepdim=True) * 1e4)


def adapt(model: ScTAPE, profiles: torch.Tensor) -> ScTAPE:
    """A copy of the network, adapted to unlabelled bulk profiles, (n_samples, n_genes), by the published adaptive stage.

    In each round, `ADAPT_STEPS` steps update the decoder by the error (L1) of the reconstruction plus that of the signature matrix
    against the trained network's, and as many the encoder, with the proportions in place of the signature matrix. All samples at
    once: "overall"; one sample: "high-resolution".
    """
    model = copy.deepcopy(model).eval()
    target = model.standardised(profiles)
    pure = torch.eye(model.arguments["n_cell_types"], device=profiles.device)
    with torch.no_grad():
        first_signature, first_proportions = model.decoder(pure), model.proportions(profiles)
    parts = (model.decoder.parameters(), model.encoder.parameters())
    decoder, encoder = (torch.optim.Adam(parameters, lr=ADAPT_LEARNING_RATE) for parameters in parts)

    def step(optimizer: torch.optim.Optimizer, proportions: torch.Tensor, change: torch.Tensor) -> None:
        loss = (model.decoder(proportions) - target).abs().mean() + change.abs().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    for _ in range(ADAPT_ROUNDS):
        proportions = model.proportions(profiles).detach()
        for _ in range(ADAPT_STEPS):
            step(decoder, proportions, model.decoder(pure) - first_signature)
        for _ in range(ADAPT_STEPS):
            proportions = model.proportions(profiles)
            step(encoder, proportions, proportions - first_proportions)
    return model


class ScTAPEOutput(NamedTuple):
    proportions: pd.DataFrame  # samples x types, of cells by the counts of the train cells; rows sum to 1
    signatures: np.ndarray  # 1 or samples x types x genes: per 10,000 transcripts of these genes (minmax: as the input)


def predict(checkpoint: dict[str, Any], bulk: pd.DataFrame, adaptation: Adaptation = "none") -> ScTAPEOutput:
    """Predict the cell-type proportions of bulk samples (as for `bulk_profiles`) with the scTAPE network (models/sctape.pt).

    adaptation: "none": the network as trained; "overall": adapted once, to all samples (`adapt`); "per-sample": to each sample.
    """
    profiles = bulk_profiles(checkpoint, bulk, "scTAPE", "_4_train_sctape.py --bulk-file")
    trained = ScTAPE(**checkpoint["arguments"]).eval()
    trained.load_state_dict(checkpoint["weights"])
    groups, models = profiles.split(1) if adaptation == "per-sample" else (profiles,), [trained]
    if adaptation != "none":
        models = [adapt(trained, group) for group in tqdm(groups, desc="adapting scTAPE", leave=False)]
    with torch.no_grad():
        proportions = torch.cat([model.proportions(group) for model, group in zip(models, groups)])
        signatures = torch.stack([model.signature_matrix() for model in models])
    table = pd.DataFrame(proportions.numpy(), index=bulk.index, columns=checkpoint["cell_types"])
    return ScTAPEOutput(table, (signatures if trained.arguments["minmax"] else torch.expm1(signatures)).numpy())


# --- the input of the network, and of the bulk encoder


def scale(tpm: np.ndarray, minmax: bool = False) -> np.ndarray:
    """The network's input: log(1 + transcripts per 10,000 of the network's genes), float32, samples x genes.

    tpm: samples x the network's genes, in any unit proportional to the number of transcripts; the total is taken over these genes
    alone, so training mixtures and bulk are on one scale. minmax: as in the original, log(1 + TPM), scaled to 0..1 within each
    sample. With transcripts per million, genes with a few counts weigh as much as genes with thousands, which costs a third of
    the accuracy on held-out cells.
    """
    logs = np.log1p(tpm / sample_totals(tpm) * (1e6 if minmax else 1e4))
    return (minmax_scale(logs, axis=1) if minmax else logs).astype(np.float32)


def bulk_profiles(checkpoint: dict[str, Any], bulk: pd.DataFrame, network: str, command: str) -> torch.Tensor:
    """The input of a network for bulk samples (samples x genes, TPM); missing genes get their mean share in the training mixtures.

    network, command: its name, and the command that trains it for the genes of a bulk, for messages. ValueError if the bulk has a
    smaller share of the network's genes than MIN_GENE_COVERAGE of stage 4.
    """
    genes, least = checkpoint["gene_names"], checkpoint["constants"]["MIN_GENE_COVERAGE"]
    missing = ~pd.Index(genes).isin(bulk.columns)
    coverage, all_genes = 1 - missing.mean(), f"the {len(genes):,} genes that {network} was trained on"
    if coverage < least:
        raise ValueError(
            f"the bulk has {coverage:.0%} of {all_genes}, such as {', '.join(genes[:3])}; expected at least {least:.0%}: "
            f"train on the bulk's genes: {command}"
        )
    values = bulk.reindex(columns=genes).to_numpy(dtype=np.float64)
    if missing.any():
        detail(f"the bulk has {coverage:.1%} of {all_genes}; the others take their mean share")
        mean = checkpoint["mean_profile"].numpy()
        share = mean[missing] / mean[~missing].sum()
        values[:, missing] = values[:, ~missing].sum(axis=1, keepdims=True) * share
    return torch.from_numpy(scale(values, checkpoint["arguments"].get("minmax", False)))


def select_genes(mixtures: ad.AnnData, blocks: Blocks, usable: np.ndarray, n_genes: int) -> np.ndarray:
    """Select at most so many of the usable genes (a mask), whose expression the proportions explain best; positions, ascending.

    A linear regression on the proportions explains a part of each gene's variance over the mixtures to train on, on the scale of
    `scale`; genes are ranked by explained variance x R^2. mixtures, blocks: as `pseudobulk.read_train_mixtures` gives them, and
    their counts. ValueError if fewer genes than cell types are left.
    """
    is_fit, proportions = is_for_fit(mixtures), mixtures.obsm["proportions"]
    lengths = gene_lengths(mixtures, usable)
    gram, cross, squares, total = 0.0, 0.0, 0.0, 0.0
    for rows, counts in blocks(None):
        p = proportions[rows][is_fit[rows]]
        logs = scale(tpm(counts[is_fit[rows]][:, usable], lengths)).astype(np.float64)
        gram, cross = gram + p.T @ p, cross + p.T @ logs
        squares, total = squares + np.square(logs).sum(axis=0), total + logs.sum(axis=0)
    n = is_fit.sum()
    variance = squares / n - (total / n) ** 2
    coefficients = np.linalg.lstsq(gram, cross, rcond=None)[0]
    explained = (coefficients * cross).sum(axis=0) / n - (total / n) ** 2
    score = np.where(variance > 1e-12, explained**2 / np.maximum(variance, 1e-12), 0)  # explained variance x R^2
    n_genes, n_types = min(n_genes, int(np.sum(score > 0))), proportions.shape[1]
    if n_genes < n_types:
        raise ValueError(
            f"{n_genes} genes are left to predict the proportions of {n_types} cell types from; expected at least one gene per type: "
            "raise N_GENES, or give a bulk with more of these genes"
        )
    return np.sort(np.flatnonzero(usable)[np.argsort(-score, kind="stable")[:n_genes]])


def most_variable_genes(mixtures: ad.AnnData, blocks: Blocks, usable: np.ndarray, share: float) -> np.ndarray:
    """Select this share of the usable genes, those whose TPM vary most over the mixtures to train on (published); ascending.

    The original also asks that the genes vary as much in the bulk to be predicted, which was made of the test cells.
    """
    is_fit, lengths, moments = is_for_fit(mixtures), gene_lengths(mixtures, usable), StandardScaler()
    for rows, counts in blocks(None):
        if is_fit[rows].any():
            moments.partial_fit(tpm(counts[is_fit[rows]][:, usable], lengths))
    order = np.argsort(-moments.var_, kind="stable")
    return np.sort(np.flatnonzero(usable)[order[: int(share * len(order))]])


def read_profiles(
    mixtures: ad.AnnData, blocks: Blocks, genes: np.ndarray, minmax: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """The network's input for all mixtures, (n_mixtures, n_genes), and each gene's mean share of a mixture to train on."""
    is_fit, lengths = is_for_fit(mixtures), gene_lengths(mixtures, genes)
    profiles, share = np.empty((mixtures.n_obs, len(genes)), np.float32), np.zeros(len(genes))
    for rows, counts in blocks(genes):
        values = tpm(counts, lengths)
        profiles[rows] = scale(values, minmax)
        share += values[is_fit[rows]].sum(axis=0)
    return profiles, share / share.sum()
