"""How do time and peak memory of the stages grow with the number of cells? 10,000, 50,000 and 200,000 simulated cells x 16,000 genes.

run     python tests/benchmarks/scale.py --folder /tmp/scale --cells 10000      (5 minutes; without --cells an hour and 10 GB of disk)

Cells are sampled block by block from gamma-Poisson distributions of 12 types with expression programmes within the types, about
900 genes detected in a cell, and written as data/counts.h5ad; stages 1 to 5 then run as a user runs them, in processes of their
own, stages 3 and 4 for `--epochs` epochs. Peak memory is that of the stage's process (VmHWM).
"""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp
from shared import ROOT, STAGES

from lib.data.counts import digest, write_blocks

N_GENES, N_TYPES = 16_000, 12


def simulate(n_cells: int, path: Path) -> None:
    rng = np.random.default_rng(0)
    base = rng.lognormal(0, 2.2, N_GENES)
    profiles = base * np.exp(rng.normal(0, 1.5, (N_TYPES, N_GENES)) * (rng.random((N_TYPES, N_GENES)) < 0.1))
    profiles /= profiles.sum(axis=1, keepdims=True)
    programmes = rng.normal(0, 0.4, (5, N_GENES)) * (rng.random((5, N_GENES)) < 0.1)
    frequency = rng.dirichlet(np.full(N_TYPES, 3))
    types = rng.choice(N_TYPES, n_cells, p=frequency)

    def blocks():
        for start in range(0, n_cells, 1000):
            y = types[start : start + 1000]
            mu = profiles[y] * np.exp(rng.normal(0, 1, (len(y), 5)) @ programmes)
            mu *= (rng.lognormal(np.log(2000), 0.4, len(y)) / mu.sum(axis=1))[:, None]
            yield sp.csr_matrix(rng.poisson(mu * rng.standard_gamma(3.0, mu.shape) / 3).astype(np.float32))

    obs = pd.DataFrame(
        {"cell_type": pd.Categorical([f"type {k + 1}" for k in types])}, index=[f"cell_{i}" for i in range(n_cells)]
    )
    var = pd.DataFrame(index=[f"GENE{i}" for i in range(N_GENES)])
    uns = {
        "dataset": f"simulated {n_cells}",
        "source": "tests/benchmarks/scale.py",
        "counts_id": digest([str(n_cells)]),
    }
    write_blocks(ad.AnnData(obs=obs, var=var, uns=uns), blocks(), path)


def run(command: list[str]) -> tuple[float, float, str]:
    """Seconds, peak memory in GB, and output of a process."""
    program = f"""
import atexit, re, runpy, sys
atexit.register(lambda: print("VmHWM", re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]))
sys.argv = {command!r}
sys.path.insert(0, {str(ROOT)!r})
runpy.run_path({command[0]!r}, run_name="__main__")
"""
    started = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    seconds = time.perf_counter() - started
    if done.returncode:
        sys.exit(f"{command} failed:\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}")
    return seconds, float(done.stdout.rsplit("VmHWM", 1)[1]) / 1e6, done.stdout


def options_of(stage: str, place: Path, epochs: int) -> list[str]:
    options = ["--data-dir", str(place / "data")]
    options += ["--models-dir", str(place / "models")] if stage[1] in "345" else []
    options += ["--fig-dir", str(place / "fig")] if stage[1] != "2" else []
    options += ["--epochs", str(epochs)] if stage[1] in "34" else []
    options += ["--max-genes", "none", "--max-counts", "none"] if stage[1] == "1" else []
    return options


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="where the simulated data and all results go")
    parser.add_argument("--cells", type=int, nargs="+", default=[10_000, 50_000, 200_000])
    parser.add_argument("--epochs", type=int, default=2, help="of stage 3 and stage 4")
    arguments = parser.parse_args()
    rows = []
    for n_cells in arguments.cells:
        place = arguments.folder.resolve() / str(n_cells)
        (place / "data").mkdir(parents=True, exist_ok=True)
        if not (place / "data" / "counts.h5ad").exists():
            simulate(n_cells, place / "data" / "counts.h5ad")
        for stage in STAGES[1:]:
            seconds, memory, output = run([str(ROOT / stage), *options_of(stage, place, arguments.epochs)])
            row = {"cells": n_cells, "stage": stage[1], "seconds": seconds}
            rows.append(row | {"ms per cell": 1e3 * seconds / n_cells, "peak memory, GB": memory})
            line = pd.DataFrame(rows[-1:]).to_string(index=False, header=len(rows) == 1, float_format="{:10.2f}".format)
            print(line, flush=True)
            if stage[1] == "3":
                epochs = pd.read_csv(place / "models" / "gmvae_history.csv")
                print(f"   stage 3: {0.9 * 0.75 * n_cells / epochs['seconds'].iloc[-1]:,.0f} cells/s in its last epoch")
            if stage[1] == "5":
                print("   " + next(line for line in output.splitlines() if "generat" in line))
    table = pd.DataFrame(rows).pivot(index="cells", columns="stage", values="peak memory, GB")
    print(f"\npeak memory by stage, GB ({os.cpu_count()} processors)\n{table.round(2).to_string()}")
    print("growth from the set before, %\n" + (100 * table.pct_change().iloc[1:]).round(0).to_string())


if __name__ == "__main__":
    main()
