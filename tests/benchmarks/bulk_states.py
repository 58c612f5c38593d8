"""Does a bulk move the cells themselves? Cells generated of a bulk whose cells answer to interferon, with and without the bulk encoder.

run     python tests/benchmarks/bulk_states.py                     (pbmc3k, 10 minutes a seed on one core)

Real cells, parted as in fidelity.py; an interferon-like answer is simulated on them: 28 interferon-stimulated genes gain
molecules (Poisson; the gain varies from gene to gene, type to type and cell to cell, 4 % of a cell's counts on average), six
ribosomal ones lose half. A third of the train cells, of every type, answer; nothing says which. The GMVAE and the bulk encoder
are trained by the real stages 3 and 4 with their defaults (--weight-decay: of stage 3). Then two bulks of test cells, one whose cells all answer and one
whose cells do not, are given to the encoder, and as many cells of each type are generated as there are test cells: moved as the
bulk says, and not moved. Both are held against the bulk's own cells; so are real train cells, which are what can be reached
(those that answer, or those that do not) and what knows nothing (a draw of all). `--answering 0` leaves all train cells without an
answer: a state that the reference does not know.
"""

import argparse
import importlib
import sys
import tempfile
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

from fidelity import PBMC3K, load, metrics

from lib.baselines import registry as generators
from lib.bulk import bulk_encoder
from lib.bulk.pseudobulk import tpm
from lib.data.counts import write_counts
from lib.training import load_checkpoint

STIMULATED = (
    "ISG15 ISG20 IFI6 IFI16 IFI27 IFI35 IFI44 IFI44L IFIT1 IFIT2 IFIT3 IFIT5 IFITM1 IFITM2 IFITM3 MX1 MX2 OAS1 OAS2 OAS3 OASL LY6E "
    "STAT1 IRF7 CXCL10 RSAD2 XAF1 EPSTI1"
).split()
LOWERED = "RPS2 RPL3 RPLP0 RPS4X RPL5 RPS6".split()
GAIN = 0.04  # of a cell's counts


def answer(cells: ad.AnnData, chosen: np.ndarray, seed: int) -> sp.csr_matrix:
    """Counts in which the chosen cells answer to interferon; the pattern over genes and types is the same for every seed."""
    pattern, rng = np.random.default_rng(0), np.random.default_rng(seed)
    up, down = (np.flatnonzero(cells.var_names.isin(genes)) for genes in (STIMULATED, LOWERED))
    gain = pattern.lognormal(0, 1, len(up))
    gain = GAIN * gain / gain.sum() * pattern.lognormal(0, 0.4, (len(cells.obs["cell_type"].cat.categories), len(up)))
    strength = rng.lognormal(0, 0.4, cells.n_obs) * chosen
    counts = cells.X.tolil(copy=True)
    library = np.asarray(cells.X.sum(axis=1)).ravel()
    counts[:, up] = cells.X[:, up].toarray() + rng.poisson(
        (library * strength)[:, None] * gain[cells.obs["cell_type"].cat.codes]
    )
    lost = rng.binomial(cells.X[:, down].toarray().astype(int), np.where(chosen, 0.5, 0.0)[:, None])
    counts[:, down] = cells.X[:, down].toarray() - lost
    return sp.csr_matrix(counts, dtype=np.float32)


def with_counts(cells: ad.AnnData, counts: sp.csr_matrix) -> ad.AnnData:
    """The same cells and types with other counts."""
    made = ad.AnnData(counts, obs=cells.obs[["cell_type"]].copy(), var=cells.var[[]].copy())
    made.X.sort_indices()
    return made


def trained(train: ad.AnnData, seed: int, weight_decay: float | None) -> tuple[torch.nn.Module, dict]:
    """The GMVAE and the bulk encoder's checkpoint, by the real stages."""
    with tempfile.TemporaryDirectory() as folder:
        for part in ("train", "test"):  # stage 2 wants both; only its table of genes is used here
            write_counts(train, Path(folder) / f"{part}.h5ad")
        for name, more in (
            ("_2_make_pseudobulk", {"N_TRAIN_SAMPLES": 100}),
            ("_3_train_gmvae", {} if weight_decay is None else {"WEIGHT_DECAY": weight_decay}),
            ("_4_train_sctape", {"NETWORK": "bulk_encoder"}),
        ):
            stage = importlib.reload(importlib.import_module(name))
            for constant, value in (
                {"DATA_DIR": folder, "MODELS_DIR": folder, "FIG_DIR": folder, "SEED": seed} | more
            ).items():
                setattr(stage, constant, value)
            stage.main()
        model = generators.load(load_checkpoint(Path(folder) / "gmvae.pt", ""), torch.device("cpu"))
        return model, load_checkpoint(Path(folder) / "bulk_encoder.pt", "")


