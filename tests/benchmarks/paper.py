"""The model of the paper (PRESET = "paper") beside ours, on the same split: quality, time and memory.

run     python tests/benchmarks/paper.py --data data/counts.h5ad --epochs 10 30 100     (pbmc3k: up to an hour; 4000 epochs take days)
        python tests/benchmarks/paper.py --data pbmc68k_reduced --epochs 10 100 1000

The data are split as in fidelity.py. Each preset trains by the real stage 3, in a process of its own, on the train cells alone, and
generates as many cells of each type as there are test cells. The paper's model is evaluated after each number of --epochs: the curve of
its quality. Likelihood: log p(x|y) of test cells in nats per cell, integrated over z and, for ours, over the library size, which the
published model does not have, so both say how probable the same counts are. It is an importance-weighted bound of 20 samples, of the
counts without outliers (lib/models/profiles.py). CPU seconds (with OMP_NUM_THREADS=1: of one core, however busy the machine is) and
largest memory are those of stage 3. For the paper's deconvolution: deconvolution.py --only regression network-published.
"""

import math
import os

import anndata as ad
import numpy as np
import pandas as pd
import torch
from scale import run
from shared import CPU, REAL, STAGES, Workplace, codes, dataset, evaluation_set, load, parser, with_counts, workplace

from lib.baselines import registry
from lib.data.batches import CellDataset
from lib.evaluation import metrics
from lib.models.gmvae import GMVAE
from lib.models.likelihoods import gaussian_log_prob, importance_sample
from lib.models.profiles import find_outliers
from lib.training import load_checkpoint

N_IMPORTANCE_SAMPLES = 20
LIBRARY_SD = 0.15  # of the proposal for log l about the observed sum of counts
SHOWN = ["forest AUC", "linear AUC", "iLISI", "gene correlation r", "library size KS", "genes detected KS"]
SHOWN_OF_GENERATED = ["membership AUC", "membership TPR at 1 % FPR"]


@torch.no_grad()
def log_likelihood(model: GMVAE, cells: CellDataset, seed: int = 0) -> np.ndarray:
    """log p(x|y) of our GMVAE, (n_cells,), in nats: as `GMVAE.log_likelihood`, integrated over the library size l too.

    log 1/S sum_s p(x|z_s,y,l_s) p(l_s|z_s,y) p(z_s|y) / [q(z_s|x,y) r(l_s|x)], log l_s ~ Normal(log of the sum of x, LIBRARY_SD^2).
    """
    generator = torch.Generator().manual_seed(seed)
    log_var = 2 * torch.tensor(LIBRARY_SD).log()
    parts = []
    for batch in cells.in_order(128):
        q, p = model.q_z(model.encode_genes(batch), batch), model.p_z(batch.cell_type_idx)
        observed = model.log_library(batch.library_size)[:, 0]
        log_weights = []
        for _ in range(N_IMPORTANCE_SAMPLES):
            z, log_ratio = importance_sample(q, p, generator)
            log_l = observed + LIBRARY_SD * torch.randn(observed.shape, generator=generator)
            log_ratio += gaussian_log_prob(log_l, *model.p_l(z, batch.cell_type_idx))
            log_ratio -= gaussian_log_prob(log_l, observed, log_var)
            p_x = model.p_x(z, log_l.exp() * model.library_median, batch.cell_type_idx)
            log_weights.append(p_x.log_prob(batch) + log_ratio)
        parts.append(torch.logsumexp(torch.stack(log_weights), dim=0) - math.log(N_IMPORTANCE_SAMPLES))
    return torch.cat(parts).numpy()


def generators(
    place: Workplace, train: ad.AnnData, evaluation: metrics.EvaluationCells, epochs: list[int]
) -> pd.DataFrame:
    """Rows: real train cells, ours, and the paper's model after each number of epochs."""
    seed, n_types = evaluation.seed, len(train.obs["cell_type"].cat.categories)
    test = dataset(evaluation.test).corrected(find_outliers(dataset(train), n_types, seed).replace)
    runs = [("ours", "gmvae", [])]
    for i, n in enumerate(epochs):
        options = ["--preset", "paper", "--epochs", str(n), *["--resume"] * (i > 0)]
        runs.append((f"paper, {n:,} of 4,000 epochs", "paper_gmvae", options))
    seconds, rows = {"gmvae": 0.0, "paper_gmvae": 0.0}, {}
    for name, generator, options in runs:
        before = sum(os.times()[2:4])  # of the processes started
        _, memory, _ = run(STAGES[3], *place.folders(STAGES[3]), "--seed", str(seed), *options)
        seconds[generator] += sum(os.times()[2:4]) - before
        model = registry.load(load_checkpoint(place.models / f"{generator}.pt", STAGES[3]), CPU)
        likelihood = log_likelihood(model, test) if name == "ours" else model.log_likelihood(test, N_IMPORTANCE_SAMPLES)
        sets = ((evaluation.test, seed), (train, seed + 1000))
        cells = [with_counts(like, registry.generate(model, codes(like), draw)) for like, draw in sets]
        rows[name] = metrics.fidelity_and_membership(evaluation, *cells)[[*SHOWN, *SHOWN_OF_GENERATED]]
        rows[name]["log p(x|y) of test cells"] = likelihood.mean()
        rows[name]["training, CPU s"], rows[name]["peak memory, GB"] = seconds[generator], memory
        print(rows[name].rename(name).to_frame().T.round(3).to_string(), flush=True)
    rows[REAL] = metrics.fidelity(evaluation.test, evaluation.real_reference, evaluation.genes, seed)[SHOWN]
    return pd.DataFrame(rows).loc[rows["ours"].index]


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--epochs", type=int, nargs="+", default=[10, 30, 100], help="of the paper's model; ascending")
    options.add_argument("--seed", type=int, default=0)
    arguments = options.parse_args()
    if arguments.epochs != sorted(arguments.epochs):
        options.error(f"--epochs are {arguments.epochs}; expected ascending: each training continues the one before")
    train, test = load(arguments.data)
    with workplace(train=train) as place:
        table = generators(place, train, evaluation_set(train, test, arguments.seed), arguments.epochs)
    print(f"\n{arguments.data}, seed {arguments.seed}\n{table.round(3).to_string()}")


if __name__ == "__main__":
    main()
