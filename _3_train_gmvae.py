"""Stage 3: train the Gaussian-mixture VAE (GMVAE) on the train cells, ours or the published one, or another generator instead.

reads   data/train.h5ad
writes  models/gmvae.pt (best on held-out train cells), gmvae_last.pt (to resume), gmvae_history.csv, tensorboard/gmvae;
        fig/gmvae_loss.png. Files of another GENERATOR have its name: paper_gmvae.pt with PRESET = "paper"
run     python _3_train_gmvae.py                              (watch: tensorboard --logdir models/tensorboard)
        python _3_train_gmvae.py --preset paper               the model and training of the paper
        torchrun --nproc-per-node 4 _3_train_gmvae.py         the same training, divided among four GPUs or processors
time    2,000 cells x 13,000 genes: one minute on two cores; 7,400 x 19,000: 5 minutes on one core;
        PRESET = "paper": 2,000 cells x 13,000 genes, 9 types: 20 seconds an epoch on one core, a day for all 4,000
"""

from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from anndata.abc import CSRDataset

from lib import options, parallel
from lib.baselines import registry
from lib.data.batches import CellDataset
from lib.data.counts import hold_out, n_entries, read_counts
from lib.evaluation import plots_training
from lib.files import folder, print_written
from lib.models import outliers, sampling
from lib.models.axes import within_type_axes
from lib.models.conditions import read_conditions
from lib.models.gmvae import GMVAE
from lib.models.initialise import initialise
from lib.models.profiles import GeneMarginals, gene_marginals, nb_per_type_log_likelihood
from lib.ranges import Count, NotNegative, Part, Positive, Seed, Several
from lib.training import Trainer, clip_gradients, keep_freed_memory

# Preset
PRESET: Literal["ours", "paper"] = "ours"  # paper: the settings of the paper, except constants that you set yourself

# Model (ours; the paper's is fixed: lib/models/paper_gmvae.py)
N_LATENT: Count = 32  # dimensions of z at most; as many as held-out cells confirm (paper: 32)
HIDDEN: Count = 128  # units of the hidden layer of q(y|x) (paper)
LIKELIHOOD: Literal["nb", "zinb"] = "nb"  # of counts: without or with zero inflation
DISPERSION: Literal["gene", "gene-type"] = "gene-type"  # one theta for each gene, or for each gene and type
PRIOR: Literal["posterior", "gaussian"] = (
    "posterior"  # of z of new cells: that of train cells, or p(z|y) (as the paper)
)
CONDITION: str | None = None  # column of obs such as donor: stage 5 generates cells by type and its values (ours)
MIN_CONDITION_CELLS: Count = 10  # cells per value of CONDITION, on average; fewer: it is refused (ours)

# Training (of both GMVAEs)
EPOCHS: Count = 300  # maximum; early stopping usually ends training before (paper: 4000)
BATCH_SIZE: Count = 128  # cells (paper: 37)
LEARNING_RATE: Positive = 5e-4  # Adam (paper: 6e-6); reduced when the held-out loss does not improve
DISPERSION_LEARNING_RATE: Positive = 2e-2  # of theta and the loading ratios, which start far from their values (ours)
MAX_GRADIENT_NORM: Positive = 100.0  # larger gradients are clipped; they measure 20-90 on pbmc3k (ours)
VALIDATION_FRACTION: Part = 0.1  # of the train cells of each type, held out for early stopping (ours; paper: 0)
MAX_VALIDATION_CELLS: Count = 10_000  # held-out cells at most (ours)
MAX_LIKELIHOOD_CELLS: Count = 1_000  # of these at most, whose likelihood is printed after training (ours)
PATIENCE: Count | None = 30  # epochs without a better held-out bound before training stops; none: last epoch (paper)
KEEP_EVERY: Count | None = None  # epochs between checkpoints of paper_gmvae that stay (paper: 1000)

# Generator
GENERATOR: registry.Name = "gmvae"  # gmvae: ours; paper_gmvae: the paper's; others: lib/baselines

