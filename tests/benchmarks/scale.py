"""How do time and peak memory of the stages grow with the number of cells? 10,000, 50,000 and 200,000 simulated cells x 16,000 genes.

run     python tests/benchmarks/scale.py --folder /tmp/scale --cells 10000      (5 minutes; without --cells an hour and 10 GB of disk)
        python tests/benchmarks/scale.py --folder /tmp/scale --cells 10360 --stages 0       (only simulated cells, for other benchmarks)

Cells are sampled block by block from negative binomials of 12 types with 40 states each, about 950 genes detected in a cell, and
written as one h5ad; stages 0 to 5 then run as a user runs them, in processes of their own, stages 3 and 4 for `--epochs` epochs.
Peak memory is that of the stage's process and of those that it has started, looked at five times a second.
"""

import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import psutil
import scipy.sparse as sp
from shared import ROOT, STAGES, Workplace, parser

from lib.data.counts import write_blocks

N_GENES, N_TYPES, N_STATES = 16_000, 12, 40
THETA = 3.0
COUNTS_PER_CELL = 2_000
BLOCK_CELLS = 1_024


def simulate(n_cells: int, n_genes: int, path: Path) -> None:
    """Write cells of `N_TYPES` types, sampled in blocks."""
    rng = np.random.default_rng(0)
    profiles = rng.lognormal(0, 2.2, n_genes) * np.exp(sparse_effects(rng, N_TYPES, n_genes, 1.5))
    states = np.exp(rng.normal(size=(N_TYPES * N_STATES, 5)) @ sparse_effects(rng, 5, n_genes, 0.4))
    states *= np.repeat(profiles, N_STATES, axis=0)
    mu = COUNTS_PER_CELL * states / states.sum(axis=1, keepdims=True)
    types = rng.choice(N_TYPES, n_cells, p=rng.dirichlet(np.full(N_TYPES, 3)))
    state = types * N_STATES + rng.integers(0, N_STATES, n_cells)
    obs = pd.DataFrame({"cell_type": pd.Categorical([f"type {k + 1}" for k in types])})
    obs.index = [f"cell_{i}" for i in range(n_cells)]

    def blocks() -> Iterator[sp.csr_matrix]:
        for some in np.array_split(state, -(-n_cells // BLOCK_CELLS)):
            library = rng.lognormal(0, 0.4, (len(some), 1))
            yield sp.csr_matrix(rng.poisson(rng.gamma(THETA, library * mu[some] / THETA)), dtype=np.float32)

    write_blocks(ad.AnnData(obs=obs, var=pd.DataFrame(index=[f"GENE{i}" for i in range(n_genes)])), blocks(), path)


def sparse_effects(rng: np.random.Generator, n: int, n_genes: int, scale: float) -> np.ndarray:
    """Logarithms of fold changes; nine genes in ten have none."""
    return rng.normal(0, scale, (n, n_genes)) * (rng.random((n, n_genes)) < 0.1)


def run(stage: str, *options: str) -> tuple[float, float, str]:
    """Seconds, peak memory in GB, and output of a stage in a process of its own."""
    started, peak = time.perf_counter(), 0
    with tempfile.TemporaryFile("w+") as output:
        command = [sys.executable, str(ROOT / stage), *options]
        process = psutil.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        while process.poll() is None:
            with contextlib.suppress(psutil.Error):  # one of them has ended
                parts = [process, *process.children(recursive=True)]
                peak = max(peak, sum(part.memory_full_info().pss for part in parts))  # shared pages count once
            time.sleep(0.2)
        output.seek(0)
        text = output.read()
    if process.returncode:
        sys.exit(f"{command} failed:\n{text[-3000:]}")
    return time.perf_counter() - started, peak / 1e9, text


def main() -> None:
    options = parser(__doc__, data=False)
    options.add_argument("--folder", type=Path, required=True, help="where the simulated data and all results go")
    options.add_argument("--cells", type=int, nargs="+", default=[10_000, 50_000, 200_000])
    options.add_argument("--genes", type=int, default=N_GENES)
    options.add_argument("--stages", default="012345", help="digits of the stages to run")
    options.add_argument("--epochs", type=int, default=2, help="of stages 3 and 4; 0: their defaults")
    arguments = options.parse_args()
    epochs = ["--epochs", str(arguments.epochs)] if arguments.epochs else []
    rows = []
    for n_cells in arguments.cells:
        place = Workplace(arguments.folder.resolve() / str(n_cells))
        source = place.path / "source.h5ad"
        place.path.mkdir(parents=True, exist_ok=True)
        if not source.exists():
            simulate(n_cells, arguments.genes, source)
        words = {"0": ["--dataset", str(source)], "1": ["--max-genes", "none", "--max-counts", "none"]}
        words |= {"3": epochs, "4": epochs}
        for stage in (stage for stage in STAGES if stage[1] in arguments.stages):
            seconds, peak, output = run(stage, *place.folders(stage), *words.get(stage[1], []))
            row = {"cells": n_cells, "stage": stage[1], "seconds": seconds}
            rows.append(row | {"ms per cell": 1e3 * seconds / n_cells, "peak memory, GB": peak})
            line = pd.DataFrame(rows[-1:]).to_string(index=False, header=len(rows) == 1, float_format="{:10.2f}".format)
            print(line, flush=True)
            if stage[1] == "3":
                last = pd.read_csv(place.models / "gmvae_history.csv")["seconds"].iloc[-1]
                print(f"   stage 3: {0.9 * 0.75 * n_cells / last:,.0f} cells/s in its last epoch")
            if stage[1] == "5":
                print("   " + next(line for line in output.splitlines() if "generat" in line))
    table = pd.DataFrame(rows).pivot(index="cells", columns="stage", values="peak memory, GB")
    print(f"\npeak memory by stage, GB ({os.cpu_count()} processors)\n{table.round(2).to_string()}")
    if len(table) > 1:
        print("growth from the set before, %\n" + (100 * table.pct_change().iloc[1:]).round(0).to_string())


if __name__ == "__main__":
    main()
