"""Stage 4: prepare the deconvolution: reference profiles of the train cells, and a network trained on mixtures of them.

models/sctape.pt holds two things:
  1. the reference profiles: mean counts of each cell type in the train cells. The default deconvolution of stage 5 is a
     regression on them (lib/bulk/regression.py); it uses no network;
  2. the scTAPE network, which stage 5 uses only with DECONVOLUTION = "sctape".
With NETWORK = "bulk_encoder", this stage writes models/bulk_encoder.pt instead: a network that predicts the proportions and the
state of the cells from a bulk. Stage 5 uses it only with DECONVOLUTION = "bulk_encoder".

reads   data/pseudobulk_train.h5ad, data/train.h5ad; the gene names of BULK_FILE, if given; for the bulk encoder, models/gmvae.pt
writes  models/sctape.pt (the epoch with the lowest error on mixtures of held-out cells), sctape_last.pt (to resume),
        sctape_history.csv, tensorboard/sctape; fig/sctape_loss.png. The bulk encoder's files are named bulk_encoder
run     python _4_train_sctape.py
        python _4_train_sctape.py --network bulk_encoder
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
from lib.bulk import sctape
from lib.bulk.bulk_encoder import BulkEncoder, weights_id
from lib.bulk.bulk_states import explained, make_mixtures
from lib.bulk.network_input import most_variable_genes, read_profiles, select_genes
from lib.bulk.pseudobulk import gene_lengths, is_for_fit, read_train_mixtures, train_mixtures
from lib.bulk.reference import reference_profiles
from lib.bulk.sctape import ScTAPE
from lib.bulk.tables import read_bulk, read_gene_ids
from lib.checkpoints import check_checkpoint, load_checkpoint
from lib.data.counts import select_cells
from lib.evaluation import plots_training
from lib.files import folder, print_written, user_path
from lib.models.gmvae import GMVAE
from lib.ranges import Count, Fraction, NotNegative, Part, Positive, Seed, Several, Share
from lib.training import Trainer, keep_freed_memory

# Preset
PRESET: Literal["ours", "paper"] = "ours"  # paper: the settings of the paper, except constants that you set yourself

# Network
NETWORK: Literal["sctape", "bulk_encoder"] = "sctape"  # to train: sctape, or bulk_encoder, which predicts states too

# Genes of scTAPE (selected by the training mixtures alone)
N_GENES: Count = 1000  # genes that the proportions explain best (ours; original code: the 85 % that vary most)
VARIANCE_THRESHOLD: Share | None = None  # instead, this share of the genes, those whose TPM vary most (paper: 0.85)
SCALING: Literal["standard", "minmax"] = "standard"  # of the input: by gene (ours), or min-max by sample (paper)
BULK_FILE: str | None = None  # a bulk table to be deconvolved later: select among its genes only
GENE_IDS: str | None = None  # table of Ensembl IDs and gene names, for a BULK_FILE with IDs
MIN_GENE_COVERAGE: Share = 0.5  # least share of the selected (or signature) genes that a bulk must have (ours)

# Augmentation of scTAPE's mixtures
PLATFORM_SD: NotNegative = 1.0  # of log factors of the genes, at most, each mixture its own (ours); 0: none (paper)

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
    if NETWORK == "sctape":
        trainer, accuracy = train_sctape(mixtures, train, models, device)
    else:
        trainer, accuracy = train_bulk_encoder(mixtures, train, models, device)
    if not parallel.IS_FIRST:
        return
    figure = fig / f"{NETWORK}_loss.png"
    unit = "mean absolute error" if NETWORK == "sctape" else "error"
    plots_training.loss_curves(trainer.history_table(), trainer.best_epoch, unit, figure)
    print(f"mixtures of {accuracy}")
    following = f"python _5_generate.py{options.preset_option(PRESET)}"
    following += " --deconvolution bulk_encoder" * (NETWORK == "bulk_encoder")
    print_written("stage 4", [trainer.best_path, trainer.last_path, trainer.history_path, figure], following)


def paper_preset() -> dict[str, tuple[Any, Any]]:
    """Constants that PRESET changes: default above, value in the paper (its code, and scTAPE's, where the text does not say)."""
    return {
        "VARIANCE_THRESHOLD": (None, 0.85), "SCALING": ("standard", "minmax"), "PLATFORM_SD": (1.0, 0.0), "EPOCHS": (128, 640),
        "BATCH_SIZE": (200, 600), "LEARNING_RATE": (1e-3, 1e-4), "DROPOUT": (0.1, 0.5), "MAX_GRADIENT_NORM": (1.0, None),
        "PATIENCE": (15, None),
    }  # fmt: skip


def train_sctape(mixtures: ad.AnnData, train: ad.AnnData, models: Path, device: torch.device) -> tuple[Trainer, str]:
    """The reference profiles and the scTAPE network, in one checkpoint; returns the network's accuracy in words."""
    cell_types = list(mixtures.uns["cell_types"])
    codes = train.obs["cell_type"].cat.codes.to_numpy()
    reference = reference_profiles(train.X, codes, list(train.var_names), cell_types)
    blocks = partial(train_mixtures, mixtures, train, memory_gb=MEMORY_GB)
    if VARIANCE_THRESHOLD is None:
        genes = select_genes(mixtures, blocks, usable_genes(mixtures), N_GENES)
    else:
        genes = most_variable_genes(mixtures, blocks, usable_genes(mixtures), VARIANCE_THRESHOLD)
    profiles, mean_profile = read_profiles(mixtures, blocks, genes, SCALING == "minmax")
    proportions = mixtures.obsm["proportions"].astype(np.float32)
    is_fit = is_for_fit(mixtures)
    fit, held_out = (
        tuple(torch.from_numpy(array[part]) for array in (profiles, proportions)) for part in (is_fit, ~is_fit)
    )
    print_sizes(fit, held_out, len(genes), f"{len(cell_types)} cell types; on {device}")

    torch.manual_seed(SEED)
    model = ScTAPE(len(genes), len(cell_types), DROPOUT, PLATFORM_SD, SCALING == "minmax")
    model.initialise(fit[0])
    about = description(model, mixtures, genes, mean_profile) | {"reference": reference.to_checkpoint()}
    torch.manual_seed(SEED + parallel.RANK)  # each process has its own dropout
    trainer = train_network(model.to(device), about, fit, held_out, models)
    cells, evaluated = ("held-out", held_out) if len(held_out[0]) else ("train", fit)
    with torch.no_grad():
        error = (model.cpu().eval().proportions(evaluated[0]) - evaluated[1]).abs().mean()
    constant = np.abs(evaluated[1].numpy() - proportions[is_fit].mean(axis=0)).mean()
    accuracy = (
        f"{cells} cells: mean absolute error of the proportions {error:.4f} by the scTAPE network, "
        f"{constant:.4f} by a constant (the mean of the training mixtures); the regression is evaluated in stage 5"
    )
    return trainer, accuracy


def train_bulk_encoder(
    mixtures: ad.AnnData, train: ad.AnnData, models: Path, device: torch.device
) -> tuple[Trainer, str]:
    """The bulk encoder, on its own mixtures, whose states are known from the GMVAE's z; returns its accuracy in words."""
    cell_types = list(train.obs["cell_type"].cat.categories)
    gmvae = load_gmvae(train, models / "gmvae.pt", device)
    cells = select_cells(train, np.flatnonzero(train.obs["cell_type"].notna()))
    made = make_mixtures(
        gmvae, cells, usable_genes(mixtures), gene_lengths(mixtures), N_STATE_GENES, N_STATE_SAMPLES, CELLS_PER_STATE_SAMPLE,
        VALIDATION_FRACTION, SEED,
    )  # fmt: skip
    n_axes = made.axes["axes"].shape[1]
    print_sizes(made.fit, made.held_out, len(made.genes), f"{n_axes} state axes; on {device}")

    torch.manual_seed(SEED)
    model = BulkEncoder(len(made.genes), len(cell_types), n_axes, dropout=DROPOUT)
    model.initialise(made.fit[0], cells.obs["cell_type"].value_counts()[cell_types].to_numpy())
    about = description(model, mixtures, made.genes, made.mean_profile())
    about |= {"axes": made.axes, "gmvae_id": weights_id(gmvae)}
    trainer = train_network(model.to(device), about, made.fit, made.held_out, models)
    found = explained(model, made.held_out)
    accuracy = (
        f"held-out cells: mean absolute error of the proportions {found['mae']:.4f}; share of the variation between mixtures "
        f"that is explained: {found['means']:.0%} of the means and {found['scales']:.0%} of the log-scales for types of at least 5 % of a "
        f"mixture, {found['means_rare']:.0%} and {found['scales_rare']:.0%} for rarer types"
    )
    return trainer, accuracy


def train_network(
    model: torch.nn.Module, about: dict[str, Any], fit: tuple[torch.Tensor, ...], held_out: tuple[torch.Tensor, ...], models: Path
) -> Trainer:  # fmt: skip
    """Train a network on mixtures with the settings above; it ends with the weights of the best epoch."""
    optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE, fused=True)
    generator = torch.Generator().manual_seed(SEED)
    if PATIENCE is not None and not len(held_out[0]):
        raise ValueError(
            f"PATIENCE is {PATIENCE}, but data/pseudobulk_train.h5ad has no mixtures of held-out cells; set PATIENCE to none, "
            "or raise VALIDATION_FRACTION of stage 2 and run it again"
        )
    trainer = Trainer(NETWORK, model, optimizer, generator, about, models, PATIENCE)
    if RESUME:
        trainer.resume()
    sctape.fit(
        trainer, fit, held_out, EPOCHS, BATCH_SIZE, float("inf") if MAX_GRADIENT_NORM is None else MAX_GRADIENT_NORM
    )
    return trainer


