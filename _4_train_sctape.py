"""Stage 4: prepare the deconvolution: reference profiles of the train cells, and a network trained on mixtures of them.

models/sctape.pt holds both. The default deconvolution of stage 5 is a regression on the profiles and uses no network; scTAPE needs
DECONVOLUTION = "sctape". NETWORK = "bulk_encoder" trains the network of DECONVOLUTION = "bulk_encoder" instead.

reads   data/pseudobulk_train.h5ad, data/train.h5ad; the gene names of BULK_FILE, if given; for the bulk encoder, models/gmvae.pt
writes  models/sctape.pt (the epoch with the lowest error on mixtures of held-out cells), sctape_last.pt (to resume),
        sctape_history.csv, tensorboard/sctape; fig/sctape_loss.png. The bulk encoder's files are named bulk_encoder
run     python _4_train_sctape.py                             or with --network bulk_encoder
        torchrun --nproc-per-node 4 _4_train_sctape.py        on four GPUs or processors
time    15,000 mixtures, 1,000 genes: half a minute to 3.5 minutes on two cores
"""

from functools import partial
from pathlib import Path
from typing import Any, Literal

import anndata as ad
import numpy as np
import torch

from lib import options, parallel
from lib.baselines import registry
from lib.bulk.bulk_encoder import BulkEncoder, make_mixtures, weights_id
from lib.bulk.pseudobulk import gene_lengths, is_for_fit, read_train_mixtures, train_mixtures
from lib.bulk.regression import reference_profiles
from lib.bulk.sctape import ScTAPE, augment, most_variable_genes, read_profiles, select_genes
from lib.bulk.tables import read_bulk, read_gene_ids
from lib.data.counts import select_cells
from lib.evaluation import plots_cells
from lib.options import Count, Fraction, NotNegative, Part, Positive, Seed, Several, Share
from lib.run import folder, print_written, user_path
from lib.training import Trainer, check_checkpoint, keep_freed_memory, load_checkpoint, tensor_batches

# What to train
PRESET: Literal["ours", "paper"] = "ours"  # paper: the settings of the paper, except constants that you set yourself
NETWORK: Literal["sctape", "bulk_encoder"] = "sctape"  # to train: sctape, or bulk_encoder, which predicts states too

# Input (genes of scTAPE are selected by the training mixtures alone)
N_GENES: Count = 1000  # genes that the proportions explain best (ours; original code: the 85 % that vary most)
VARIANCE_THRESHOLD: Share | None = None  # instead, this share of the genes, those whose TPM vary most (paper: 0.85)
SCALING: Literal["standard", "minmax"] = "standard"  # of the input: by gene (ours), or min-max by sample (paper)
BULK_FILE: str | None = None  # a bulk table to be deconvolved later: select among its genes only
GENE_IDS: str | None = None  # table of Ensembl IDs and gene names, for a BULK_FILE with IDs
MIN_GENE_COVERAGE: Share = 0.5  # least share of the selected (or signature) genes that a bulk must have (ours)
PLATFORM_SD: NotNegative = 1.0  # scTAPE: simulated log factors of genes, at most, by mixture (ours); 0: none (paper)

# Training
EPOCHS: Count = 128  # at most; early stopping may end it sooner (original code: 640)
BATCH_SIZE: Count = 200  # mixtures (original code: 600)
LEARNING_RATE: Positive = 1e-3  # Adam (original code: 1e-4); reduced when the held-out error does not improve
DROPOUT: Part = 0.1  # before the encoder's layers (original code: 0.5)
MAX_GRADIENT_NORM: Positive | None = 1.0  # larger gradients are clipped to this norm (ours); none: never (paper)
PATIENCE: Count | None = 15  # epochs without a lower held-out error before training stops; none: last epoch (paper)

# Bulk encoder, which also uses BULK_FILE, GENE_IDS, MIN_GENE_COVERAGE and the settings of "Training"
N_STATE_GENES: Count = 2000  # input genes: the most variable ones of the train cells (ours)
N_STATE_SAMPLES: Several = 5_000  # mixtures of train cells that favour some states, made by this stage (ours)
CELLS_PER_STATE_SAMPLE: Count = 1_200  # cells in each of them (ours)
VALIDATION_FRACTION: Fraction = 0.25  # share of train cells held out; the same share of mixtures is made of them (ours)

# Running
RESUME = False  # go on from models/sctape_last.pt
DEVICE: Literal["auto", "cpu", "cuda"] = "auto"  # auto: a GPU if there is one
MEMORY_GB: NotNegative = 0.5  # for the train cells that mixtures are made of; more are read several times
SEED: Seed = 123  # of everything random in this stage
DATA_DIR = "data"  # folder
MODELS_DIR = "models"  # folder
FIG_DIR = "fig"  # folder


