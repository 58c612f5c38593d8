"""How do time and peak memory of the stages grow with the number of cells? 10,000, 50,000 and 200,000 simulated cells x 16,000 genes.

run     python tests/benchmarks/scale.py --folder /tmp/scale --cells 10000      (5 minutes; without --cells an hour and 10 GB of disk)

Cells are sampled block by block from negative binomials of 12 types with 40 states each, about 950 genes detected in a cell, and
written as one h5ad; stages 0 to 5 then run as a user runs them, in processes of their own, stages 3 and 4 for `--epochs` epochs.
Peak memory is that of the stage's process and of those that it has started, looked at five times a second.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp
from shared import ROOT, STAGES

from lib.data.counts import write_blocks

N_GENES, N_TYPES, N_STATES = 16_000, 12, 40
THETA = 3.0
COUNTS_PER_CELL = 2_000
BLOCK_CELLS = 8_192


def simulate(n_cells: int, n_genes: int, path: Path) -> None:
    """Write cells of `N_TYPES` types, sampled in blocks."""
    rng = np.random.default_rng(0)
    profiles = rng.lognormal(0, 2.2, n_genes) * np.exp(sparse_effects(rng, N_TYPES, n_genes, 1.5))
    states = np.exp(rng.normal(size=(N_TYPES * N_STATES, 5)) @ sparse_effects(rng, 5, n_genes, 0.4))
    states *= np.repeat(profiles, N_STATES, axis=0)
    mu = COUNTS_PER_CELL * states / states.sum(axis=1, keepdims=True)
    types = rng.choice(N_TYPES, n_cells, p=rng.dirichlet(np.full(N_TYPES, 3)))
    obs = pd.DataFrame({"cell_type": pd.Categorical([f"type {k + 1}" for k in types])})
    obs.index = [f"cell_{i}" for i in range(n_cells)]
    cells = ad.AnnData(obs=obs, var=pd.DataFrame(index=[f"GENE{i}" for i in range(n_genes)]))
    write_blocks(cells, negative_binomials(mu, types * N_STATES + rng.integers(0, N_STATES, n_cells), rng), path)


def sparse_effects(rng: np.random.Generator, n: int, n_genes: int, scale: float) -> np.ndarray:
    """Logarithms of fold changes; nine genes in ten have none."""
    return rng.normal(0, scale, (n, n_genes)) * (rng.random((n, n_genes)) < 0.1)


def negative_binomials(mu: np.ndarray, state: np.ndarray, rng: np.random.Generator) -> Iterator[sp.csr_matrix]:
    """Counts of cells with these means per state, times a random size of the cell.

    NB(mu, theta) is a sum of Poisson(theta log(1 + mu / theta)) clusters, their sizes logarithmic with p = mu / (mu + theta)
    (Quenouille 1949), so the time grows with the counts and not with the genes.
    """
    edges = np.cumsum(THETA * np.log1p(mu / THETA), axis=1)
    for start in range(0, len(state), BLOCK_CELLS):
        of_cell = state[start : start + BLOCK_CELLS]
        n_clusters = rng.poisson(edges[of_cell, -1] * rng.lognormal(0, 0.4, len(of_cell)))
        order = np.argsort(of_cell, kind="stable")  # the clusters of all cells of a state are placed together
        cells = np.repeat(order, n_clusters[order])
        genes = np.empty(len(cells), dtype=np.int64)
        for k, places in pd.Series(np.arange(len(cells))).groupby(of_cell[cells]).indices.items():
            found = np.searchsorted(edges[k], np.sort(rng.random(len(places))) * edges[k, -1], side="right")
            genes[places] = rng.permutation(found)
        sizes = rng.logseries(mu[of_cell[cells], genes] / (mu[of_cell[cells], genes] + THETA)).astype(np.float32)
        yield sp.coo_matrix((sizes, (cells, genes)), shape=(len(of_cell), mu.shape[1])).tocsr()


def run(command: list[str]) -> tuple[float, float, str]:
    """Seconds, peak memory in GB, and output of a process."""
    started = time.perf_counter()
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(
            [sys.executable, *command], stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        peak = 0.0
        while process.poll() is None:
            peak = max(peak, memory_of_session(process.pid))
            time.sleep(0.2)
        seconds = time.perf_counter() - started
        output.seek(0)
        text = output.read()
    if process.returncode:
        sys.exit(f"{command} failed:\n{text[-3000:]}")
    return seconds, peak / 1e6, text


def memory_of_session(session: int) -> int:
    """Memory of all processes of a session, kB; pages that they share count once."""
    total = 0
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if os.getsid(int(folder.name)) == session:
                found = re.search(r"^Pss: +(\d+)", (folder / "smaps_rollup").read_text(), re.MULTILINE)
                total += int(found[1]) if found else 0
        except OSError:  # it has ended
            continue
    return total


def options_of(stage: str, place: Path, epochs: int) -> list[str]:
    options = ["--data-dir", str(place / "data")]
    options += ["--dataset", str(place / "source.h5ad")] if stage[1] == "0" else []
    options += ["--models-dir", str(place / "models")] if stage[1] in "345" else []
    options += ["--fig-dir", str(place / "fig")] if stage[1] in "1345" else []
    options += ["--epochs", str(epochs)] if stage[1] in "34" and epochs else []
    options += ["--max-genes", "none", "--max-counts", "none"] if stage[1] == "1" else []
    return options


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="where the simulated data and all results go")
    parser.add_argument("--cells", type=int, nargs="+", default=[10_000, 50_000, 200_000])
    parser.add_argument("--genes", type=int, default=N_GENES)
    parser.add_argument("--stages", default="012345", help="digits of the stages to run")
    parser.add_argument("--epochs", type=int, default=2, help="of stages 3 and 4; 0: their defaults")
    arguments = parser.parse_args()
    rows = []
    for n_cells in arguments.cells:
        place = arguments.folder.resolve() / str(n_cells)
        place.mkdir(parents=True, exist_ok=True)
        if not (place / "source.h5ad").exists():
            simulate(n_cells, arguments.genes, place / "source.h5ad")
        for stage in (stage for stage in STAGES if stage[1] in arguments.stages):
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
    if len(table) > 1:
        print("growth from the set before, %\n" + (100 * table.pct_change().iloc[1:]).round(0).to_string())


if __name__ == "__main__":
    main()
