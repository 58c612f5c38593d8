"""Stage 3: train the Gaussian-mixture VAE (GMVAE) on the train cells, ours or the published one, or another generator instead.

reads   data/train.h5ad
writes  models/gmvae.pt (best on held-out train cells), gmvae_last.pt (to resume), gmvae_history.csv, tensorboard/gmvae;
        fig/gmvae_loss.png. Files of another GENERATOR have its name: paper_gmvae.pt with PRESET = "paper"
run     python _3_train_gmvae.py                              (watch: tensorboard --logdir models/tensorboard)
        python _3_train_gmvae.py --preset paper               the model and training of the paper
        torchrun --nproc-per-node 4 _3_train_gmvae.py         the same training, divided among four GPUs or processors
time    2,000 cells x 13,000 genes: one minute on two cores; 7,400 x 19,000: 5 minutes on one core; --preset paper: a day
"""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from anndata.abc import CSRDataset

from lib import options, parallel
from lib.baselines import registry
from lib.data.batches import CellDataset
from lib.data.counts import hold_out, n_entries, read_counts
from lib.evaluation.plots_cells import loss_curves
from lib.models.conditions import condition_column
from lib.models.gmvae import GMVAE
from lib.models.profiles import GeneMarginals, find_outliers, gene_marginals, nb_baseline, nb_per_type_log_likelihood
from lib.models.sampling import fit_prior
from lib.models.start import initialise, within_type_axes
from lib.options import Count, NotNegative, Part, Positive, Seed
from lib.run import folder, print_written
from lib.training import Minibatch, Trainer, cell_batches, held_out_batches, keep_freed_memory

# Generator
PRESET: Literal["ours", "paper"] = "ours"  # paper: the settings of the paper, except constants that you set yourself
GENERATOR: registry.Name = "gmvae"  # gmvae: ours; paper_gmvae: the paper's; others: lib/baselines
GENERATOR_SETTINGS: tuple[str, ...] = ()  # of another generator, such as n_pcs=500 (lib/baselines)

# Model (ours; the paper's is fixed: lib/models/paper_gmvae.py)
N_LATENT: Count = 32  # dimensions of z at most; as many as held-out cells confirm (paper: 32)
HIDDEN: Count = 128  # units of the hidden layer of q(y|x), which is trained where train cells lack a type (paper)
LIKELIHOOD: Literal["nb", "zinb"] = "nb"  # of counts: without or with zero inflation
DISPERSION: Literal["gene", "gene-type"] = "gene-type"  # one theta for each gene, or for each gene and type
PRIOR: Literal["posterior", "gaussian"] = "posterior"  # z of new cells: that of train cells, or p(z|y) (as the paper)
CONDITION: str | None = None  # column of obs such as donor: stage 5 generates cells by type and its values (ours)
MIN_CONDITION_CELLS: Count = 10  # cells per value of CONDITION, on average; fewer: it is refused (ours)

# Training (other generators: as published, unless you set these)
EPOCHS: Count = 300  # maximum; early stopping usually ends training before (paper: 4000)
BATCH_SIZE: Count = 128  # cells (paper: 37)
LEARNING_RATE: Positive = 5e-4  # Adam (paper: 6e-6); reduced when the held-out loss does not improve
DISPERSION_LEARNING_RATE: Positive = 2e-2  # of theta and the loading ratios, which start far from their values (ours)
MAX_GRADIENT_NORM: Positive = 100.0  # larger gradients are clipped; they measure 20-90 on pbmc3k (ours)
VALIDATION_FRACTION: Part = 0.1  # of the train cells of each type, held out for early stopping (ours; paper: 0)
MAX_VALIDATION_CELLS: Count = 10_000  # held-out cells at most (ours)
MAX_LIKELIHOOD_CELLS: Count = 1_000  # of these at most, whose likelihood is printed after training (ours)
PATIENCE: Count | None = 30  # epochs without a better held-out bound before training stops; none: last epoch (paper)
KEEP_EVERY: Count | None = None  # epochs between checkpoints that stay (paper: 1000)

