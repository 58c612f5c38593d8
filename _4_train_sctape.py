"""Stage 4: train scTAPE to read cell-type proportions out of a bulk profile, and keep what its adaptive stage needs of the cells;
or the bulk encoder, which reads the cells' state as well.

reads   data/pseudobulk_train.h5ad, data/train.h5ad, and the gene names of BULK_FILE, where one is given; the bulk encoder: models/gmvae.pt
writes  models/sctape.pt (best on mixtures of held-out cells), sctape_last.pt (to resume), sctape_history.csv,
        tensorboard/sctape; fig/sctape_loss.png; the bulk encoder's are called bulk_encoder
run     python _4_train_sctape.py
        torchrun --nproc-per-node 4 _4_train_sctape.py        on four GPUs, or processors
time    15,000 mixtures, 1,000 genes: half a minute to 2 minutes on two cores
"""

from pathlib import Path
from typing import Literal

import anndata as ad
import numpy as np
import torch
from tqdm import tqdm

from lib import options, parallel
from lib.baselines import registry as generators
from lib.bulk import bulk_encoder_fit
from lib.bulk.bulk_encoder import BulkEncoder, weights_id
from lib.bulk.bulk_encoder_fit import make_mixtures
from lib.bulk.pseudobulk import tpm
from lib.bulk.reference import reference_profiles
from lib.bulk.sctape import ScTAPE, scale
from lib.bulk.tables import read_bulk, read_gene_ids
from lib.data.counts import read_counts, select_cells
from lib.files import check_same_split, folder, report, require, user_path
from lib.training import (
    Trainer,
    check_checkpoint,
    keep_freed_memory,
    load_checkpoint,
    tensor_epoch,
)

# Network
DECONVOLVER: Literal["sctape", "bulk_encoder"] = (
    "sctape"  # bulk_encoder (bulk2sc): proportions, and the mean and spread of each type's z
)

# Genes (chosen by the training mixtures alone)
N_GENES = 1000  # those whose expression the proportions explain best (ours; original code: the 85 % that vary most)
BULK_FILE: str | None = None  # a bulk table to be deconvolved later: choose among its genes only
GENE_IDS: str | None = None  # table of Ensembl IDs and gene names, for a BULK_FILE with IDs
MIN_GENE_COVERAGE = 0.5  # share of the chosen genes that a bulk must have in stage 5 (ours)

# Training
EPOCHS = 128  # at most; early stopping ends it sooner (original code: 640)
BATCH_SIZE = 200  # mixtures (original code: 600)
LEARNING_RATE = 1e-3  # Adam (original code: 1e-4); cut when the held-out error stands still
DROPOUT = 0.1  # before the encoder's layers (original code: 0.5)
MAX_GRADIENT_NORM = 1.0  # gradients are clipped to it (ours)
PATIENCE = 15  # epochs without a better held-out error before it stops (ours)

# The bulk encoder; BULK_FILE, MIN_GENE_COVERAGE and all of "Training" are its own too
N_STATE_GENES = 2000  # it reads: the most variable ones of the train cells (ours)
N_STATE_SAMPLES = 5_000  # mixtures of train cells that favour some states, made here (ours)
CELLS_PER_STATE_SAMPLE = 1_200  # cells in each (ours)
VALIDATION_FRACTION = 0.25  # of these mixtures, and of the train cells, which make these mixtures alone (ours)

# Running
RESUME = False  # go on from models/sctape_last.pt
DEVICE: Literal["auto", "cpu", "cuda"] = "auto"  # auto: a GPU where there is one
SEED = 123  # of everything random in this stage
DATA_DIR = "data"  # folder
MODELS_DIR = "models"  # folder
FIG_DIR = "fig"  # folder

ROWS_AT_ONCE = 500  # mixtures read at a time


