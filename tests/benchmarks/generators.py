"""The generators of stage 3 beside one another: one split, one judge, one table, our GMVAE first.

run     python tests/benchmarks/generators.py                               (pbmc3k, hours on a CPU: the beta-VAE has 61 million parameters)
        python tests/benchmarks/generators.py --data pbmc68k_reduced --seeds 3      (half an hour)

The split, the judge (`lib.evaluation.metrics.fidelity`) and the floor are those of fidelity.py. Each generator is trained by the real
stage 3 on the train cells alone, with its own default settings, and makes as many cells of each type as there are test cells.
Printed: mean and, after +-, half the range over the seeds; seconds of training and cells made per second, in processor time
(with OMP_NUM_THREADS=1: of one core, however busy the machine is).
"""

import argparse
import importlib
import sys
import tempfile
import time
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

from fidelity import PBMC3K, load, metrics

from lib.baselines import registry as generators
from lib.data.counts import write_counts
from lib.evaluation.comparison import judged
from lib.training import load_checkpoint

NAMES = tuple(generators.CLASSES)  # our GMVAE first


def made_by(
    name: str, train: ad.AnnData, types: np.ndarray, seed: int, epochs: int | None
) -> tuple[sp.csr_matrix, dict[str, float]]:
    """New cells of the given types, and what they cost."""
    stage = importlib.reload(importlib.import_module("_3_train_gmvae"))
    with tempfile.TemporaryDirectory() as folder:
        write_counts(train, Path(folder) / "train.h5ad")
        constants = {
            "DATA_DIR": folder,
            "MODELS_DIR": folder,
            "FIG_DIR": folder,
            "SEED": seed,
            "GENERATOR": name,
            "OTHER_EPOCHS": epochs,
        }
        for constant, value in constants.items():
            setattr(stage, constant, value)
        started = time.process_time()
        stage.main()
        seconds = time.process_time() - started
        checkpoint = load_checkpoint(Path(folder) / f"{name}.pt", "")
        n_epochs = len(pd.read_csv(Path(folder) / f"{name}_history.csv"))
    model = generators.load(checkpoint, torch.device("cpu"))
    started = time.process_time()
    counts = sp.vstack(list(model.sample(types, seed)), format="csr")
    rate = len(types) / (time.process_time() - started)
    n_parameters = sum(p.numel() for p in model.parameters())
    return counts, {
        "train CPU seconds": seconds,
        "epochs": n_epochs,
        "cells per CPU second": rate,
        "parameters": n_parameters,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", default=str(PBMC3K), help="h5ad with raw counts in X and obs['cell_type'], or pbmc68k_reduced"
    )
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--only", nargs="+", choices=NAMES, default=NAMES)
    parser.add_argument("--epochs", type=int, help="at most, of the generators beside the GMVAE; default: as published")
    arguments = parser.parse_args()
    train, test = load(arguments.data)
    types = test.obs["cell_type"].cat.codes.to_numpy(dtype=np.int64)
    genes = metrics.variable_genes(train, metrics.N_CORRELATED_GENES)
    rows = []
    for seed in range(arguments.seeds):
        floor = train[metrics.select_like(train, test.obs["cell_type"], np.random.default_rng(seed))].copy()
        rows.append(metrics.fidelity(test, floor, genes, seed).rename(("real train cells", seed)))
        for name in arguments.only:
            counts, costs = made_by(name, train, types, seed, arguments.epochs)
            cells = ad.AnnData(counts, obs=test.obs[["cell_type"]].copy(), var=test.var[[]].copy())
            rows.append(pd.concat([judged(test, floor, cells, genes, seed), pd.Series(costs)]).rename((name, seed)))
            print(", ".join(f"{key} {value:,.3f}" for key, value in rows[-1].items()), flush=True)
    table = pd.DataFrame(rows)
    table.index = pd.MultiIndex.from_tuples(table.index, names=["cells", "seed"])
    by_name = table.groupby("cells", sort=False)
    mean, half = by_name.mean(), (by_name.max() - by_name.min()) / 2
    shown = mean.map("{:,.3f}".format) + (" +- " + half.map("{:,.3f}".format) if arguments.seeds > 1 else "")
    names = [*arguments.only, "real train cells"]
    print(f"\n{arguments.data}, {arguments.seeds} seed{'s' * (arguments.seeds > 1)}\n" + shown.loc[names].T.to_string())


if __name__ == "__main__":
    main()
