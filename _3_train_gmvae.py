"""Stage 3: train the Gaussian-mixture VAE on the train cells, or another generator in its place.

reads   data/train.h5ad
writes  models/gmvae.pt (best on held-out train cells), gmvae_last.pt (to resume), gmvae_history.csv, tensorboard/gmvae;
        fig/gmvae_loss.png; another GENERATOR's are called like it
run     python _3_train_gmvae.py                              (watch: tensorboard --logdir models/tensorboard)
        torchrun --nproc-per-node 4 _3_train_gmvae.py         on four GPUs, or processors: the same training, shared out
time    2,000 cells x 13,000 genes: half a minute on two cores; 7,400 x 19,000: 5 minutes on one
"""

from pathlib import Path
from typing import Literal

import anndata as ad
import numpy as np
import torch
from anndata.abc import CSRDataset

from lib import options, parallel
from lib.baselines import registry as generators
from lib.data.batches import CellDataset
from lib.data.counts import n_entries, read_counts, select_per_type
from lib.files import folder, report
from lib.models.axes import within_type_axes
from lib.models.gmvae import GMVAE
from lib.models.profiles import gene_marginals, nb_per_type_log_likelihood
from lib.training import Trainer, clip_gradients, keep_freed_memory

# Generator
GENERATOR: Literal["gmvae", "beta_vae", "pca_cvae", "conv_cvae"] = (
    "gmvae"  # ours, Bulk2Single's, Generative genomics', DeepConvCVAE's
)
TOP_MARKERS: int | None = (
    None  # beta_vae: its encoder sees so many marker genes of each type; none: all genes (omicverse's tutorial: 200)
)
OTHER_EPOCHS: int | None = (
    None  # of another generator than gmvae; none: as published (5000, 150 (ours), 50), in lib/<generator>.py
)
OTHER_BATCH_SIZE: int | None = (
    None  # the same; none: 512, 256 (ours), 32. The constants below are the GMVAE's alone, down to "Running"
)
OTHER_LEARNING_RATE: float | None = None  # the same; none: 1e-4, 1e-3 (ours), 1e-3
OTHER_PATIENCE: int | None = None  # the same, epochs without a better held-out loss; none: 50

# Model (fig. 1 of the paper)
N_LATENT = 32  # dimensions of z (paper); with a linear decoder at most: as many as cells left out confirm (ours)
HIDDEN = (128, 64)  # layers of q(z|x,y), and of p(x|z) in reverse (paper)
LIKELIHOOD: Literal["nb", "zinb"] = (
    "nb"  # of counts: without extra zeros (ours; better on held-out cells) or with (paper)
)
DECODER: Literal["linear", "mlp"] = (
    "linear"  # from z to log means: a matrix and the type's profile (ours), or layers (paper)
)
DISPERSION: Literal["gene", "gene-type", "gene-cell"] = (
    "gene-type"  # one theta a gene and type (ours), or a head of the decoder (paper)
)
PRIOR: Literal["copula", "gaussian"] = (
    "copula"  # of new cells' z: fitted when the training is over (ours), or p(z|y) (paper)
)
DROPOUT = 0.0  # in encoders and decoder; any leaves z unused (ours)

# Training
EPOCHS = 300  # at most; early stopping ends it sooner (paper: 4000, all of them)
BATCH_SIZE = 128  # cells (paper: 37)
LEARNING_RATE = 5e-4  # AdamW (paper: Adam, 6e-6); cut when the held-out loss stands still
DISPERSION_LEARNING_RATE = 2e-2  # of theta, and of how far genes follow z in each type: both have far to go (ours)
WEIGHT_DECAY = 5.0  # AdamW, times the learning rate per step; without it the decoder learns the cells by heart (ours)
KL_WARMUP_EPOCHS = 1  # over which the KL terms' weight rises to 1; an mlp needs 50, or z stays unused (ours)
MAX_GRADIENT_NORM = 100.0  # gradients are clipped to it; they measure 20-90 on pbmc3k (ours)
VALIDATION_FRACTION = 0.1  # of the train cells of each type, held out to stop by (ours)
MAX_VALIDATION_CELLS = 10_000  # held out at most (ours)
PATIENCE = 30  # epochs without a better held-out bound before it stops (ours)

# Running
PAPER = False  # True: the paper's model, prior and training instead of the constants above (`as_in_the_paper`)
RESUME = False  # go on from models/gmvae_last.pt
MEMORY_GB = 0.5  # that the train cells may take; a larger set is read from disk all the while, in random blocks
DEVICE: Literal["auto", "cpu", "cuda"] = "auto"  # auto: a GPU where there is one
SEED = 123  # of everything random in this stage
DATA_DIR = "data"  # folder
MODELS_DIR = "models"  # folder
FIG_DIR = "fig"  # folder