def main() -> None:
    if PRESET == "paper":
        options.apply_preset(globals(), paper_preset())
    data, models, fig = folder(DATA_DIR), folder(MODELS_DIR), folder(FIG_DIR)
    keep_freed_memory()
    device = parallel.start(DEVICE)
    mixtures, train = read_train_mixtures(data)
    trainer = (train_sctape if NETWORK == "sctape" else train_bulk_encoder)(mixtures, train, models, device)
    if not parallel.IS_FIRST:
        return
    figure, unit = fig / f"{NETWORK}_loss.png", "mean absolute error" if NETWORK == "sctape" else "error"
    plots_cells.loss_curves(trainer.history_table(), trainer.best_epoch, unit, figure)
    then = f"python _5_generate.py{options.preset_option(PRESET)}"
    then += " --deconvolution bulk_encoder" * (NETWORK == "bulk_encoder")
    print_written("stage 4", [trainer.best_path, trainer.last_path, trainer.history_path, figure], then)


def paper_preset() -> dict[str, tuple[Any, Any]]:
    """Constants that PRESET changes: default above, value in the paper (its code, and scTAPE's, where the text does not say)."""
    return {
        "VARIANCE_THRESHOLD": (None, 0.85), "SCALING": ("standard", "minmax"), "PLATFORM_SD": (1.0, 0.0), "EPOCHS": (128, 640),
        "BATCH_SIZE": (200, 600), "LEARNING_RATE": (1e-3, 1e-4), "DROPOUT": (0.1, 0.5), "MAX_GRADIENT_NORM": (1.0, None),
        "PATIENCE": (15, None),
    }  # fmt: skip


def train_sctape(mixtures: ad.AnnData, train: ad.AnnData, models: Path, device: torch.device) -> Trainer:
    """The reference profiles and the scTAPE network, in one checkpoint."""
    codes, cell_types = train.obs["cell_type"].cat.codes.to_numpy(), list(mixtures.uns["cell_types"])
    reference = reference_profiles(train.X, codes, list(train.var_names), cell_types)
    blocks = partial(train_mixtures, mixtures, train, memory_gb=MEMORY_GB)
    if VARIANCE_THRESHOLD is None:
        genes = select_genes(mixtures, blocks, usable_genes(mixtures), N_GENES)
    else:
        genes = most_variable_genes(mixtures, blocks, usable_genes(mixtures), VARIANCE_THRESHOLD)
    profiles, mean_profile = read_profiles(mixtures, blocks, genes, SCALING == "minmax")
    data = [torch.from_numpy(x) for x in (profiles, mixtures.obsm["proportions"].astype(np.float32))]
    is_fit = is_for_fit(mixtures)
    fit, held_out = (tuple(x[part].to(device) for x in data) for part in (is_fit, ~is_fit))

    torch.manual_seed(SEED)
    model = ScTAPE(len(genes), len(cell_types), DROPOUT, PLATFORM_SD, SCALING == "minmax").to(device)
    model.initialise(fit[0])
    about = {"mean_profile": torch.from_numpy(mean_profile), "reference": reference.to_checkpoint()}
    measured: tuple[torch.Tensor, ...] = held_out
    if PLATFORM_SD:  # held-out mixtures are measured by simulated platforms, too, the same in every epoch
        generator = torch.Generator(device).manual_seed(0)
        measured = (*held_out, augment(held_out[0], model.mean_share, PLATFORM_SD, generator))
    torch.manual_seed(SEED + parallel.RANK)  # each process has its own dropout
    trainer = train_network(model, mixtures, genes, about, fit, measured, models)
    cells, (x, true) = ("held-out", held_out) if len(held_out[0]) else ("train", fit)
    with torch.no_grad():
        error, constant = ((p - true).abs().mean() for p in (model.proportions(x), fit[1].mean(dim=0)))
    print(
        f"mixtures of {cells} cells: mean absolute error of the proportions {error:.4f} by the scTAPE network, "
        f"{constant:.4f} by a constant (the mean of the training mixtures); the regression is evaluated in stage 5"
    )
    return trainer