# Training of the generators of other systems (lib/baselines)
OTHER_EPOCHS: Count | None = None  # of another generator; none: as published (5000, 100, 50)
OTHER_BATCH_SIZE: Count | None = None  # the same; none: 512, 5000, 32
OTHER_LEARNING_RATE: Positive | None = None  # the same; none: 1e-4, 1e-3, 1e-3
OTHER_PATIENCE: Count | None = None  # the same, epochs without a better held-out loss; none: 50, 100, 50
TOP_MARKERS: Count | None = None  # beta_vae: marker genes per type that its encoder reads (omicverse: 200); none: all
PCA_COMPONENTS: Count = 2500  # pca_cvae: principal components that it models, if the data have so many (published)
CONV_SIDE: Count | None = None  # conv_cvae: side of the image, pixels (published: 144); none: as small as it can be
CONV_KERNEL: Count = 3  # conv_cvae: side of the kernels, pixels, odd (published)
CONV_STRIDES: Count = 2  # conv_cvae: pixels from one position of a kernel to the next (published)
CONV_FILTERS: Several = 16  # conv_cvae: filters of the first convolution, half as many as of the second (published)
CONV_N_LATENT: Count = 2  # conv_cvae: dimensions of z (published)

# Running
RESUME = False  # continue from models/gmvae_last.pt
MEMORY_GB: NotNegative = 0.5  # for the train cells; a larger set is read from disk in random blocks during training
DEVICE: Literal["auto", "cpu", "cuda"] = "auto"  # auto: a GPU where there is one
SEED: Seed = 123  # of everything random in this stage
DATA_DIR = "data"  # folder
MODELS_DIR = "models"  # folder
FIG_DIR = "fig"  # folder


def main() -> None:
    if PRESET == "paper" or GENERATOR == "paper_gmvae":
        options.apply_preset(globals(), paper_preset())
    data, models, fig = folder(DATA_DIR), folder(MODELS_DIR), folder(FIG_DIR)
    keep_freed_memory()
    device = parallel.start(DEVICE)
    adata = read_counts(data / "train.h5ad", "_1_split_train_test.py")
    cell_type = adata.obs["cell_type"].cat
    train, held_out = split_train(adata.X, cell_type.codes.to_numpy(dtype=np.int64), device)
    print(
        f"{len(train):,} cells to train on{'' if train.in_memory_cells else ', read from disk'}, "
        f"{len(held_out) if held_out else 0:,} held out; "
        f"{adata.n_vars:,} genes, {len(cell_type.categories)} cell types; on {device}"
        + (f", {parallel.N_RANKS} processes" if parallel.N_RANKS > 1 else "")
    )
    about = {
        "stage": "_3_train_gmvae.py",
        "dataset": adata.uns["dataset"],
        "constants": options.constants(globals()),
        "gene_names": list(adata.var_names),
        "cell_types": list(cell_type.categories),
        "split_id": adata.uns["split_id"],
    }
    condition_idx = None
    if CONDITION is not None:
        condition = condition_of(adata.obs)
        about["conditions"] = {"column": CONDITION, "values": list(condition.cat.categories)}
        condition_idx = condition.cat.codes.to_numpy(dtype=np.int64)
    if GENERATOR == "gmvae":
        assert held_out is not None
        trainer = train_gmvae(train, held_out, about, models, condition_idx)
    else:
        trainer = train_other(train, held_out, about, models)
    unit = "nats per cell" if GENERATOR.endswith("gmvae") else "squared error, sum over a cell"
    if parallel.IS_FIRST:
        figure = fig / f"{GENERATOR}_loss.png"
        plots_training.loss_curves(trainer.history_table(), trainer.best_epoch, unit, figure)
        print_written(
            "stage 3",
            [trainer.best_path, trainer.last_path, trainer.history_path, figure],
            f"python _4_train_sctape.py{options.preset_option(PRESET)}",
        )


def paper_preset() -> dict[str, tuple[Any, Any]]:
    """Constants that PRESET changes: default above, value in the paper."""
    published = registry.SETTINGS["paper_gmvae"]
    return {
        "GENERATOR": ("gmvae", "paper_gmvae"), "EPOCHS": (300, published["epochs"]), "BATCH_SIZE": (128, published["batch_size"]),
        "LEARNING_RATE": (5e-4, published["learning_rate"]), "VALIDATION_FRACTION": (0.1, 0.0),
        "PATIENCE": (30, published["patience"]), "KEEP_EVERY": (None, published["keep_every"]),
    }  # fmt: skip