def main() -> None:
    data, models, fig = folder(DATA_DIR), folder(MODELS_DIR), folder(FIG_DIR)
    keep_freed_memory()
    device = parallel.start(DEVICE)
    if DECONVOLVER == "bulk_encoder":
        return train_bulk_encoder(data, models, fig, device)
    samples = ad.read_h5ad(require(data / "pseudobulk_train.h5ad", "_2_make_pseudobulk.py"), backed="r")
    train = ad.read_h5ad(require(data / "train.h5ad", "_1_split_train_test.py"), backed="r")
    check_same_split(
        samples.uns["split_id"],
        data / "pseudobulk_train.h5ad",
        train.uns["split_id"],
        data / "train.h5ad",
        "_2_make_pseudobulk.py",
    )
    cell_types = list(samples.uns["cell_types"])
    reference = reference_profiles(
        train.X, train.obs["cell_type"].cat.codes.to_numpy(), list(train.var_names), cell_types
    )
    is_fit = (samples.obs["role"] == "fit").to_numpy()
    genes = choose_genes(samples, is_fit)
    profiles, mean_profile = read_profiles(samples, genes, is_fit)
    proportions = samples.obsm["proportions"].astype(np.float32)
    fit, held_out = (
        tuple(torch.from_numpy(a[part]).to(device) for a in (profiles, proportions)) for part in (is_fit, ~is_fit)
    )
    print(
        f"{is_fit.sum():,} mixtures to train on, {np.sum(~is_fit):,} of held-out cells; {len(genes):,} genes, {len(cell_types)} cell types; on {device}"
    )

    torch.manual_seed(SEED)
    model = ScTAPE(len(genes), len(cell_types), DROPOUT)
    model.initialise(torch.from_numpy(profiles[is_fit]))
    model.to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE, fused=True)
    lengths = samples.var.get("gene_length_bp")
    about = {
        "stage": "_4_train_sctape.py",
        "arguments": model.arguments,
        "constants": options.constants(globals()),
        "gene_names": list(samples.var_names[genes]),
        "cell_types": cell_types,
        "split_id": samples.uns["split_id"],
        "mean_profile": torch.from_numpy(mean_profile),
        "reference": reference.to_checkpoint(),
        "gene_length_bp": None if lengths is None else lengths.dropna().to_dict(),
    }
    torch.manual_seed(SEED + parallel.RANK)  # dropout of its own in each process
    generator = torch.Generator().manual_seed(SEED)
    trainer = Trainer("sctape", model, optimizer, generator, about, models, PATIENCE)
    if RESUME:
        trainer.resume()
    shared = parallel.shared(model)
    trainer.fit(
        EPOCHS,
        lambda _: tensor_epoch(shared, optimizer, fit, BATCH_SIZE, MAX_GRADIENT_NORM, generator),
        lambda: validate(model, *held_out),
    )
    if not parallel.IS_FIRST:
        return None
    trainer.draw(fig / "sctape_loss.png", "mean absolute error")
    constant = np.abs(proportions[~is_fit] - proportions[is_fit].mean(axis=0)).mean()
    print(
        f"mean absolute error on mixtures of held-out cells: the network {trainer.best_criterion:.4f}; the mean of the training mixtures {constant:.4f}"
    )
    report(
        "stage 4",
        [trainer.best_path, trainer.last_path, trainer.history_path, fig / "sctape_loss.png"],
        "python _5_generate.py",
    )


def train_bulk_encoder(data: Path, models: Path, fig: Path, device: torch.device) -> None:
    """The network that reads proportions and states out of a bulk, on mixtures whose states the GMVAE knows."""
    adata = read_counts(data / "train.h5ad", "_1_split_train_test.py")
    cell_types = list(adata.obs["cell_type"].cat.categories)
    checkpoint = load_checkpoint(models / "gmvae.pt", "_3_train_gmvae.py")
    check_checkpoint(
        checkpoint,
        models / "gmvae.pt",
        "_3_train_gmvae.py",
        list(adata.var_names),
        cell_types,
        adata.uns["split_id"],
        data / "train.h5ad",
    )
    gmvae = generators.load(checkpoint, device)
    cells = select_cells(adata, np.flatnonzero(adata.obs["cell_type"].notna()))
    samples = ad.read_h5ad(
        require(data / "pseudobulk_train.h5ad", "_2_make_pseudobulk.py"), backed="r"
    )  # for the lengths alone: a bulk is scaled as these are
    check_same_split(
        samples.uns["split_id"],
        data / "pseudobulk_train.h5ad",
        adata.uns["split_id"],
        data / "train.h5ad",
        "_2_make_pseudobulk.py",
    )
    lengths = samples.var.get("gene_length_bp")
    made = make_mixtures(
        gmvae, cells, usable_genes(samples), None if lengths is None else lengths.to_numpy(), N_STATE_GENES, N_STATE_SAMPLES,
        CELLS_PER_STATE_SAMPLE, VALIDATION_FRACTION, SEED,
    )  # fmt: skip
    n_axes = made.axes["axes"].shape[1]
    print(
        f"{len(made.fit[0]):,} mixtures to train on, {len(made.held_out[0]):,} of held-out cells; {len(made.genes):,} genes, {n_axes} axes of state; on {device}"
    )

    torch.manual_seed(SEED)
    model = BulkEncoder(len(made.genes), len(cell_types), n_axes, dropout=DROPOUT)
    model.initialise(made.fit[0], cells.obs["cell_type"].value_counts()[cell_types].to_numpy())
    model.to(device)
    mean_profile = np.expm1(made.fit[0].numpy().astype(np.float64)).sum(axis=0)
    about = {
        "stage": "_4_train_sctape.py",
        "arguments": model.arguments,
        "constants": options.constants(globals()),
        "gene_names": list(adata.var_names[made.genes]),
        "cell_types": cell_types,
        "split_id": adata.uns["split_id"],
        "mean_profile": torch.from_numpy(mean_profile / mean_profile.sum()),
        "gene_length_bp": None if lengths is None else lengths.dropna().to_dict(),
        "axes": made.axes,
        "gmvae_id": weights_id(gmvae),
    }
    optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE, fused=True)
    trainer = Trainer("bulk_encoder", model, optimizer, torch.Generator().manual_seed(SEED), about, models, PATIENCE)
    if RESUME:
        trainer.resume()
    bulk_encoder_fit.fit(trainer, made, EPOCHS, BATCH_SIZE, MAX_GRADIENT_NORM)
    if not parallel.IS_FIRST:
        return
    trainer.draw(fig / "bulk_encoder_loss.png", "error")
    found = bulk_encoder_fit.explained(model, made.held_out)
    print(
        f"mixtures of held-out cells: mean absolute error of the proportions {found['mae']:.4f}; of the variation of states, read from the bulk: "
        f"{found['means']:.0%} of the means and {found['scales']:.0%} of the spreads, of types that are 5 % of a mixture or more ({found['means_rare']:.0%} and {found['scales_rare']:.0%} of rarer ones)"
    )
    report(
        "stage 4",
        [trainer.best_path, trainer.last_path, trainer.history_path, fig / "bulk_encoder_loss.png"],
        "python _5_generate.py --deconvolver bulk_encoder",
    )