def train_bulk_encoder(mixtures: ad.AnnData, train: ad.AnnData, models: Path, device: torch.device) -> Trainer:
    """The bulk encoder, on its own mixtures, whose states are known from the GMVAE's z."""
    path, stage, cell_types = models / "gmvae.pt", "_3_train_gmvae.py", list(train.obs["cell_type"].cat.categories)
    checkpoint, source = load_checkpoint(path, stage), folder(DATA_DIR) / "train.h5ad"
    check_checkpoint(checkpoint, path, stage, list(train.var_names), cell_types, train.uns["split_id"], source)
    gmvae = registry.load(checkpoint, device)
    cells = select_cells(train, np.flatnonzero(train.obs["cell_type"].notna()))
    sizes = N_STATE_GENES, N_STATE_SAMPLES, CELLS_PER_STATE_SAMPLE
    usable, lengths = usable_genes(mixtures), gene_lengths(mixtures)
    data = make_mixtures(gmvae, cells, usable, lengths, *sizes, VALIDATION_FRACTION, SEED)
    fit, held_out = (tuple(x.to(device) for x in part) for part in (data.fit, data.held_out))

    torch.manual_seed(SEED)
    model = BulkEncoder(len(data.genes), len(cell_types), data.axes["axes"].shape[1], dropout=DROPOUT).to(device)
    model.initialise(fit[0], cells.obs["cell_type"].value_counts()[cell_types].to_numpy())
    about = {"mean_profile": torch.from_numpy(data.mean_profile), "axes": data.axes, "gmvae_id": weights_id(gmvae)}
    with torch.no_grad():
        untrained = model.eval()(*held_out)  # predicts the mean states of the train cells
    trainer = train_network(model, mixtures, data.genes, about, fit, held_out, models)
    best = trainer.history[trainer.best_epoch - 1]
    means, scales = (1 - best[f"held_out_{name}"] / untrained[name] for name in ("mean_loss", "scale_loss"))
    print(
        f"mixtures of held-out cells: mean absolute error of the proportions {best['held_out_proportion_loss']:.4f}; share of the "
        f"variation between mixtures that is explained: {means:.0%} of the means and {scales:.0%} of the log-scales of states"
    )
    return trainer


def train_network(
    model: ScTAPE | BulkEncoder, mixtures: ad.AnnData, genes: np.ndarray, about: dict[str, Any], fit: tuple[torch.Tensor, ...],
    held_out: tuple[torch.Tensor, ...], models: Path,
) -> Trainer:  # fmt: skip
    """Train a network on mixtures with the settings above; about: what its checkpoint holds besides the same of both networks."""
    n_fit, n_held_out = len(fit[0]), len(held_out[0])
    print(f"{n_fit:,} mixtures to train on, {n_held_out:,} of held-out cells; {len(genes):,} genes; on {fit[0].device}")
    if PATIENCE is not None and not n_held_out:
        raise ValueError(
            f"PATIENCE is {PATIENCE}, but data/pseudobulk_train.h5ad has no mixtures of held-out cells; "
            "set PATIENCE to none, or raise VALIDATION_FRACTION of stage 2 and run it again"
        )
    lengths, content = mixtures.var.get("gene_length_bp"), mixtures.uns.get("rna_per_cell")
    about |= {
        "stage": "_4_train_sctape.py", "arguments": model.arguments, "constants": options.constants(globals()),
        "cell_types": list(mixtures.uns["cell_types"]), "split_id": mixtures.uns["split_id"],
        "gene_names": list(mixtures.var_names[genes]), "gene_length_bp": None if lengths is None else lengths.dropna().to_dict(),
        "rna_per_cell": None if content is None else list(map(float, content)),
    }  # fmt: skip
    optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE, fused=True)
    generator = torch.Generator().manual_seed(SEED)
    trainer = Trainer(NETWORK, model, optimizer, generator, about, models)
    if RESUME:
        trainer.resume()
    trainer.fit(
        EPOCHS, lambda _: tensor_batches(fit, BATCH_SIZE, generator),
        (lambda: tensor_batches(held_out, n_held_out, torch.Generator().manual_seed(SEED))) if n_held_out else None,
        PATIENCE, MAX_GRADIENT_NORM or float("inf"),
    )  # fmt: skip
    return trainer


def usable_genes(mixtures: ad.AnnData) -> np.ndarray:
    """Mask of the genes to select from: of known length, if lengths are used, and in BULK_FILE, if it is given."""
    lengths = gene_lengths(mixtures)
    usable = np.ones(mixtures.n_vars, dtype=bool) if lengths is None else ~np.isnan(lengths)
    if BULK_FILE is not None:
        gene_ids = read_gene_ids(user_path(GENE_IDS)) if GENE_IDS else None
        bulk = read_bulk(user_path(BULK_FILE), list(mixtures.var_names), gene_ids)
        usable &= mixtures.var_names.isin(bulk.columns)
    return usable


if __name__ == "__main__":
    options.run(globals())