def condition_of(obs: pd.DataFrame) -> pd.Series:
    """The CONDITION of each train cell, categorical.

    Raises
    ------
    ValueError
        If the column is missing or does not suit, or the generator cannot use it.
    """
    if GENERATOR != "gmvae" or PRIOR != "posterior":
        raise ValueError(
            f"CONDITION is {CONDITION!r}, but GENERATOR is {GENERATOR} and PRIOR is {PRIOR}; expected gmvae and posterior: "
            "set CONDITION to none"
        )
    usable = [name for name in obs if name not in ("cell_type", "sample", "library_size")]
    if CONDITION not in usable:
        raise ValueError(
            f"CONDITION is {CONDITION!r}; expected a column of obs, of another name than those of generated cells: "
            f"{', '.join(usable) or 'there is none'}; set it to one of them, or to none"
        )
    values = obs[CONDITION].astype("object")
    n_values, n_missing = values.nunique(), values.isna().sum()
    if n_missing or not 2 <= n_values <= len(obs) / MIN_CONDITION_CELLS:
        raise ValueError(
            f"CONDITION = {CONDITION!r} has {n_values:,} values and is missing for {n_missing:,} of {len(obs):,} cells; expected a "
            f"value for every cell, two values or more, and {MIN_CONDITION_CELLS} cells of each on average; choose another column"
        )
    return values.astype(str).astype("category")


def split_train(
    counts: CSRDataset, cell_type_idx: np.ndarray, device: torch.device
) -> tuple[CellDataset, CellDataset | None]:
    """Cells to train on and cells for early stopping, from every type; the only cell of a type is trained on.

    Only the published GMVAE without PATIENCE is trained without held-out cells (None).
    """
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


def train_gmvae(
    train: CellDataset, held_out: CellDataset, about: dict[str, Any], models: Path, condition_idx: np.ndarray | None
) -> Trainer:
    """Train, fit the prior of new cells, and compare the held-out likelihood with that of a model without latent variables.

    condition_idx: CONDITION of each cell of data/train.h5ad, or None.
    """
    torch.manual_seed(SEED)
    found = outliers.find(train, len(about["cell_types"]), SEED)
    train, held_out = (cells.corrected(found.replace) for cells in (train, held_out))
    print(f"outlier counts: up to {found.rate.max() * 1e4:.1f} of 10,000 counted molecules; replaced for the training")
    marginals = gene_marginals(train, len(about["cell_types"]))
    model = make_model(train, marginals).to(train.device)
    for name in ("group", "rate", "sizes"):
        getattr(model, f"outlier_{name}").copy_(torch.from_numpy(getattr(found, name)))
    optimizer = torch.optim.Adam(parameter_groups(model), lr=LEARNING_RATE, fused=True)
    generator = torch.Generator(train.device).manual_seed(SEED)
    trainer = Trainer("gmvae", model, optimizer, generator, about | {"arguments": model.arguments}, models, PATIENCE)
    if RESUME:
        trainer.resume()
    shared = parallel.shared(model)
    trainer.fit(EPOCHS, lambda _: train_epoch(shared, optimizer, train, generator), lambda: validate(model, held_out))
    if parallel.IS_FIRST:
        if PRIOR == "posterior":
            of_cells = None
            if condition_idx is not None:
                of_cells = read_conditions(condition_idx, train, held_out, model.n_cell_types)
            sampling.fit_prior(model, train, held_out, SEED, of_cells)
            trainer.save_best(prior=model.prior)
        print_likelihood(model, marginals, held_out)
    return trainer


def print_likelihood(model: GMVAE, marginals: GeneMarginals, held_out: CellDataset) -> None:
    """log p(x|y,l) of at most `MAX_LIKELIHOOD_CELLS` held-out cells under the GMVAE and a model without latent variables."""
    rows = np.sort(np.random.default_rng(SEED).permutation(len(held_out))[:MAX_LIKELIHOOD_CELLS])
    cells = held_out.subset(rows)
    ours, baseline = model.log_likelihood(cells).mean(), nb_per_type_log_likelihood(marginals, cells).mean()
    print(
        f"held-out log-likelihood, nats per cell: GMVAE {ours:.1f}; one negative binomial per gene and type {baseline:.1f}"
    )


