"""scTAPE: an autoencoder that predicts cell-type proportions from a bulk profile. DECONVOLUTION = "sctape..." uses it.

Chen, Y. et al., "Deep autoencoder for interpretable tissue-adaptive deconvolution and cell-type-specific gene analysis",
Nature Communications 13, 6735 (2022). The bottleneck holds the proportions. The decoder is linear without bias and maps the
proportions back to the profile, so the product of its weights is a signature matrix. `adapt` is the published adaptive stage,
which updates decoder and encoder in turn on an unlabelled bulk. Ours is the augmentation: in training, every mixture is
measured by a simulated platform of its own.
"""

import copy
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import nn
from tqdm import tqdm

from lib import parallel
from lib.bulk.network_input import check_coverage, complete, scale
from lib.training import Trainer, tensor_epoch

HIDDEN = (512, 256, 128, 64)  # hidden layers of the encoder; of the decoder in reverse order
ADAPT_ROUNDS, ADAPT_STEPS, ADAPT_LEARNING_RATE = 3, 300, 1e-4  # of the adaptive stage (original code)
MIN_DEPTH, MAX_DEPTH, MAX_MISSING = 2e4, 2e6, 0.2  # augmentation: transcripts in the network's genes; share of genes

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

        profiles: (n_samples, n_genes), output of `network_input.scale`; proportions: (n_samples, n_cell_types). In training the
        encoder gets augmented profiles, and the decoder must reconstruct the profiles as they were.
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
        """(n_cell_types, n_genes) decoded profile of each pure type, on the scale of `network_input.scale`."""
        with torch.no_grad():
            pure = torch.eye(self.arguments["n_cell_types"], device=self.gene_mean.device)
            return torch.relu(self.decoder(pure) * self.gene_scale + self.gene_mean)


def augment(
    profiles: torch.Tensor, mean_share: torch.Tensor, platform_sd: float, generator: torch.Generator | None = None
) -> torch.Tensor:
    """Profiles as simulated platforms would measure them, each profile by a platform of its own.

    Every gene is multiplied by a log-normal platform factor; the standard deviation of its logarithm is uniform between 0 and
    `platform_sd`. Sampling noise is added (normal, with the variance of Poisson counts) for a depth between 20,000 and 2,000,000
    transcripts, log-uniform. Up to `MAX_MISSING` of the genes are replaced as `network_input.complete` replaces missing ones. The
    mRNA content of cells needs no augmentation: the network predicts shares of cells by counts, which stand for shares of RNA.

    Parameters
    ----------
    profiles
        (n_samples, n_genes), output of `network_input.scale`; the result is the same.
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
        (n_samples, n_genes), output of `network_input.scale`.
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