def main() -> None:
    if PAPER:
        globals().update(as_in_the_paper())
    data, models, fig = folder(DATA_DIR), folder(MODELS_DIR), folder(FIG_DIR)
    keep_freed_memory()
    device = parallel.start(DEVICE)
    adata = read_counts(data / "train.h5ad", "_1_split_train_test.py")
    cell_type = adata.obs["cell_type"].cat
    train, held_out = hold_out(adata.X, cell_type.codes.to_numpy(dtype=np.int64), device)
    print(
        f"{len(train):,} cells to train on{'' if train.in_memory_cells else ', read from disk'}, {len(held_out):,} held out; "
        f"{adata.n_vars:,} genes, {len(cell_type.categories)} cell types; on {device}{f', {parallel.N_RANKS} processes' * (parallel.N_RANKS > 1)}"
    )
    if GENERATOR != "gmvae":
        return train_other(adata, train, held_out, models, fig)

    torch.manual_seed(SEED)
    model = make_model(train, len(cell_type.categories)).to(device)
    optimizer = torch.optim.AdamW(parameter_groups(model), lr=LEARNING_RATE, fused=True)
    about = about_data(adata) | {"arguments": model.arguments}
    generator = torch.Generator(device).manual_seed(SEED)
    trainer = Trainer("gmvae", model, optimizer, generator, about, models, PATIENCE)
    if RESUME:
        trainer.resume()
    shared = parallel.shared(model)
    trainer.fit(
        EPOCHS, lambda epoch: train_epoch(shared, optimizer, train, epoch, generator), lambda: validate(model, held_out)
    )
    trainer.draw(fig / "gmvae_loss.png", "nats per cell")
    if not parallel.IS_FIRST:
        return None
    if PRIOR == "copula":
        model.fit_prior(train, held_out, SEED)
        trainer.save_best(prior=model.prior)
    compare_with_nb(model, train, held_out)
    report(
        "stage 3",
        [trainer.best_path, trainer.last_path, trainer.history_path, fig / "gmvae_loss.png"],
        "python _4_train_sctape.py",
    )


def as_in_the_paper() -> dict[str, object]:
    return {
        "N_LATENT": 32, "HIDDEN": (128, 64), "LIKELIHOOD": "zinb", "DECODER": "mlp", "DISPERSION": "gene-cell", "PRIOR": "gaussian",
        "EPOCHS": 4000, "PATIENCE": 4000, "BATCH_SIZE": 37, "LEARNING_RATE": 6e-6, "DISPERSION_LEARNING_RATE": 6e-6, "WEIGHT_DECAY": 0.0,
    }  # fmt: skip


def make_model(train: CellDataset, n_cell_types: int) -> GMVAE:
    marginals, axes, n_latent = gene_marginals(train, n_cell_types), None, N_LATENT
    if DECODER == "linear":
        axes = within_type_axes(train, marginals, N_LATENT, SEED)
        n_latent = len(axes.variance)
        print(f"{n_latent} axes within the cell types that cells left out confirm")
    model = GMVAE(train.n_genes, n_cell_types, n_latent, HIDDEN, LIKELIHOOD, DECODER, DISPERSION, DROPOUT)
    model.initialise(train, marginals, axes)
    return model


def about_data(adata: ad.AnnData) -> dict[str, object]:
    """What a checkpoint says of the cells and constants that it comes from."""
    return {
        "stage": "_3_train_gmvae.py",
        "constants": options.constants(globals()),
        "gene_names": list(adata.var_names),
        "cell_types": list(adata.obs["cell_type"].cat.categories),
        "split_id": adata.uns["split_id"],
    }


def train_other(adata: ad.AnnData, train: CellDataset, held_out: CellDataset, models: Path, fig: Path) -> None:
    """Another generator in the GMVAE's place, with the settings that it was published with, where the constants leave them."""
    edited = {
        "epochs": OTHER_EPOCHS,
        "batch_size": OTHER_BATCH_SIZE,
        "learning_rate": OTHER_LEARNING_RATE,
        "patience": OTHER_PATIENCE,
    }
    settings = generators.SETTINGS[GENERATOR] | {name: value for name, value in edited.items() if value is not None}
    arguments = {"top_markers": TOP_MARKERS} if GENERATOR == "beta_vae" else {}
    model, trainer = generators.fit(
        GENERATOR, train, held_out, about_data(adata), settings, arguments, models, SEED, RESUME
    )
    trainer.draw(fig / f"{GENERATOR}_loss.png", "squared error, sum over a cell")
    if parallel.IS_FIRST:
        print(
            f"{GENERATOR}: {sum(p.numel() for p in model.parameters()):,} parameters; draw from it with _5_generate.py --generator {GENERATOR}"
        )
        report(
            "stage 3",
            [trainer.best_path, trainer.last_path, trainer.history_path, fig / f"{GENERATOR}_loss.png"],
            "python _4_train_sctape.py",
        )