def make_model(train: CellDataset, marginals: GeneMarginals) -> GMVAE:
    """The GMVAE at the start of training: as many dimensions of z as held-out cells confirm axes."""
    axes = within_type_axes(train, marginals, N_LATENT, SEED)
    print(f"{len(axes.variance)} axes of variation within the cell types, confirmed by held-out cells")
    model = GMVAE(train.n_genes, len(marginals.profiles), len(axes.variance), HIDDEN, LIKELIHOOD, DISPERSION)
    initialise(model, train, marginals, axes)
    return model


def parameter_groups(model: GMVAE) -> list[dict]:
    """theta and the loading ratios have their own learning rate."""
    others: list[torch.nn.Parameter] = []
    dispersion: list[torch.nn.Parameter] = []
    for name, p in model.named_parameters():
        (dispersion if name.startswith(("log_theta", "log_loading")) else others).append(p)
    return [{"params": others}, {"params": dispersion, "lr": DISPERSION_LEARNING_RATE}]


def train_epoch(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, train: CellDataset, generator: torch.Generator
) -> dict[str, float]:
    parts = []
    for batch in train.shuffled(BATCH_SIZE, generator, parallel.RANK, parallel.N_RANKS):
        optimizer.zero_grad()
        with torch.autocast(train.device.type, dtype=torch.bfloat16, enabled=train.device.type == "cuda"):
            losses = model(batch, registry.sample_epsilon(batch, model, generator))
        share = (
            batch.n_cells / batch.n_global * parallel.N_RANKS
        )  # gradients are averaged over processes, but cells count equally
        (losses["loss"] * share).backward()
        clip_gradients(model, MAX_GRADIENT_NORM)
        optimizer.step()
        parts.append(
            (batch.n_cells, {name: value.detach() for name, value in losses.items()})
        )  # without graph and batch
    return parallel.mean_over(parts)


def validate(model: GMVAE, held_out: CellDataset) -> dict[str, float]:
    """Losses of held-out cells at full KL weight. The stopping criterion is the negative bound, without the classifier's part."""
    generator = torch.Generator(held_out.device).manual_seed(
        SEED
    )  # the same epsilon in every epoch, so that epochs can be compared
    batches = held_out.shuffled(2 * BATCH_SIZE, generator, parallel.RANK, parallel.N_RANKS)
    means = parallel.mean_over(
        [(batch.n_cells, model(batch, registry.sample_epsilon(batch, model, generator))) for batch in batches]
    )
    return means | {"stopping_criterion": -means["elbo"]}


def train_other(train: CellDataset, held_out: CellDataset | None, about: dict[str, Any], models: Path) -> Trainer:
    """Train another generator with its published settings, except for those that the constants change."""
    names = ("epochs", "batch_size", "learning_rate", "patience")
    if GENERATOR == "paper_gmvae":
        changed = dict(zip(names, (EPOCHS, BATCH_SIZE, LEARNING_RATE, PATIENCE))) | {"keep_every": KEEP_EVERY}
    else:
        others = zip(names, (OTHER_EPOCHS, OTHER_BATCH_SIZE, OTHER_LEARNING_RATE, OTHER_PATIENCE))
        changed = {name: value for name, value in others if value is not None}
    settings = registry.SETTINGS[GENERATOR] | changed
    arguments: dict[str, dict[str, Any]] = {
        "beta_vae": {"top_markers": TOP_MARKERS},
        "pca_cvae": {"n_pcs": PCA_COMPONENTS},
        "conv_cvae": {
            "side": CONV_SIDE, "kernel": CONV_KERNEL, "strides": CONV_STRIDES, "filters": CONV_FILTERS, "n_latent": CONV_N_LATENT
        },
    }  # fmt: skip
    model, trainer = registry.fit(
        GENERATOR, train, held_out, about, settings, arguments.get(GENERATOR, {}), models, SEED, RESUME
    )
    n_parameters = sum(p.numel() for p in model.parameters())
    print(f"{GENERATOR}: {n_parameters:,} parameters; generate cells with _5_generate.py --generator {GENERATOR}")
    return trainer


if __name__ == "__main__":
    options.run(globals())