# Running
RESUME = False  # continue from models/gmvae_last.pt
MEMORY_GB: NotNegative = 0.5  # for the train cells; a larger set is read from disk in random blocks during training
DEVICE: Literal["auto", "cpu", "cuda"] = "auto"  # auto: a GPU where there is one
SEED: Seed = 123  # of everything random in this stage
DATA_DIR = "data"  # folder
MODELS_DIR = "models"  # folder
FIG_DIR = "fig"  # folder


def main() -> None:
    settings, arguments = set_generator()
    data, models, fig = folder(DATA_DIR), folder(MODELS_DIR), folder(FIG_DIR)
    keep_freed_memory()
    device = parallel.start(DEVICE)
    adata = read_counts(data / "train.h5ad", "_1_split_train_test.py")
    cell_type = adata.obs["cell_type"].cat
    train, held_out = split_train(adata.X, cell_type.codes.to_numpy(dtype=np.int64), device)
    print(
        f"{len(train):,} cells to train on{'' if train.in_memory_cells else ', read from disk'}, "
        f"{len(held_out) if held_out else 0:,} held out; {adata.n_vars:,} genes, {len(cell_type.categories)} cell types; "
        f"on {device}{f', {parallel.N_RANKS} processes' * (parallel.N_RANKS > 1)}"
    )
    about = {
        "stage": "_3_train_gmvae.py", "generator": GENERATOR, "settings": settings, "dataset": adata.uns["dataset"],
        "constants": constants_of_run(), "gene_names": list(adata.var_names), "cell_types": list(cell_type.categories),
        "split_id": adata.uns["split_id"],
    }  # fmt: skip
    condition_idx = None
    if CONDITION is not None:
        if GENERATOR != "gmvae" or PRIOR != "posterior":
            raise ValueError(
                f"CONDITION is {CONDITION!r}, GENERATOR {GENERATOR}, PRIOR {PRIOR}; expected gmvae and posterior, or CONDITION none"
            )
        condition = condition_column(adata.obs, CONDITION, MIN_CONDITION_CELLS)
        about["conditions"] = {"column": CONDITION, "values": list(condition.categories)}
        condition_idx = condition.codes.astype(np.int64)
    trainer = train_generator(train, held_out, about, arguments, models, condition_idx)
    if parallel.IS_FIRST:
        unit = "nats per cell" if GENERATOR in ("gmvae", "paper_gmvae") else "squared error, sum over a cell"
        figure = fig / f"{GENERATOR}_loss.png"
        loss_curves(trainer.history_table(), trainer.best_epoch, unit, figure)
        written = [trainer.best_path, trainer.last_path, trainer.history_path, figure]
        print_written("stage 3", written, f"python _4_train_sctape.py{options.preset_option(PRESET)}")


def set_generator() -> tuple[dict[str, Any], dict[str, Any]]:
    """Set the constants that PRESET and GENERATOR change; return settings of the training, and arguments of another generator."""
    if PRESET == "paper":
        options.apply_preset(globals(), {"GENERATOR": ("gmvae", "paper_gmvae")})
    settings, arguments = dict[str, Any](), dict[str, Any]()
    if GENERATOR == "gmvae" and GENERATOR_SETTINGS:
        raise ValueError(f"GENERATOR_SETTINGS is {GENERATOR_SETTINGS}, but gmvae has constants of its own: set these")
    if GENERATOR != "gmvae":
        settings, arguments = registry.parse_settings(GENERATOR, GENERATOR_SETTINGS)
        published = {
            "EPOCHS": (300, settings["epochs"]), "BATCH_SIZE": (128, settings["batch_size"]),
            "LEARNING_RATE": (5e-4, settings["learning_rate"]), "PATIENCE": (30, settings["patience"]),
            "KEEP_EVERY": (None, settings.get("keep_every")),
            "VALIDATION_FRACTION": (0.1, 0.0 if GENERATOR == "paper_gmvae" else 0.1),
        }  # fmt: skip
        options.apply_preset(globals(), published)
    settings |= dict(epochs=EPOCHS, batch_size=BATCH_SIZE, learning_rate=LEARNING_RATE, patience=PATIENCE)
    return settings, arguments


