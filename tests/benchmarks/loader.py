"""How fast are batches of random cells read from a file, and how random are they? Beside AnnLoader, scDataset and reading in order.

run     python tests/benchmarks/loader.py --folder /tmp/loader     (50,000 simulated cells x 16,000 genes; 3 minutes)
needs   tests/benchmarks/requirements.txt for scDataset, which is left out without it

The cells lie in the file sorted by type, the hardest order for readers of blocks. Every reader makes batches of 128 cells for at most
`--seconds`. Ours is that of stage 3 (`CellDataset.shuffled` of counts on disk). AnnLoader reads every cell by itself; scDataset
(D'Ascenzo and Cultrera di Montesano 2025) reads blocks of 16 cells, for 64 batches at once. Printed: cells per second of wall time
and of CPU time, and the entropy of the types in a batch, in bits. `in order` reads whole blocks, without batches.
"""

import argparse
import importlib.util
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import torch
from anndata.experimental import AnnLoader
from scale import N_GENES, simulate
from shared import CPU

from lib.data.batches import CellDataset

BATCH_CELLS = 128
BLOCK_CELLS, BATCHES_AT_ONCE = 16, 64  # of scDataset

Reader = Callable[[ad.AnnData, np.ndarray], Iterator[np.ndarray]]  # cells on disk, their types: types of each batch


def ours(cells: ad.AnnData, types: np.ndarray) -> Iterator[np.ndarray]:
    dataset = CellDataset(cells.X, types, CPU, in_memory=False)
    for batch in dataset.shuffled(BATCH_CELLS, torch.Generator().manual_seed(0)):
        yield batch.cell_type_idx.numpy()


def in_order(cells: ad.AnnData, types: np.ndarray) -> Iterator[np.ndarray]:
    for _, of_block in CellDataset(cells.X, types, CPU, in_memory=False).blocks():
        yield of_block


def ann_loader(cells: ad.AnnData, types: np.ndarray) -> Iterator[np.ndarray]:
    numbered = ad.AnnData(cells.X, obs=pd.DataFrame({"type": types}, index=cells.obs_names), var=cells.var[[]])
    for batch in AnnLoader(numbered, batch_size=BATCH_CELLS, shuffle=True):
        assert batch.X.shape[1] == cells.n_vars  # reads the counts
        yield np.asarray(batch.obs["type"])


def scdataset(cells: ad.AnnData, types: np.ndarray) -> Iterator[np.ndarray]:
    from scdataset import BlockShuffling, scDataset

    def fetch(rows: np.ndarray) -> tuple:
        places = np.argsort(rows)  # HDF5 reads ascending rows
        counts = cells.X[rows[places]][np.argsort(places)]
        return counts, types[rows]

    yield from (
        batch[1]
        for batch in scDataset(
            np.arange(cells.n_obs), BlockShuffling(BLOCK_CELLS), BATCH_CELLS, BATCHES_AT_ONCE,
            fetch_callback=lambda data, rows: fetch(np.asarray(rows)),
            batch_callback=lambda data, rows: (data[0][rows], data[1][rows]),
        )
    )  # fmt: skip


READERS: dict[str, Reader] = {"in order": in_order, "ours": ours, "AnnLoader": ann_loader}
if importlib.util.find_spec("scdataset") is not None:
    READERS["scDataset"] = scdataset


def entropy(types: np.ndarray) -> float:
    """Of the frequencies of the types, in bits."""
    share = np.unique(types, return_counts=True)[1] / len(types)
    return float(-(share * np.log2(share)).sum())


def measure(reader: Reader, cells: ad.AnnData, types: np.ndarray, seconds: float) -> dict[str, float]:
    n_cells, entropies = 0, []
    wall, cpu = time.perf_counter(), time.process_time()
    for of_batch in reader(cells, types):
        n_cells += len(of_batch)
        entropies.append(entropy(of_batch))
        if time.perf_counter() - wall > seconds:
            break
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return {"cells/s": n_cells / wall, "cells/CPU s": n_cells / cpu, "entropy, bits": float(np.mean(entropies))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="where the simulated cells go")
    parser.add_argument("--cells", type=int, default=50_000)
    parser.add_argument("--genes", type=int, default=N_GENES)
    parser.add_argument("--seconds", type=float, default=20, help="for each reader, at most")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    path = arguments.folder / f"{arguments.cells}_by_type.h5ad"
    if not path.exists():
        simulate(arguments.cells, arguments.genes, path, by_type=True)
    cells = ad.read_h5ad(path, backed="r")
    types = cells.obs["cell_type"].cat.codes.to_numpy(dtype=np.int64)
    table = pd.DataFrame({name: measure(reader, cells, types, arguments.seconds) for name, reader in READERS.items()}).T
    random = np.random.default_rng(0).permuted(np.resize(types, (200, len(types))), axis=1)[:, :BATCH_CELLS]
    table.loc["random batches", "entropy, bits"] = np.mean([entropy(batch) for batch in random])
    print(table.to_string(formatters=["{:,.0f}".format, "{:,.0f}".format, "{:.2f}".format], na_rep=""))


if __name__ == "__main__":
    main()
