"""How do the generators of stage 3 compare? One split, one evaluation, one table, the GMVAE first.

run     python tests/benchmarks/generators.py --data data/counts.h5ad             (pbmc3k: hours on a CPU, most of them the beta-VAE's)
        python tests/benchmarks/generators.py --data pbmc68k_reduced --seeds 3      (half an hour)

The split, the evaluation and the real reference are those of fidelity.py. Each generator is trained by the real stage 3 on the
train cells alone, with its own default settings, and generates as many cells of each type as there are test cells. Printed: the
mean and, after +-, half the range over the seeds; seconds of training and generated cells per second, in processor time (with
OMP_NUM_THREADS=1: of one core, however busy the machine is).
"""

import time

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp
from shared import CPU, evaluation_cells, load, mean_and_half_range, parser, with_counts, workplace

from lib.baselines import registry
from lib.checkpoints import load_checkpoint
from lib.evaluation import metrics
from lib.evaluation.report import fidelity_and_memorisation

STAGE = "_3_train_gmvae.py"
NAMES = tuple(
    name for name in registry.CLASSES if name != "paper_gmvae"
)  # the GMVAE first; the published one: paper.py
REAL = "real train cells"


def generate(
    name: str, train: ad.AnnData, types: np.ndarray, seed: int, epochs: int | None
) -> tuple[sp.csr_matrix, dict[str, float]]:
    """Counts of new cells of the given types, and the cost of training and generation."""
    with workplace(train) as place:
        started = time.process_time()
        place.main(STAGE, SEED=seed, GENERATOR=name, OTHER_EPOCHS=epochs)
        seconds = time.process_time() - started
        checkpoint = load_checkpoint(place.models / f"{name}.pt", STAGE)
        n_epochs = len(pd.read_csv(place.models / f"{name}_history.csv"))
    model = registry.load(checkpoint, CPU)
    started = time.process_time()
    counts = registry.generate(model, types, seed)
    rate = len(types) / (time.process_time() - started)
    n_parameters = sum(p.numel() for p in model.parameters())
    costs = {"train CPU seconds": seconds, "epochs": n_epochs, "cells per CPU second": rate, "parameters": n_parameters}
    return counts, costs


def main() -> None:
    options = parser(__doc__, seeds=1)
    options.add_argument("--only", nargs="+", choices=NAMES, default=NAMES, help="default: all")
    options.add_argument(
        "--epochs", type=int, help="at most, of the generators beside the GMVAE; default: as published"
    )
    arguments = options.parse_args()
    train, test = load(arguments.data)
    types = test.obs["cell_type"].cat.codes.to_numpy(dtype=np.int64)
    rows = []
    for seed in range(arguments.seeds):
        evaluation = evaluation_cells(train, test, seed)
        rows.append(metrics.fidelity(test, evaluation.real_reference, evaluation.genes, seed).rename(REAL))
        for name in arguments.only:
            counts, costs = generate(name, train, types, seed, arguments.epochs)
            found = fidelity_and_memorisation(evaluation, with_counts(test, counts))
            rows.append(pd.concat([found, pd.Series(costs)]).rename(name))
            figures = ", ".join(f"{figure} {value:,.3f}" for figure, value in rows[-1].items())
            print(f"{name}, seed {seed}: {figures}", flush=True)
    shown = mean_and_half_range(pd.DataFrame(rows).groupby(level=0, sort=False), "{:,.3f}")
    print(
        f"\n{arguments.data}, {arguments.seeds} seed{'s' * (arguments.seeds > 1)}\n"
        + shown.loc[[*arguments.only, REAL]].T.to_string()
    )


if __name__ == "__main__":
    main()
