"""The generators that stage 3 can train and stage 5 can draw from: one file each, with the same few methods.

    initialise(train)                             what is found without gradients
    forward(batch, noise, kl_weight)              the loss, to be minimised, and its parts
    fit_prior(train, seed)                        after training: where new cells come from
    sample(cell_type_idx, seed, noise_factor)     new cells, raw counts

The GMVAE is trained by stage 3 itself; the others, with the settings that they were published with, by `fit` here.
"""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch
from torch import nn

from lib import parallel
from lib.baselines.beta_vae import SETTINGS as BETA_VAE_SETTINGS
from lib.baselines.beta_vae import BetaVAE
from lib.baselines.conv_cvae import SETTINGS as CONV_CVAE_SETTINGS
from lib.baselines.conv_cvae import ConvCVAE
from lib.baselines.pca_cvae import PCACVAE
from lib.baselines.pca_cvae import SETTINGS as PCA_CVAE_SETTINGS
from lib.data.batches import Batch, CellDataset
from lib.models import sampling
from lib.models.gmvae import GMVAE
from lib.training import Trainer

CLASSES = {"gmvae": GMVAE, "beta_vae": BetaVAE, "pca_cvae": PCACVAE, "conv_cvae": ConvCVAE}
SETTINGS = {"beta_vae": BETA_VAE_SETTINGS, "pca_cvae": PCA_CVAE_SETTINGS, "conv_cvae": CONV_CVAE_SETTINGS}


def load(checkpoint: dict[str, Any], device: torch.device) -> nn.Module:
    """The generator that a checkpoint of stage 3 holds, ready to sample."""
    model = CLASSES[checkpoint.get("generator", "gmvae")](**checkpoint["arguments"])
    model.load_state_dict(checkpoint["weights"])
    model.prior = checkpoint.get("prior")  # fitted when the training ends
    return model.to(device).eval()


def fit(
    name: str, train: CellDataset, held_out: CellDataset, about: dict[str, Any], settings: dict[str, Any],
    arguments: dict[str, Any], models_dir: Path, seed: int, resume: bool = False,
) -> tuple[nn.Module, Trainer]:  # fmt: skip
    """Train a generator until its patience runs out, keep its best weights, and write models/<name>.pt.

    Parameters
    ----------
    about
        What the checkpoint says of itself: stage, constants, gene_names, cell_types, split_id.
    settings
        Of the model's file, or edited: epochs, batch_size, learning_rate, weight_decay, patience, optimizer; and balanced
        (each type is seen as often as any other), one_cycle (of the learning rate; else it is constant), kl_weight (from, to)
        and kl_warmup_epochs.
    arguments
        Of the model, beside the sizes of the data; what is left out is as published.
    """
    torch.manual_seed(seed)
    model = CLASSES[name](train.n_genes, len(about["cell_types"]), **arguments)
    model.initialise(train)
    model.to(train.device)
    optimizer = make_optimizer(model, settings)
    about = about | {"generator": name, "arguments": model.arguments, "settings": settings}
    generator = torch.Generator(train.device).manual_seed(seed)
    patience = settings["patience"] + settings.get(
        "kl_warmup_epochs", 0
    )  # none better is expected while the KL gains weight
    trainer = Trainer(name, model, optimizer, generator, about, models_dir, patience)
    if resume:
        trainer.resume()
    shared = parallel.shared(model)
    trainer.fit(
        settings["epochs"],
        lambda epoch: train_epoch(shared, optimizer, train, epoch, settings, generator),
        lambda: validate(model, held_out, settings["batch_size"], seed),
    )
    if parallel.IS_FIRST:
        model.eval()
        model.fit_prior(train, seed)
        trainer.save_best(prior=model.prior)
    return model, trainer


