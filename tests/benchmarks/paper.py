"""The model and the deconvolution of the paper (PRESET = "paper") beside ours, on the same split: quality, time and memory.

run     python tests/benchmarks/paper.py --data data/counts.h5ad --epochs 10 30 100     (pbmc3k: up to an hour; 4000 epochs take days)
        python tests/benchmarks/paper.py --data pbmc68k_reduced --epochs 10 100 1000
        python tests/benchmarks/paper.py --data simulated --epochs 1 10                  (10,360 cells, the size of GSE130148)

The data are split as in fidelity.py. Each preset trains by the real stages, in processes of their own, on the train cells alone with
the types of the data, and generates as many cells of each type as there are test cells. The paper's model is evaluated after each
number of --epochs: the curve of its quality. Likelihood: log p(x|y) of test cells in nats per cell, integrated over z and, for ours,
over the library size, which the published model does not have, so both say how probable the same counts are. It is an importance-
weighted bound of 20 samples, of the counts without outliers (lib/models/outliers.py). Proportions: mean absolute error on mixtures of
test cells with random proportions, ours by regression, the paper's by scTAPE as published, except for gene lengths, which the counts of
UMIs do not need. Seconds of the processor (with OMP_NUM_THREADS=1: of one core, however busy the machine is) and largest memory are
those of the process of stage 3 (proportions: of stages 2 and 4).
"""

import argparse
import math
import os
import sys
import tempfile
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import torch
from lib.evaluation.report import fidelity_and_memorisation
from scale import run, simulate
from shared import CPU, ROOT, STAGES, Workplace, add_data_option, evaluation_cells, load, with_counts, workplace

from lib.baselines import registry
from lib.bulk.pseudobulk import read_test_mixtures
from lib.data.batches import CellDataset
from lib.evaluation import metrics
from lib.evaluation.metrics import EvaluationCells
from lib.evaluation.plots_bulk import proportions
from lib.models import outliers
from lib.models.gmvae import GMVAE
from lib.models.likelihoods import gaussian_log_prob
from lib.training import load_checkpoint

N_LUNG_CELLS = 10_360  # of GSE130148
N_IMPORTANCE_SAMPLES = 20
LIBRARY_SD = 0.15  # of the proposal for log l about the observed sum of counts
SHOWN = ["forest AUC", "linear AUC", "iLISI", "gene correlation r", "library size KS", "genes detected KS"]


@torch.no_grad()
def log_likelihood(model: GMVAE, dataset: CellDataset, seed: int = 0) -> np.ndarray:
    """log p(x|y) of our GMVAE, (n_cells,), in nats: as `GMVAE.log_likelihood`, integrated over the library size l too.

    log 1/S sum_s p(x|z_s,y,l_s) p(l_s|z_s,y) p(z_s|y) / [q(z_s|x,y) r(l_s|x)], log l_s ~ Normal(log of the sum of x, LIBRARY_SD^2).
    """
    generator = torch.Generator().manual_seed(seed)
    sd = torch.tensor(LIBRARY_SD)
    parts = []
    for batch in dataset.in_order(128):
        q, p = model.q_z(model.encode_genes(batch), batch), model.p_z(batch.cell_type_idx)
        observed = model.log_library(batch.library_size)[:, 0]
        weights = []
        for _ in range(N_IMPORTANCE_SAMPLES):
            z = q[0] + (0.5 * q[1]).exp() * torch.randn(q[0].shape, generator=generator)
            log_l = observed + sd * torch.randn(observed.shape, generator=generator)
            ratio = (gaussian_log_prob(z, *p) - gaussian_log_prob(z, *q)).sum(dim=1)
            ratio += gaussian_log_prob(log_l, *model.p_l(z, batch.cell_type_idx))
            ratio -= gaussian_log_prob(log_l, observed, 2 * sd.log())
            x = model.p_x(z, log_l.exp() * model.library_median, batch.cell_type_idx)
            weights.append(x.log_prob(batch) + ratio)
        parts.append(torch.logsumexp(torch.stack(weights), dim=0) - math.log(N_IMPORTANCE_SAMPLES))
    return torch.cat(parts).numpy()


def without_outliers(train: ad.AnnData, test: ad.AnnData, seed: int) -> CellDataset:
    """The test cells, their outliers found by comparison with the train cells."""
    of_train, of_test = (
        CellDataset(part.X, part.obs["cell_type"].cat.codes.to_numpy(dtype=np.int64), CPU) for part in (train, test)
    )
    return of_test.corrected(outliers.find(of_train, of_test.cell_type_idx.max() + 1, seed).replace)


def evaluate(model: torch.nn.Module, evaluation: EvaluationCells, test: CellDataset) -> pd.Series:
    """Likelihood of the test cells (`without_outliers`), and fidelity of as many generated cells of the same types."""
    types = test.cell_type_idx
    is_ours = isinstance(model, GMVAE)
    likelihood = log_likelihood(model, test) if is_ours else model.log_likelihood(test, N_IMPORTANCE_SAMPLES)
    cells = with_counts(evaluation.test, registry.generate(model, types, evaluation.seed))
    figures = fidelity_and_memorisation(evaluation, cells)
    return pd.concat([pd.Series({"log p(x|y) of test cells": likelihood.mean()}), figures[SHOWN]])