def distances(real: ad.AnnData, made: ad.AnnData, genes: np.ndarray, seed: int) -> dict[str, float]:
    """Root mean squared error of the types' mean log(1 + counts per 10,000), of all and of the changed genes; and fidelity."""
    changed = real.var_names.isin([*STIMULATED, *LOWERED])
    errors = []
    for name in real.obs["cell_type"].cat.categories:
        parts = [cells[(cells.obs["cell_type"] == name).to_numpy()] for cells in (real, made)]
        if parts[0].n_obs >= metrics.MIN_CELLS_PER_TYPE:
            errors.append(np.subtract(*(metrics.gene_statistics(part)["mean"] for part in parts)))
    squared = np.square(errors)
    found = metrics.fidelity(real, made, genes, seed)
    return {
        "type means RMSE": np.sqrt(squared.mean()),
        "the same, changed genes": np.sqrt(squared[:, changed].mean()),
        **found[["forest AUC", "linear AUC", "MMD", "iLISI", "gene mean MAE"]],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default=str(PBMC3K), help="h5ad with raw counts in X and obs['cell_type']")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--answering", type=float, default=1 / 3, help="share of the train cells that answer")
    parser.add_argument("--weight-decay", type=float, help="of the GMVAE; default: stage 3's")
    arguments = parser.parse_args()
    train, test = load(arguments.data)
    types = test.obs["cell_type"].cat.codes.to_numpy(dtype=np.int64)
    rows = []
    for seed in range(arguments.seeds):
        answers = np.random.default_rng([seed, 1]).random(train.n_obs) < arguments.answering
        reference = with_counts(train, answer(train, answers, seed + 1000))
        reference.uns |= train.uns
        model, checkpoint = trained(reference, seed, arguments.weight_decay)
        genes = metrics.variable_genes(reference, metrics.N_CORRELATED_GENES)
        for bulk_name, all_answer in (("cells that answer", True), ("cells that do not", False)):
            real = with_counts(test, answer(test, np.full(test.n_obs, all_answer), seed + 2000))
            bulk = pd.DataFrame(
                tpm(np.asarray(real.X.sum(axis=0)).reshape(1, -1)), index=["bulk"], columns=real.var_names
            )
            shift = bulk_encoder.shift(checkpoint, bulk)
            proportions = bulk_encoder.predict(checkpoint, bulk).to_numpy()
            with_genes = bulk_encoder.with_genes(shift, model, list(real.var_names), None, proportions, bulk, seed)
            made = {
                "moved by the bulk": sp.vstack(
                    list(model.sample(types, seed, shift=with_genes, groups=types)), format="csr"
                ),
                "moved in z alone": sp.vstack(list(model.sample(types, seed, shift=shift, groups=types)), format="csr"),
                "not moved": sp.vstack(list(model.sample(types, seed)), format="csr"),
            }
            sets = {name: with_counts(test, counts) for name, counts in made.items()}
            rng = np.random.default_rng(seed)
            sets["real train cells, all"] = reference[metrics.select_like(reference, test.obs["cell_type"], rng)].copy()
            alike = with_counts(train, answer(train, np.full(train.n_obs, all_answer), seed + 3000))
            sets["real train cells in the bulk's state"] = alike[
                metrics.select_like(alike, test.obs["cell_type"], rng)
            ].copy()
            error = np.abs(proportions[0] - np.bincount(types) / len(types)).mean()
            print(f"seed {seed}, bulk of {bulk_name}: MAE of the proportions {error:.4f}", flush=True)
            rows += [
                pd.Series(distances(real, cells, genes, seed), name=(bulk_name, name, seed))
                for name, cells in sets.items()
            ]
    table = pd.DataFrame(rows)
    table.index = pd.MultiIndex.from_tuples(table.index, names=["bulk of", "cells", "seed"])
    by_name = table.groupby(["bulk of", "cells"], sort=False)
    mean, half = by_name.mean(), (by_name.max() - by_name.min()) / 2
    print((mean.map("{:.4f}".format) + (" +- " + half.map("{:.4f}".format) if arguments.seeds > 1 else "")).to_string())


if __name__ == "__main__":
    main()