def make_optimizer(model: nn.Module, settings: dict[str, Any]) -> torch.optim.Optimizer:
    if settings["optimizer"] == "rmsprop":  # Keras' defaults, not torch's
        return torch.optim.RMSprop(model.parameters(), lr=settings["learning_rate"], alpha=0.9, eps=1e-7)
    return torch.optim.AdamW(
        model.parameters(), lr=settings["learning_rate"], weight_decay=settings["weight_decay"], fused=True
    )


def learning_rate(epoch: int, settings: dict[str, Any]) -> float:
    """Constant, or one cycle (Smith and Topin 2019): from 1/25 up over the first 30 % of the epochs, then down to nearly nothing, by cosines."""
    if not settings.get("one_cycle"):
        return settings["learning_rate"]
    done, warm = (epoch + 0.5) / settings["epochs"], 0.3
    low, place = (1 / 25, done / warm) if done < warm else (1e-5, (1 - done) / (1 - warm))
    return settings["learning_rate"] * (low + (1 - low) * (1 - math.cos(math.pi * place)) / 2)


def kl_weight(epoch: int, settings: dict[str, Any]) -> float:
    start, end = settings.get("kl_weight", (1.0, 1.0))
    return start + (end - start) * min(1.0, epoch / max(1, settings.get("kl_warmup_epochs", 0)))


def train_epoch(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    train: CellDataset,
    epoch: int,
    settings: dict[str, Any],
    generator: torch.Generator,
) -> dict[str, float]:
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(epoch, settings)
    parts = []
    for batch in train.shuffled(
        settings["batch_size"], generator, parallel.RANK, parallel.N_RANKS, settings.get("balanced", False)
    ):
        batch, noise = labelled(batch, sample_epsilon(batch, model, generator))
        optimizer.zero_grad()
        losses = model(batch, noise, kl_weight(epoch, settings))
        (losses["loss"] * (batch.n_cells / batch.n_global * parallel.N_RANKS)).backward()  # see stage 3
        optimizer.step()
        parts.append((batch.n_cells, {key: value.detach() for key, value in losses.items()}))
    return parallel.mean_over(parts)


def validate(model: nn.Module, held_out: CellDataset, batch_size: int, seed: int) -> dict[str, float]:
    """Loss of held-out cells at full KL weight, with the same noise every epoch; training stops by it."""
    generator = torch.Generator(held_out.device).manual_seed(seed)
    batches = held_out.shuffled(2 * batch_size, generator, parallel.RANK, parallel.N_RANKS)
    means = parallel.mean_over(
        [(batch.n_cells, model(batch, sample_epsilon(batch, model, generator))) for batch in batches]
    )
    return means | {"stopping_criterion": means["loss"]}


def sample_epsilon(batch: Batch, model: nn.Module, generator: torch.Generator) -> torch.Tensor:
    """Drawn for the whole batch, whoever has which of its cells: any number of processes trains the same model."""
    n_latent = getattr(model, "module", model).n_latent
    return torch.randn(batch.n_global, n_latent, generator=generator, device=generator.device)[
        parallel.RANK :: parallel.N_RANKS
    ]


def labelled(batch: Batch, noise: torch.Tensor) -> tuple[Batch, torch.Tensor]:
    """Without the cells of unknown type, which these generators cannot use."""
    if batch.all_labelled:
        return batch, noise
    known = batch.cell_type_idx >= 0
    return batch.select(known), noise[known]


def sample(
    model: nn.Module, cell_type_idx: np.ndarray, seed: int, *arguments: Any, **options: Any
) -> Iterator[sp.csr_matrix]:
    """New cells of any generator, block by block. Arguments as in `lib.models.sampling.sample`; only the GMVAE takes a shift."""
    if isinstance(model, GMVAE):
        return sampling.sample(model, cell_type_idx, seed, *arguments, **options)
    return model.sample(cell_type_idx, seed, *arguments, **options)


def generate(model: nn.Module, cell_type_idx: np.ndarray, seed: int) -> sp.csr_matrix:
    """New cells of any generator in one matrix: n_cells x n_genes, raw counts."""
    return sp.vstack(list(sample(model, cell_type_idx, seed)), format="csr")
