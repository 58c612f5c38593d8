"""The generators by name: their settings, how they are made and trained, and how new cells are sampled. Each has the methods

    initialise(train)                              before training: what is estimated without gradients
    forward(batch, epsilon, kl_weight)             the loss to minimise, and its parts
    fit_prior(train, seed)                         after training: the distribution that new cells are sampled from
    sample(cell_type_idx, seed, latent_spread)     new cells, raw counts

`paper_gmvae` is the GMVAE as published (lib/models/paper_gmvae.py). Our GMVAE has its settings in stage 3.
"""

import inspect
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal

import numpy as np
import scipy.sparse as sp
import torch
from torch import nn

from lib import training
from lib.baselines import beta_vae, conv_cvae, pca_cvae
from lib.data.batches import CellDataset
from lib.models import paper_gmvae, sampling
from lib.models.gmvae import GMVAE
from lib.training import Minibatch, cell_batches

Name = Literal["gmvae", "paper_gmvae", "beta_vae", "pca_cvae", "conv_cvae"]
CLASSES: dict[str, type[nn.Module]] = {
    "gmvae": GMVAE, "paper_gmvae": paper_gmvae.PaperGMVAE, "beta_vae": beta_vae.BetaVAE, "pca_cvae": pca_cvae.PCACVAE,
    "conv_cvae": conv_cvae.ConvCVAE,
}  # fmt: skip
# Published settings: epochs, batch_size, learning_rate, weight_decay, patience and optimizer; optional: balanced (each type is
# sampled equally often), min_batches (of an epoch), cycle (length of the learning rate's cycle, in trainings; constant without it),
# kl_weight (first and last weight of the KL), kl_warmup_epochs and keep_every (epochs between checkpoints that stay)
SETTINGS: dict[str, dict[str, Any]] = {
    "paper_gmvae": paper_gmvae.SETTINGS, "beta_vae": beta_vae.SETTINGS, "pca_cvae": pca_cvae.SETTINGS,
    "conv_cvae": conv_cvae.SETTINGS,
}  # fmt: skip


