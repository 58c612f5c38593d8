"""scTAPE: an autoencoder that predicts cell-type proportions from a bulk profile. DECONVOLUTION = "sctape..." uses it.

Chen, Y. et al., "Deep autoencoder for interpretable tissue-adaptive deconvolution and cell-type-specific gene analysis",
Nature Communications 13, 6735 (2022). The bottleneck holds the proportions. The decoder is linear without bias and maps the
proportions back to the profile, so the product of its weights is a signature matrix. `adapt` is the published adaptive stage,
which updates decoder and encoder in turn on an unlabelled bulk. Ours is the augmentation: in training, every mixture is
measured by a simulated platform of its own.
"""

import copy
from collections.abc import Iterator
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import anndata as ad
import numpy as np
import pandas as pd
import torch
from torch import nn
from tqdm import tqdm

from lib import parallel
from lib.bulk.pseudobulk import gene_lengths, is_for_fit, tpm
from lib.bulk.tables import sample_totals
from lib.training import Trainer, tensor_epoch

HIDDEN = (512, 256, 128, 64)  # hidden layers of the encoder; of the decoder in reverse order
ADAPT_ROUNDS, ADAPT_STEPS, ADAPT_LEARNING_RATE = 3, 300, 1e-4  # of the adaptive stage (original code)
MIN_DEPTH, MAX_DEPTH, MAX_MISSING = 2e4, 2e6, 0.2  # augmentation: transcripts in the network's genes; share of genes
ROWS_AT_ONCE = 500  # mixtures read from disk at a time

Adaptation = Literal["none", "overall", "per-sample"]


