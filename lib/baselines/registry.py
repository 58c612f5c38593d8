"""The generators by name: loading and sampling of any generator, and the training of the baselines with their published settings.

Each baseline has a file of its own and the same few methods:

    initialise(train)                              before training: what is estimated without gradients
    forward(batch, epsilon, kl_weight)             the loss to minimise, and its parts
    fit_prior(train, seed)                         after training: the distribution that new cells are sampled from
    sample(cell_type_idx, seed, latent_spread)     new cells, raw counts

`paper_gmvae` is the GMVAE as published (lib/models/paper_gmvae.py). Our GMVAE is trained by stage 3 itself.
"""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import scipy.sparse as sp
import torch
from torch import nn

from lib import parallel
from lib.baselines import beta_vae, conv_cvae, pca_cvae
from lib.data.batches import Batch, CellDataset
from lib.models import paper_gmvae, sampling
from lib.models.gmvae import GMVAE
from lib.training import Trainer

Name = Literal["gmvae", "paper_gmvae", "beta_vae", "pca_cvae", "conv_cvae"]
CLASSES: dict[str, type[nn.Module]] = {
    "gmvae": GMVAE, "paper_gmvae": paper_gmvae.PaperGMVAE, "beta_vae": beta_vae.BetaVAE, "pca_cvae": pca_cvae.PCACVAE,
    "conv_cvae": conv_cvae.ConvCVAE,
}  # fmt: skip
SETTINGS: dict[str, dict[str, Any]] = {
    "paper_gmvae": paper_gmvae.SETTINGS, "beta_vae": beta_vae.SETTINGS, "pca_cvae": pca_cvae.SETTINGS,
    "conv_cvae": conv_cvae.SETTINGS,
}  # fmt: skip
WITHOUT_PRIOR = ("gmvae", "paper_gmvae")  # sample cells without a prior that is fitted after training


def load(checkpoint: dict[str, Any], device: torch.device) -> Any:
    """Load the generator of a checkpoint of stage 3, ready to sample.

    Raises
    ------
    ValueError
        If the training was interrupted: what new cells are sampled from is fitted at the end.
    """
    name, prior = checkpoint.get("generator", "gmvae"), checkpoint.get("prior")
    fits_prior = name not in WITHOUT_PRIOR or (name == "gmvae" and checkpoint["constants"].get("PRIOR") == "posterior")
    if prior is None and fits_prior:
        raise ValueError(
            f"the training of {name} was interrupted: what new cells are sampled from is fitted at its end; finish it with "
            f"_3_train_gmvae.py{f' --generator {name}' * (name != 'gmvae')} --resume"
        )
    model: Any = CLASSES[name](**checkpoint["arguments"])
    model.load_state_dict(checkpoint["weights"])
    model.prior = prior
    return model.to(device).eval()


def sample(
    model: Any, cell_type_idx: np.ndarray, seed: int, *arguments: Any, **options: Any
) -> Iterator[sp.csr_matrix]:
    """New cells of any generator, block by block. Arguments as in `lib.models.sampling.sample`; only the GMVAE takes a shift."""
    if isinstance(model, GMVAE):
        return sampling.sample(model, cell_type_idx, seed, *arguments, **options)
    baseline: Any = model
    return baseline.sample(cell_type_idx, seed, *arguments, **options)


def generate(model: Any, cell_type_idx: np.ndarray, seed: int) -> sp.csr_matrix:
    """New cells of any generator in one matrix: n_cells x n_genes, raw counts."""
    return sp.vstack(list(sample(model, cell_type_idx, seed)), format="csr")