def blocks(samples: ad.AnnData, description: str):
    """The counts of the mixtures, some rows at a time, with the rows' place."""
    for start in tqdm(range(0, samples.n_obs, ROWS_AT_ONCE), desc=description, leave=False):
        rows = slice(start, min(start + ROWS_AT_ONCE, samples.n_obs))
        yield rows, samples.X[rows]


def usable_genes(samples: ad.AnnData) -> np.ndarray:
    """Mask of the genes that have a length, where lengths are used, and that the bulk has, where one is given."""
    lengths = samples.var.get("gene_length_bp")
    usable = np.ones(samples.n_vars, dtype=bool) if lengths is None else lengths.notna().to_numpy()
    if BULK_FILE is not None:
        bulk = read_bulk(
            user_path(BULK_FILE), list(samples.var_names), read_gene_ids(user_path(GENE_IDS)) if GENE_IDS else None
        )
        usable &= samples.var_names.isin(bulk.columns)
    return usable


def choose_genes(samples: ad.AnnData, is_fit: np.ndarray) -> np.ndarray:
    """Places of the genes to use, in the order of the table.

    Of each gene's variance over the fit mixtures, on the network's scale, a linear regression on the proportions explains a
    part; genes are ranked by that part times the share that it is. Noise and genes that all types share come last.
    """
    usable, lengths = usable_genes(samples), samples.var.get("gene_length_bp")
    proportions = samples.obsm["proportions"]
    gram, cross, squares, total, n = 0.0, 0.0, 0.0, 0.0, 0
    for rows, counts in blocks(samples, "choosing genes"):
        p = proportions[rows][is_fit[rows]]
        if len(p):
            logs = scale(
                tpm(counts[is_fit[rows]][:, usable], None if lengths is None else lengths[usable].to_numpy())
            ).astype(np.float64)
            gram, cross = gram + p.T @ p, cross + p.T @ logs
            squares, total, n = squares + np.square(logs).sum(axis=0), total + logs.sum(axis=0), n + len(p)
    variance = squares / n - (total / n) ** 2
    coefficients = np.linalg.lstsq(gram, cross, rcond=None)[0]
    explained = (coefficients * cross).sum(axis=0) / n - (total / n) ** 2
    score = np.where(
        variance > 1e-12, explained**2 / np.maximum(variance, 1e-12), 0
    )  # explained variance x its share: R^2
    n_genes = min(N_GENES, int(np.sum(score > 0)))
    if n_genes < proportions.shape[1]:
        raise ValueError(
            f"{n_genes} genes are left to read {proportions.shape[1]} cell types from; expected at least one a type: "
            "raise N_GENES, or give a bulk with more of these genes"
        )
    return np.sort(np.flatnonzero(usable)[np.argsort(-score, kind="stable")[:n_genes]])


def read_profiles(samples: ad.AnnData, genes: np.ndarray, is_fit: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What the network sees of all mixtures, and the chosen genes' mean share of a fit mixture."""
    lengths = samples.var.get("gene_length_bp")
    lengths = None if lengths is None else lengths.iloc[genes].to_numpy()
    profiles = np.empty((samples.n_obs, len(genes)), np.float32)
    share = np.zeros(len(genes))
    for rows, counts in blocks(samples, "profiles"):
        chosen = tpm(counts[:, genes], lengths)
        profiles[rows] = scale(chosen)
        share += chosen[is_fit[rows]].sum(axis=0)
    return profiles, share / share.sum()


def validate(model: ScTAPE, profiles: torch.Tensor, proportions: torch.Tensor) -> dict[str, float]:
    """Errors on mixtures of cells that no training mixture holds; training stops by that of the proportions as they are predicted."""
    losses = {name: float(value) for name, value in model(profiles, proportions).items()}
    return losses | {"stopping_criterion": float((model.proportions(profiles) - proportions).abs().mean())}


if __name__ == "__main__":
    options.run(globals())