def parse_settings(name: str, words: tuple[str, ...]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Settings of a training, and arguments of the model besides the sizes of the data: the published ones, changed by words.

    words: such as epochs=50 or n_pcs=500; any setting or argument that is a number, else ValueError.
    """
    parameters = list(inspect.signature(CLASSES[name]).parameters.values())[2:]  # without n_genes and n_cell_types
    settings, arguments = dict(SETTINGS[name]), {p.name: p.default for p in parameters}
    numbers = {k: v for k, v in (settings | arguments).items() if v is None or type(v) in (int, float)}
    for word in words:
        key, _, text = word.partition("=")
        try:
            value = (float if isinstance(numbers[key], float) else int)(text)
            if not 0 <= value < math.inf or (value == 0 and key not in ("weight_decay", "dropout")):
                raise ValueError
        except (KeyError, ValueError):
            known = ", ".join(f"{key}={str(value).lower()}" for key, value in numbers.items())
            expected = "one of these with another number, whole or positive like this one"
            raise ValueError(f"GENERATOR_SETTINGS has {word!r}; expected {expected}: {known}") from None
        (settings if key in settings else arguments)[key] = value
    return settings, arguments


def make(name: str, n_genes: int, n_cell_types: int, arguments: dict[str, Any]) -> Any:
    """A generator that is not trained yet. arguments: as from `parse_settings`."""
    return CLASSES[name](n_genes, n_cell_types, **arguments)


def make_optimizer(model: nn.Module, settings: dict[str, Any]) -> torch.optim.Optimizer:
    """AdamW or RMSprop, as in the settings."""
    parameters, rate = model.parameters(), settings["learning_rate"]
    if settings["optimizer"] == "rmsprop":  # Keras' defaults, not torch's
        return torch.optim.RMSprop(parameters, rate, alpha=0.9, eps=1e-7)
    return torch.optim.AdamW(parameters, rate, weight_decay=settings["weight_decay"], fused=True)


def learning_rate(epoch: int, settings: dict[str, Any]) -> float:
    """Learning rate of an epoch: constant, or that of one cycle (Smith and Topin 2019) that is `cycle` times as long as the training.

    It rises from 1/25 of `learning_rate` over the first 30 % of the cycle, then falls to 1e-5 of it, both along a cosine.
    """
    if not settings.get("cycle"):
        return settings["learning_rate"]
    done, rise = (epoch + 0.5) / (settings["cycle"] * settings["epochs"]), 0.3  # fractions of the cycle
    low, progress = (1 / 25, done / rise) if done < rise else (1e-5, (1 - done) / (1 - rise))
    return settings["learning_rate"] * (low + (1 - low) * (1 - math.cos(math.pi * progress)) / 2)


def train_batches(
    train: CellDataset, model: Any, optimizer: torch.optim.Optimizer, settings: dict[str, Any], generator: torch.Generator
) -> Callable[[int], Iterable[Minibatch]]:  # fmt: skip
    """`batches` for `Trainer.fit`: the labelled train cells, with the learning rate and the weight of the KL of the epoch."""
    cells = labelled(train)
    batch_size = max(1, min(settings["batch_size"], len(cells) // settings.get("min_batches", 1)))
    if batch_size < settings["batch_size"]:
        print(f"batches of {batch_size:,} cells instead of {settings['batch_size']:,}: {len(cells):,} train cells")

    def batches(epoch: int) -> Iterator[Minibatch]:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(epoch, settings)
        extra: tuple[float, ...] = ()
        if "kl_weight" in settings:
            start, end = settings["kl_weight"]
            extra = (start + (end - start) * min(1.0, epoch / settings["kl_warmup_epochs"]),)
        return cell_batches(cells, model, batch_size, generator, settings.get("balanced", False), extra)

    return batches


def held_out_batches(
    held_out: CellDataset, model: Any, settings: dict[str, Any], seed: int
) -> Callable[[], Iterable[Minibatch]]:
    """`training.held_out_batches` of the labelled held-out cells, at full KL weight."""
    return training.held_out_batches(labelled(held_out), model, 2 * settings["batch_size"], seed)


def labelled(cells: CellDataset) -> CellDataset:
    """The cells of known type, the only ones that these generators can be trained on."""
    is_labelled = cells.cell_type_idx >= 0
    return cells if is_labelled.all() else cells.subset(np.flatnonzero(is_labelled))


def load(checkpoint: dict[str, Any], device: torch.device) -> Any:
    """Load the generator of a checkpoint of stage 3, ready to sample; ValueError if its training was interrupted."""
    name, prior = checkpoint.get("generator", "gmvae"), checkpoint.get("prior")
    without_prior = name == "paper_gmvae" or (name == "gmvae" and checkpoint["constants"].get("PRIOR") != "posterior")
    if prior is None and not without_prior:
        raise ValueError(
            f"the training of {name} was interrupted: what new cells are sampled from is fitted at its end; finish it with "
            f"_3_train_gmvae.py{f' --generator {name}' * (name != 'gmvae')} --resume"
        )
    model: Any = CLASSES[name](**checkpoint["arguments"])
    model.load_state_dict(checkpoint["weights"])
    model.prior = prior
    return model.to(device).eval()


def sample(model: Any, cell_type_idx: np.ndarray, seed: int, *arguments, **options) -> Iterator[sp.csr_matrix]:
    """New cells of any generator, block by block. Arguments as in `lib.models.sampling.sample`; only the GMVAE takes a shift."""
    if isinstance(model, GMVAE):
        return sampling.sample(model, cell_type_idx, seed, *arguments, **options)
    return model.sample(cell_type_idx, seed, *arguments, **options)


def generate(model: Any, cell_type_idx: np.ndarray, seed: int) -> sp.csr_matrix:
    """New cells of any generator in one matrix: n_cells x n_genes, raw counts."""
    return sp.vstack(list(sample(model, cell_type_idx, seed)), format="csr")