def fit(
    name: str, train: CellDataset, held_out: CellDataset | None, about: dict[str, Any], settings: dict[str, Any],
    arguments: dict[str, Any], models_dir: Path, seed: int, resume: bool = False,
) -> tuple[Any, Trainer]:  # fmt: skip
    """Train a baseline with early stopping on held-out cells, and write its best weights to models/<name>.pt.

    Parameters
    ----------
    held_out
        None for a generator that is trained without early stopping (patience None).
    about
        Description of the data for the checkpoint: stage, constants, gene_names, cell_types, split_id.
    settings
        epochs, batch_size, learning_rate, weight_decay, patience and optimizer; optional: balanced (each type is sampled equally
        often), cycle (length of the learning rate's cycle, in trainings; constant without it), kl_weight (first and last weight of
        the KL), kl_warmup_epochs and keep_every (epochs between checkpoints that stay).
        Published values: `SETTINGS`.
    arguments
        Arguments of the model besides the sizes of the data; the defaults are the published ones.
    """
    if name == "pca_cvae":
        settings, arguments = pca_cvae.fitting_sizes(settings, arguments, train)
    torch.manual_seed(seed)
    model: Any = CLASSES[name](train.n_genes, len(about["cell_types"]), **arguments)
    model.initialise(train)
    model.to(train.device)
    optimizer = make_optimizer(model, settings)
    about = about | {"generator": name, "arguments": model.arguments, "settings": settings}
    generator = torch.Generator(train.device).manual_seed(seed)
    # while the weight of the KL rises, the held-out loss at full weight need not improve
    patience = settings["patience"]
    if patience is not None:
        patience += settings.get("kl_warmup_epochs", 0)
    trainer = Trainer(name, model, optimizer, generator, about, models_dir, patience, settings.get("keep_every"))
    if resume:
        trainer.resume()
    shared = parallel.shared(model)
    trainer.fit(
        settings["epochs"],
        lambda epoch: train_epoch(shared, optimizer, train, epoch, settings, generator),
        None if held_out is None else lambda: validate(model, held_out, settings["batch_size"], seed),
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
    """Learning rate of an epoch: constant, or one cycle (Smith and Topin 2019), or the first part of one.

    The cycle rises from 1/25 of `learning_rate` over its first 30 %, then falls to 1e-5 of it, both along a cosine. It is
    `cycle` times as long as the training.
    """
    if not settings.get("cycle"):
        return settings["learning_rate"]
    done, rise = (epoch + 0.5) / (settings["cycle"] * settings["epochs"]), 0.3  # fractions of the cycle
    low, progress = (1 / 25, done / rise) if done < rise else (1e-5, (1 - done) / (1 - rise))
    return settings["learning_rate"] * (low + (1 - low) * (1 - math.cos(math.pi * progress)) / 2)


def kl_weight(epoch: int, settings: dict[str, Any]) -> float:
    """Weight of the KL in an epoch: it rises linearly over `kl_warmup_epochs`; 1 without these settings."""
    start, end = settings.get("kl_weight", (1.0, 1.0))
    return start + (end - start) * min(1.0, epoch / max(1, settings.get("kl_warmup_epochs", 0)))


def train_epoch(
    model: nn.Module, optimizer: torch.optim.Optimizer, train: CellDataset, epoch: int, settings: dict[str, Any],
    generator: torch.Generator,
) -> dict[str, float]:  # fmt: skip
    """Train on all labelled cells once; mean losses per cell."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(epoch, settings)
    balanced = settings.get("balanced", False)
    parts = []
    for batch in train.shuffled(settings["batch_size"], generator, parallel.RANK, parallel.N_RANKS, balanced):
        labelled, epsilon = select_labelled(batch, sample_epsilon(batch, model, generator))
        optimizer.zero_grad()
        losses = model(labelled, epsilon, kl_weight(epoch, settings))
        # processes average their gradients; this weight makes it a mean over cells, as in stage 3
        share = labelled.n_cells / batch.n_global * parallel.N_RANKS
        (losses["loss"] * share).backward()
        optimizer.step()
        parts.append((labelled.n_cells, {name: value.detach() for name, value in losses.items()}))
    return parallel.mean_over(parts)


def validate(model: nn.Module, held_out: CellDataset, batch_size: int, seed: int) -> dict[str, float]:
    """Mean losses of held-out cells at the full weight of the KL; early stopping uses `stopping_criterion`."""
    generator = torch.Generator(held_out.device).manual_seed(seed)  # the same epsilon in every epoch
    batches = held_out.shuffled(2 * batch_size, generator, parallel.RANK, parallel.N_RANKS)
    parts = [(batch.n_cells, model(batch, sample_epsilon(batch, model, generator))) for batch in batches]
    means = parallel.mean_over(parts)
    return means | {"stopping_criterion": means["loss"]}


def sample_epsilon(batch: Batch, model: nn.Module, generator: torch.Generator) -> torch.Tensor:
    """Standard normal epsilon, (n_cells, n_latent), of this process's cells; more where the model has an `epsilon_shape`.

    It is sampled for the cells of all processes, so that any number of processes trains the same model.
    """
    inner: Any = getattr(model, "module", model)
    shape = getattr(inner, "epsilon_shape", (inner.n_latent,))
    epsilon = torch.randn(batch.n_global, *shape, generator=generator, device=generator.device)
    return epsilon[parallel.RANK :: parallel.N_RANKS]


def select_labelled(batch: Batch, epsilon: torch.Tensor) -> tuple[Batch, torch.Tensor]:
    """Select the cells of known type, the only ones that the baselines can use."""
    if batch.all_labelled:
        return batch, epsilon
    known = batch.cell_type_idx >= 0
    return batch.select(known), epsilon[known]