def hold_out(counts: CSRDataset, cell_type_idx: np.ndarray, device: torch.device) -> tuple[CellDataset, CellDataset]:
    """Part the train cells, type by type, into cells to train on and cells to stop by; a type keeps at least one of each."""
    n_cells = np.bincount(cell_type_idx[cell_type_idx >= 0])
    fraction = min(VALIDATION_FRACTION, MAX_VALIDATION_CELLS / n_cells.sum())
    is_held_out = select_per_type(cell_type_idx, fraction, np.random.default_rng(SEED)) & (n_cells[cell_type_idx] > 1)
    if not min(BATCH_SIZE, is_held_out.sum()) >= parallel.N_RANKS:
        raise ValueError(
            f"{parallel.N_RANKS} processes cannot share BATCH_SIZE = {BATCH_SIZE} cells and {is_held_out.sum()} held-out cells; start fewer"
        )
    fits = n_entries(counts) * 8 <= MEMORY_GB * 1e9
    train = CellDataset(counts, cell_type_idx, device, np.flatnonzero(~is_held_out), in_memory=fits)
    return train, CellDataset(counts, cell_type_idx, device, np.flatnonzero(is_held_out))


def parameter_groups(model: GMVAE) -> list[dict]:
    """Weights of networks decay; biases, scales and axes do not, nor do theta and the loadings' ratios, which have a learning rate of their own."""
    groups = {"weights": [], "others": [], "dispersion": []}
    for name, p in model.named_parameters():
        on_axes = name.startswith("q_axes") or (DECODER == "linear" and name.startswith("p_x_z"))
        kind = (
            "dispersion"
            if name.startswith(("log_theta", "log_loading"))
            else "weights"
            if p.dim() > 1 and not on_axes
            else "others"
        )
        groups[kind].append(p)
    return [
        {"params": groups["weights"], "weight_decay": WEIGHT_DECAY},
        {"params": groups["others"], "weight_decay": 0.0},
        {"params": groups["dispersion"], "weight_decay": 0.0, "lr": DISPERSION_LEARNING_RATE},
    ]


def train_epoch(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, train: CellDataset, epoch: int, generator: torch.Generator
) -> dict[str, float]:
    kl_weight = min(1.0, (epoch + 1) / max(1, KL_WARMUP_EPOCHS))
    parts = []
    for batch in train.shuffled(BATCH_SIZE, generator, parallel.RANK, parallel.N_RANKS):
        optimizer.zero_grad()
        with torch.autocast(train.device.type, dtype=torch.bfloat16, enabled=train.device.type == "cuda"):
            losses = model(batch, generators.sample_epsilon(batch, model, generator), kl_weight)
        share = (
            batch.n_cells / batch.n_global * parallel.N_RANKS
        )  # gradients are averaged over processes, cells should be
        (losses["loss"] * share).backward()
        clip_gradients(model, MAX_GRADIENT_NORM)
        optimizer.step()
        parts.append(
            (batch.n_cells, {name: value.detach() for name, value in losses.items()})
        )  # not the graph, nor the batch that it holds
    return parallel.mean_over(parts)


def validate(model: GMVAE, held_out: CellDataset) -> dict[str, float]:
    """Loss of held-out cells, at full KL weight; training stops by the negative bound alone, without the classifier's part."""
    generator = torch.Generator(held_out.device).manual_seed(SEED)  # the same noise every epoch: epochs compare
    batches = held_out.shuffled(2 * BATCH_SIZE, generator, parallel.RANK, parallel.N_RANKS)
    means = parallel.mean_over(
        [(batch.n_cells, model(batch, generators.sample_epsilon(batch, model, generator))) for batch in batches]
    )
    return means | {"stopping_criterion": -means["elbo"]}


def compare_with_nb(model: GMVAE, train: CellDataset, held_out: CellDataset) -> None:
    """InMemoryCells-out log-likelihood beside that of a model without latent variables."""
    ours = model.log_likelihood(held_out).mean()
    baseline = nb_per_type_log_likelihood(train, held_out).mean()
    print(
        f"held-out log-likelihood, nats per cell: GMVAE {ours:.1f}; one negative binomial per gene and type {baseline:.1f}"
    )


if __name__ == "__main__":
    options.run(globals())