def description(
    model: ScTAPE | BulkEncoder, mixtures: ad.AnnData, genes: np.ndarray, mean_profile: np.ndarray
) -> dict[str, Any]:
    """What the checkpoints of both networks hold beside the weights."""
    lengths, content = mixtures.var.get("gene_length_bp"), mixtures.uns.get("rna_per_cell")
    return {
        "stage": "_4_train_sctape.py",
        "arguments": model.arguments,
        "constants": options.constants(globals()),
        "gene_names": list(mixtures.var_names[genes]),
        "cell_types": list(mixtures.uns["cell_types"]),
        "split_id": mixtures.uns["split_id"],
        "mean_profile": torch.from_numpy(mean_profile),
        "gene_length_bp": None if lengths is None else lengths.dropna().to_dict(),
        "rna_per_cell": None if content is None else list(map(float, content)),
    }


def load_gmvae(train: ad.AnnData, path: Path, device: torch.device) -> GMVAE:
    """The GMVAE whose z the bulk encoder predicts, refused if it was trained on other cells."""
    stage = "_3_train_gmvae.py"
    checkpoint = load_checkpoint(path, stage)
    cell_types = list(train.obs["cell_type"].cat.categories)
    source = folder(DATA_DIR) / "train.h5ad"
    check_checkpoint(checkpoint, path, stage, list(train.var_names), cell_types, train.uns["split_id"], source)
    model = registry.load(checkpoint, device)
    assert isinstance(model, GMVAE)
    return model


def usable_genes(mixtures: ad.AnnData) -> np.ndarray:
    """Mask of the genes to select from: of known length, if lengths are used, and in BULK_FILE, if it is given."""
    lengths = gene_lengths(mixtures)
    usable = np.ones(mixtures.n_vars, dtype=bool) if lengths is None else ~np.isnan(lengths)
    if BULK_FILE is not None:
        gene_ids = read_gene_ids(user_path(GENE_IDS)) if GENE_IDS else None
        bulk = read_bulk(user_path(BULK_FILE), list(mixtures.var_names), gene_ids)
        usable &= mixtures.var_names.isin(bulk.columns)
    return usable


def print_sizes(fit: tuple[torch.Tensor, ...], held_out: tuple[torch.Tensor, ...], n_genes: int, more: str) -> None:
    print(f"{len(fit[0]):,} mixtures to train on, {len(held_out[0]):,} of held-out cells; {n_genes:,} genes, {more}")


if __name__ == "__main__":
    options.run(globals())