def constants_of_run() -> dict[str, Any]:
    """The constants that affect this run: a training that is resumed must have the same."""
    of_gmvae = (
        "N_LATENT HIDDEN LIKELIHOOD DISPERSION PRIOR CONDITION MIN_CONDITION_CELLS DISPERSION_LEARNING_RATE "
        "MAX_GRADIENT_NORM MAX_LIKELIHOOD_CELLS"
    )
    unused = ["GENERATOR_SETTINGS"] if GENERATOR == "gmvae" else of_gmvae.split()
    constants = options.constants(globals())
    constants["GENERATOR_SETTINGS"] = [w for w in GENERATOR_SETTINGS if not w.startswith(("epochs=", "patience="))]
    return {name: value for name, value in constants.items() if name not in unused}


def split_train(
    counts: CSRDataset, cell_type_idx: np.ndarray, device: torch.device
) -> tuple[CellDataset, CellDataset | None]:
    """Cells to train on, and cells for early stopping (None for the published GMVAE), from every type that has two or more."""
    n_cells = np.bincount(cell_type_idx[cell_type_idx >= 0])
    fraction = min(VALIDATION_FRACTION, MAX_VALIDATION_CELLS / n_cells.sum())
    is_held_out = hold_out(cell_type_idx, fraction, np.random.default_rng(SEED)) & (fraction > 0)
    fits = n_entries(counts) * 8 <= MEMORY_GB * 1e9
    train = CellDataset(counts, cell_type_idx, device, np.flatnonzero(~is_held_out), in_memory=fits)
    if VALIDATION_FRACTION == 0 and PATIENCE is None and GENERATOR == "paper_gmvae":
        return train, None
    if VALIDATION_FRACTION == 0:
        raise ValueError(
            f"VALIDATION_FRACTION is 0, but {GENERATOR} with PATIENCE = {PATIENCE} needs held-out cells; raise it, for example to 0.1"
        )
    if not min(BATCH_SIZE, is_held_out.sum()) >= parallel.N_RANKS:
        raise ValueError(
            f"{parallel.N_RANKS} processes cannot share BATCH_SIZE = {BATCH_SIZE} cells and {is_held_out.sum()} held-out cells; "
            "start fewer processes"
        )
    return train, CellDataset(counts, cell_type_idx, device, np.flatnonzero(is_held_out))