def stage(place: Workplace, number: int, *options: str) -> tuple[float, float]:
    """Seconds of the processor and peak memory in GB of a stage in a process of its own."""
    before = os.times()
    _, memory, _ = run([str(ROOT / STAGES[number]), *place.folders(STAGES[number]), *options])
    after = os.times()
    return after.children_user + after.children_system - before.children_user - before.children_system, memory


def generators(place: Workplace, train: ad.AnnData, evaluation: EvaluationCells, epochs: list[int]) -> pd.DataFrame:
    """Rows: real train cells, ours, and the paper's model after each number of epochs."""
    real = metrics.fidelity(evaluation.test, evaluation.real_reference, evaluation.genes, evaluation.seed)
    rows = {"real train cells": real[SHOWN]}
    print(rows["real train cells"].to_frame().T.round(3).to_string(), flush=True)
    runs = [("ours", "gmvae", ["--seed", str(evaluation.seed)])]
    for i, n in enumerate(epochs):
        options = [
            "--preset",
            "paper",
            "--epochs",
            str(n),
            "--seed",
            str(evaluation.seed),
            *(["--resume"] if i else []),
        ]
        runs.append((f"paper, {n:,} of 4,000 epochs", "paper_gmvae", options))
    seconds = {"gmvae": 0.0, "paper_gmvae": 0.0}
    test = without_outliers(train, evaluation.test, evaluation.seed)
    for name, generator, options in runs:
        added, memory = stage(place, 3, *options)
        seconds[generator] += added
        model = registry.load(load_checkpoint(place.models / f"{generator}.pt", STAGES[3]), CPU)
        cost = pd.Series({"training, CPU s": seconds[generator], "peak memory, GB": memory})
        rows[name] = pd.concat([evaluate(model, evaluation, test), cost])
        print(rows[name].rename(name).to_frame().T.round(3).to_string(), flush=True)
    return pd.DataFrame(rows).loc[rows["ours"].index]


def deconvolutions(place: Workplace, train: ad.AnnData, epochs: int) -> pd.DataFrame:
    """Rows: ours, the paper's scTAPE, and a constant, on mixtures of test cells at random proportions."""
    rows = {}
    paper = ["--preset", "paper"]
    presets = {
        "ours (regression)": ("regression", [], []),
        f"paper (scTAPE, {epochs} of 640 epochs)": ("sctape", [*paper, "--no-use-gene-lengths"], [*paper, "--epochs", str(epochs)]),
    }  # fmt: skip
    for name, (method, mixing, training) in presets.items():
        costs = np.array([stage(place, 2, *mixing), stage(place, 4, *training)])
        checkpoint = load_checkpoint(place.models / "sctape.pt", STAGES[4])
        tpm, true = read_test_mixtures(place.data, train.uns["split_id"], False, False)
        random = true.index.str.startswith("dirichlet")
        found = proportions.estimate(checkpoint, tpm[random], method, 0, 0).proportions
        rows[name] = {
            "MAE": metrics.mae(true[random], found), "CCC": metrics.ccc(true[random], found), "stages 2 and 4, CPU s": costs[:, 0].sum(),
            "peak memory, GB": costs[:, 1].max(),
        }  # fmt: skip
        print(pd.DataFrame(rows).T.round(4).to_string(), flush=True)
        frequencies = train.obs["cell_type"].value_counts(normalize=True)[true.columns].to_numpy()
        constant = np.tile(frequencies, (random.sum(), 1))
        rows["constant (train frequencies)"] = {"MAE": metrics.mae(true[random], constant), "CCC": 0.0}
    return pd.DataFrame(rows)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_data_option(options, f"simulated: {N_LUNG_CELLS:,} cells of the form of GSE130148")
    options.add_argument("--epochs", type=int, nargs="+", default=[10, 30, 100], help="of the paper's model; ascending")
    options.add_argument("--sctape-epochs", type=int, default=640, help="of the paper's scTAPE; 0: no deconvolution")
    options.add_argument("--seed", type=int, default=0)
    arguments = options.parse_args()
    if arguments.epochs != sorted(arguments.epochs):
        sys.exit(
            f"--epochs are {arguments.epochs}; expected ascending numbers, because each training continues the one before"
        )
    with tempfile.TemporaryDirectory() as folder:
        if arguments.data == "simulated":
            arguments.data = str(Path(folder) / "simulated.h5ad")
            simulate(N_LUNG_CELLS, Path(arguments.data))
        train, test = load(arguments.data)
        with workplace(train, test) as place:
            table = generators(place, train, evaluation_cells(train, test, arguments.seed), arguments.epochs)
            print(f"\n{arguments.data}, seed {arguments.seed}\n" + table.round(3).to_string(), flush=True)
            if arguments.sctape_epochs:
                table = deconvolutions(place, train, arguments.sctape_epochs)
                print("\nproportions of mixtures of test cells\n" + table.round(4).to_string())


if __name__ == "__main__":
    main()