class ScTAPE(nn.Module):
    """
    Parameters
    ----------
    n_genes, n_cell_types
        Length of a profile, and number of proportions.
    dropout
        Rate before every layer of the encoder except the last.
    platform_sd
        Augmentation (`augment`); 0: none.
    minmax
        Whether the input is scaled to 0..1 within each sample, as published, instead of standardised for each gene; without
        augmentation only.
    """

    gene_mean: torch.Tensor  # (n_genes,) over the training mixtures
    gene_scale: torch.Tensor  # (n_genes,) standard deviation over the training mixtures, plus 0.01
    mean_share: torch.Tensor  # (n_genes,) share of a gene in a training mixture

    def __init__(self, n_genes: int, n_cell_types: int, dropout: float, platform_sd: float = 0.0, minmax: bool = False):
        super().__init__()
        if minmax and platform_sd:
            raise ValueError(
                f"PLATFORM_SD is {platform_sd} with SCALING minmax, whose profiles do not show how many transcripts a gene has; expected 0"
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
        self.register_buffer("mean_share", torch.full((n_genes,), 1 / n_genes))

    @staticmethod
    def from_checkpoint(checkpoint: dict[str, Any]) -> "ScTAPE":
        model = ScTAPE(**checkpoint["arguments"])
        model.load_state_dict(checkpoint["weights"])
        return model.eval()

    def initialise(self, profiles: torch.Tensor) -> None:
        """Store each gene's mean and standard deviation over the training mixtures, to standardise the input."""
        if self.arguments["minmax"]:
            return
        self.gene_mean.copy_(profiles.mean(dim=0))
        self.gene_scale.copy_(profiles.std(dim=0) + 0.01)
        self.mean_share.copy_(torch.expm1(profiles).mean(dim=0) / 1e4)

    def standardised(self, profiles: torch.Tensor) -> torch.Tensor:
        return (profiles - self.gene_mean) / self.gene_scale

    def forward(self, profiles: torch.Tensor, proportions: torch.Tensor) -> dict[str, torch.Tensor]:
        """Mean absolute errors of the proportions and of the reconstructed profile, and their sum, the training loss.

        profiles: output of `scale`, (n_samples, n_genes); proportions: (n_samples, n_cell_types). In training the encoder gets
        augmented profiles, and the decoder must reconstruct the profiles as they were.
        """
        measured = (
            augment(profiles, self.mean_share, self.platform_sd) if self.training and self.platform_sd else profiles
        )
        raw = self.encoder(self.standardised(measured))
        proportion_loss = (raw - proportions).abs().mean()
        reconstruction_loss = (self.decoder(raw) - self.standardised(profiles)).abs().mean()
        return {
            "loss": proportion_loss + reconstruction_loss,
            "proportion_loss": proportion_loss,
            "reconstruction_loss": reconstruction_loss,
        }

    def validate(self, profiles: torch.Tensor, proportions: torch.Tensor) -> dict[str, torch.Tensor]:
        """The losses, and `stopping_criterion`: mean absolute error of the predicted proportions (non-negative, summing to 1).

        With augmentation, the criterion is the error on augmented profiles, augmented in the same way at each call.
        """
        measured = profiles
        if self.platform_sd:
            generator = torch.Generator(profiles.device).manual_seed(0)
            measured = augment(profiles, self.mean_share, self.platform_sd, generator)
        error = (self.proportions(measured) - proportions).abs().mean()
        return self(profiles, proportions) | {"stopping_criterion": error}

    def proportions(self, profiles: torch.Tensor) -> torch.Tensor:
        """Predicted proportions: the encoder's output with negative values set to 0, scaled to sum to 1."""
        # the constant gives equal proportions to a sample without any positive value
        positive = torch.relu(self.encoder(self.standardised(profiles))) + 1e-9
        return positive / positive.sum(dim=1, keepdim=True)

    def signature_matrix(self) -> torch.Tensor:
        """(n_cell_types, n_genes) decoded profile of each pure type, on the scale of `scale`."""
        with torch.no_grad():
            pure = torch.eye(self.arguments["n_cell_types"], device=self.gene_mean.device)
            return torch.relu(self.decoder(pure) * self.gene_scale + self.gene_mean)


def augment(
    profiles: torch.Tensor, mean_share: torch.Tensor, platform_sd: float, generator: torch.Generator | None = None
) -> torch.Tensor:
    """Profiles as simulated platforms would measure them, each profile by a platform of its own.

    Every gene is multiplied by a log-normal platform factor; the standard deviation of its logarithm is uniform between 0 and
    `platform_sd`. Sampling noise is added (normal, with the variance of Poisson counts) for a depth between 20,000 and 2,000,000
    transcripts, log-uniform. Up to `MAX_MISSING` of the genes are replaced as `complete` replaces missing ones. The content of
    mRNA per cell needs no augmentation: the network predicts shares of cells by counts, which stand for shares of RNA.

    Parameters
    ----------
    profiles
        (n_samples, n_genes), output of `scale`; the result is the same.
    mean_share
        (n_genes,) share of a gene in a training mixture.
    generator
        None: torch's global one.
    """
    n, device = len(profiles), profiles.device
    sd, log_depth, missing = torch.rand(3, n, 1, generator=generator, device=device)
    factors, noise = torch.randn(2, *profiles.shape, generator=generator, device=device)
    per_10k = torch.expm1(profiles) * torch.exp(platform_sd * sd * factors)
    depth = MIN_DEPTH * (MAX_DEPTH / MIN_DEPTH) ** log_depth
    per_10k = torch.relu(per_10k + torch.sqrt(per_10k * 1e4 / depth) * noise)
    present = torch.rand(profiles.shape, generator=generator, device=device) >= MAX_MISSING * missing
    replacement = (
        mean_share * (per_10k * present).sum(dim=1, keepdim=True) / (mean_share * present).sum(dim=1, keepdim=True)
    )
    per_10k = torch.where(present, per_10k, replacement)
    return torch.log1p(per_10k / per_10k.sum(dim=1, keepdim=True) * 1e4)


def adapt(model: ScTAPE, profiles: torch.Tensor) -> ScTAPE:
    """A copy of the network, adapted to unlabelled bulk profiles by the published adaptive stage.

    In each round, `ADAPT_STEPS` steps update the decoder, which minimises the errors (L1) of the reconstruction and of the
    signature matrix against that of the trained network, and as many update the encoder, which minimises the errors of the
    reconstruction and of the proportions against those that the trained network predicts. All samples at once: "overall"; one
    sample: "high-resolution".

    Parameters
    ----------
    profiles
        (n_samples, n_genes), output of `scale`.
    """
    model = copy.deepcopy(model).eval()
    target = model.standardised(profiles)
    pure = torch.eye(model.arguments["n_cell_types"], device=profiles.device)
    with torch.no_grad():
        first_signature, first_proportions = model.decoder(pure), model.proportions(profiles)
    decoder, encoder = (
        torch.optim.Adam(part.parameters(), lr=ADAPT_LEARNING_RATE) for part in (model.decoder, model.encoder)
    )

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


# --- the input of both networks, scTAPE and the bulk encoder


def scale(tpm: np.ndarray, minmax: bool = False) -> np.ndarray:
    """The network's input: log(1 + transcripts per 10,000 of the network's genes).

    minmax: as in the original, log(1 + TPM), scaled to 0..1 within each sample. With transcripts per million, genes with a few
    counts weigh as much as genes with thousands, which costs a third of the accuracy on held-out cells of pbmc3k's train part.

    Parameters
    ----------
    tpm
        Samples x the network's genes, non-negative, in any unit proportional to the number of transcripts. The total is taken
        over these genes alone, so training mixtures and bulk are on one scale whatever other genes the bulk has.

    Returns
    -------
    float32, same shape.

    Raises
    ------
    ValueError
        If a sample has no expression in these genes.
    """
    logs = np.log1p(tpm / sample_totals(tpm) * (1e6 if minmax else 1e4))
    if minmax:
        low = logs.min(axis=1, keepdims=True)
        logs = (logs - low) / (logs.max(axis=1, keepdims=True) - low)
    return logs.astype(np.float32)


def complete(bulk: pd.DataFrame, gene_names: list[str], mean_profile: np.ndarray) -> np.ndarray:
    """Values of the network's genes in the bulk; a gene that the bulk lacks gets its mean share in the training mixtures.

    Parameters
    ----------
    bulk
        Samples x genes, TPM.
    gene_names, mean_profile
        The network's genes, and their mean share of a training mixture, in the same order.

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


def check_coverage(checkpoint: dict[str, Any], bulk: pd.DataFrame, network: str, command: str) -> float:
    """Share of the network's genes that the bulk has.

    Parameters
    ----------
    network, command
        Name of the network, and the command that trains it for the genes of a bulk; for the message.

    Raises
    ------
    ValueError
        If the share is below MIN_GENE_COVERAGE of stage 4.
    """
    gene_names = checkpoint["gene_names"]
    coverage = np.isin(gene_names, bulk.columns).mean()
    least = checkpoint["constants"]["MIN_GENE_COVERAGE"]
    if coverage < least:
        raise ValueError(
            f"the bulk has {coverage:.0%} of the {len(gene_names):,} genes that {network} was trained on, expected at least {least:.0%} "
            f"(the bulk's genes: {', '.join(map(str, bulk.columns[:3]))}; the network's: {', '.join(gene_names[:3])}); "
            f"train on the bulk's genes: {command}"
        )
    return coverage


class Prediction(NamedTuple):
    """What the network predicts for bulk samples."""

    proportions: pd.DataFrame  # samples x types, of cells by the counts of the train cells; rows sum to 1
    signatures: np.ndarray  # 1 or samples x types x genes: per 10,000 transcripts of these genes (minmax: as the input)


def predict(checkpoint: dict[str, Any], bulk: pd.DataFrame, adaptation: Adaptation = "none") -> Prediction:
    """Predict the cell-type proportions of bulk samples with the scTAPE network.

    Parameters
    ----------
    checkpoint
        models/sctape.pt.
    bulk
        Samples x genes, TPM (counts per million for UMI counts). Genes that the network does not use are ignored.
    adaptation
        "none": the network as trained; "overall": adapted once, to all samples (`adapt`); "per-sample": adapted to each sample.

    Raises
    ------
    ValueError
        If the bulk has too few of the network's genes.
    """
    gene_names = checkpoint["gene_names"]
    coverage = check_coverage(checkpoint, bulk, "scTAPE", "_4_train_sctape.py --bulk-file")
    if coverage < 1:
        print(
            f"the bulk has {coverage:.1%} of scTAPE's {len(gene_names):,} genes; "
            "the others take their mean share in the training mixtures"
        )
    model = ScTAPE.from_checkpoint(checkpoint)
    values = complete(bulk, gene_names, checkpoint["mean_profile"].numpy())
    profiles = torch.from_numpy(scale(values, model.arguments["minmax"]))
    groups = profiles.split(1) if adaptation == "per-sample" else (profiles,)
    models = [model]
    if adaptation != "none":
        models = [adapt(model, group) for group in tqdm(groups, desc="adapting scTAPE", leave=False)]
    with torch.no_grad():
        proportions = torch.cat([model.proportions(group) for model, group in zip(models, groups)])
        signatures = torch.stack([model.signature_matrix() for model in models])
    if not model.arguments["minmax"]:
        signatures = torch.expm1(signatures)
    table = pd.DataFrame(proportions.numpy(), index=bulk.index, columns=checkpoint["cell_types"])
    return Prediction(table, signatures.numpy())


# --- training


def select_genes(mixtures: ad.AnnData, usable: np.ndarray, n_genes: int) -> np.ndarray:
    """Select the genes whose expression the proportions explain best; returns their positions, ascending.

    For each gene, a linear regression on the proportions explains a part of its variance over the mixtures to train on, on the
    scale of `scale`. Genes are ranked by explained variance x R^2. Genes that vary at random, and genes that all types express
    alike, come last.

    Parameters
    ----------
    mixtures
        As `pseudobulk.read_train_mixtures` gives them.
    usable
        Mask of the genes to select from.
    n_genes
        Number of genes, at most.

    Raises
    ------
    ValueError
        If fewer genes than cell types are left.
    """
    is_fit, proportions = is_for_fit(mixtures), mixtures.obsm["proportions"]
    lengths = gene_lengths(mixtures, usable)
    gram, cross, squares, total = 0.0, 0.0, 0.0, 0.0
    for rows, counts in blocks(mixtures, "selecting genes"):
        p = proportions[rows][is_fit[rows]]
        logs = scale(tpm(counts[is_fit[rows]][:, usable], lengths)).astype(np.float64)
        gram, cross = gram + p.T @ p, cross + p.T @ logs
        squares, total = squares + np.square(logs).sum(axis=0), total + logs.sum(axis=0)
    n = is_fit.sum()
    variance = squares / n - (total / n) ** 2
    coefficients = np.linalg.lstsq(gram, cross, rcond=None)[0]
    explained = (coefficients * cross).sum(axis=0) / n - (total / n) ** 2
    score = np.where(variance > 1e-12, explained**2 / np.maximum(variance, 1e-12), 0)  # explained variance x R^2
    n_genes = min(n_genes, int(np.sum(score > 0)))
    if n_genes < proportions.shape[1]:
        raise ValueError(
            f"{n_genes} genes are left to predict the proportions of {proportions.shape[1]} cell types from; expected at least "
            "one gene per type: raise N_GENES, or give a bulk with more of these genes"
        )
    return np.sort(np.flatnonzero(usable)[np.argsort(-score, kind="stable")[:n_genes]])


def most_variable_genes(mixtures: ad.AnnData, usable: np.ndarray, share: float) -> np.ndarray:
    """Select this share of the usable genes, those whose TPM vary most over the mixtures to train on (published); ascending.

    The original also asks that the genes vary as much in the bulk to be predicted, which was made of the test cells.
    """
    is_fit, lengths = is_for_fit(mixtures), gene_lengths(mixtures, usable)
    squares, total = np.zeros(usable.sum()), np.zeros(usable.sum())
    for rows, counts in blocks(mixtures, "selecting genes"):
        values = tpm(counts[is_fit[rows]][:, usable], lengths)
        squares, total = squares + np.square(values).sum(axis=0), total + values.sum(axis=0)
    variance = squares / is_fit.sum() - (total / is_fit.sum()) ** 2
    return np.sort(np.flatnonzero(usable)[np.argsort(-variance, kind="stable")[: int(share * len(variance))]])


def read_profiles(mixtures: ad.AnnData, genes: np.ndarray, minmax: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """The network's input for all mixtures, (n_mixtures, n_genes), and each gene's mean share of a mixture to train on."""
    is_fit, lengths = is_for_fit(mixtures), gene_lengths(mixtures, genes)
    profiles = np.empty((mixtures.n_obs, len(genes)), np.float32)
    share = np.zeros(len(genes))
    for rows, counts in blocks(mixtures, "profiles"):
        values = tpm(counts[:, genes], lengths)
        profiles[rows] = scale(values, minmax)
        share += values[is_fit[rows]].sum(axis=0)
    return profiles, share / share.sum()


def blocks(mixtures: ad.AnnData, description: str) -> Iterator[tuple[slice, np.ndarray]]:
    """The counts of the mixtures, block by block, with the rows of each block."""
    for start in tqdm(range(0, mixtures.n_obs, ROWS_AT_ONCE), desc=description, leave=False):
        rows = slice(start, min(start + ROWS_AT_ONCE, mixtures.n_obs))
        yield rows, mixtures.X[rows]


def fit(
    trainer: Trainer, train: tuple[torch.Tensor, ...], held_out: tuple[torch.Tensor, ...], epochs: int, batch_size: int,
    max_gradient_norm: float,
) -> None:  # fmt: skip
    """Train scTAPE or the bulk encoder on mixtures; the model's `validate` on mixtures of held-out cells decides when to stop.

    train, held_out: the arguments of the model's `forward`, one mixture per row. Without held-out mixtures the trainer must not
    stop early.
    """
    model: Any = trainer.model  # has a method `validate`
    device = next(model.parameters()).device
    train, held_out = (tuple(part.to(device) for part in data) for data in (train, held_out))
    shared = parallel.shared(model)
    trainer.fit(
        epochs,
        lambda _: tensor_epoch(shared, trainer.optimizer, train, batch_size, max_gradient_norm, trainer.generator),
        None if not len(held_out[0]) else lambda: {n: float(value) for n, value in model.validate(*held_out).items()},
    )