def train_generator(
    train: CellDataset, held_out: CellDataset | None, about: dict[str, Any], arguments: dict[str, Any], models: Path,
    condition_idx: np.ndarray | None,
) -> Trainer:  # fmt: skip
    """Train a generator with early stopping, then fit what its new cells are sampled from. arguments: of another generator's model;
    condition_idx: CONDITION of each cell of data/train.h5ad, or None.
    """
    torch.manual_seed(SEED)
    settings, n_cell_types = about["settings"], len(about["cell_types"])
    generator = torch.Generator(train.device).manual_seed(SEED)
    model: Any

    def gmvae_batches(epoch: int) -> Iterable[Minibatch]:
        return cell_batches(train, model, BATCH_SIZE, generator)

    batches: Callable[[int], Iterable[Minibatch]] = gmvae_batches
    validation: Callable[[], Iterable[Minibatch]] | None = None
    if GENERATOR == "gmvae":
        assert held_out is not None  # `split_train`
        outliers = find_outliers(train, n_cell_types, SEED)
        train, held_out = train.corrected(outliers.replace), held_out.corrected(outliers.replace)
        print(f"outlier counts: up to {outliers.rate.max() * 1e4:.1f} of 10,000 counted molecules; replaced")
        model = make_model(train, gene_marginals(train, n_cell_types)).to(train.device)
        for name in ("group", "rate", "sizes"):
            getattr(model, f"outlier_{name}").copy_(torch.from_numpy(getattr(outliers, name)))
        optimizer: torch.optim.Optimizer = torch.optim.Adam(parameter_groups(model), lr=LEARNING_RATE, fused=True)
        validation = held_out_batches(held_out, model, 2 * BATCH_SIZE, SEED)
    else:
        model = registry.make(GENERATOR, train.n_genes, n_cell_types, arguments)
        model.initialise(train)
        optimizer = registry.make_optimizer(model.to(train.device), settings)
        batches = registry.train_batches(train, model, optimizer, settings, generator)
        if held_out is not None:
            validation = registry.held_out_batches(held_out, model, settings, SEED)
    print(f"{GENERATOR}: {sum(p.numel() for p in model.parameters()):,} parameters")
    # while the weight of the KL rises, the held-out loss at full weight need not improve
    patience = None if PATIENCE is None else PATIENCE + settings.get("kl_warmup_epochs", 0)
    trainer = Trainer(GENERATOR, model, optimizer, generator, about | {"arguments": model.arguments}, models)
    if RESUME:
        trainer.resume()
    max_norm = MAX_GRADIENT_NORM if GENERATOR == "gmvae" else float("inf")
    trainer.fit(EPOCHS, batches, validation, patience, max_norm, KEEP_EVERY)
    if parallel.IS_FIRST:
        finish(trainer, train, held_out, condition_idx)
    return trainer


def finish(
    trainer: Trainer, train: CellDataset, held_out: CellDataset | None, condition_idx: np.ndarray | None
) -> None:
    """Fit what new cells are sampled from, and compare the held-out likelihood of our GMVAE with that of a model without z."""
    model: Any = trainer.model
    if GENERATOR != "gmvae":
        model.fit_prior(train, SEED)
    elif PRIOR == "posterior":
        fit_prior(model, train, held_out, SEED, condition_idx)
    trainer.save_best(prior=model.prior)
    if GENERATOR == "gmvae" and held_out is not None:
        rows = np.sort(np.random.default_rng(SEED).permutation(len(held_out))[:MAX_LIKELIHOOD_CELLS])
        cells, baseline = held_out.subset(rows), nb_baseline(train, model.n_cell_types)
        ours, theirs = model.log_likelihood(cells).mean(), nb_per_type_log_likelihood(baseline, cells).mean()
        print(f"held-out log-likelihood, nats per cell: GMVAE {ours:.1f}; ", end="")
        print(f"one negative binomial per gene and type {theirs:.1f}")


def make_model(train: CellDataset, marginals: GeneMarginals) -> GMVAE:
    """The GMVAE at the start of training: as many dimensions of z as held-out cells confirm axes."""
    axes = within_type_axes(train, marginals, N_LATENT, SEED)
    print(f"{len(axes.variance)} axes of variation within the cell types, confirmed by held-out cells")
    sizes = train.n_genes, len(marginals.profiles), len(axes.variance)
    model = GMVAE(*sizes, HIDDEN, LIKELIHOOD, DISPERSION, with_classifier=bool((train.cell_type_idx < 0).any()))
    initialise(model, train, marginals, axes)
    return model


def parameter_groups(model: GMVAE) -> list[dict]:
    """theta and the loading ratios have their own learning rate."""
    parameters = dict(model.named_parameters())
    own = [parameters.pop(name) for name in list(parameters) if name.startswith(("log_theta", "log_loading"))]
    return [{"params": list(parameters.values())}, {"params": own, "lr": DISPERSION_LEARNING_RATE}]


if __name__ == "__main__":
    options.run(globals())
