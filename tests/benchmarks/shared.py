"""What the benchmarks share: the data and their split, a folder to run the stages in, the comparison of two sets, tables."""

import argparse
import contextlib
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from helpers import CPU, STAGES, Workplace, plain_paper_loss  # noqa: E402, F401  (benchmarks import them from here)

from lib.baselines import registry  # noqa: E402
from lib.data import batches, datasets, embedding  # noqa: E402
from lib.data.counts import digest, select_per_type, write_h5ad  # noqa: E402
from lib.evaluation import metrics  # noqa: E402
from lib.run import user_path  # noqa: E402
from lib.training import load_checkpoint  # noqa: E402

SPLIT_SEED = 123
MIN_CELLS = 3  # train cells that must hold a gene, as in stage 1
REAL = "real train cells"


def parser(description: str | None, seeds: int = 0, data: bool = True) -> argparse.ArgumentParser:
    """The options that most benchmarks have: the data, and, unless its default is 0, the number of seeds."""
    options = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    if data:
        text = "h5ad with raw counts in X and obs['cell_type'], or pbmc68k_reduced; default: that of stage 0"
        options.add_argument("--data", default="data/counts.h5ad", help=text)
    if seeds:
        options.add_argument("--seeds", type=int, default=seeds, help=f"number of seeds: 0, 1, ...; default: {seeds}")
    return options


def read(data: str, *columns: str) -> ad.AnnData:
    """The cells that have a type, as in `as_cells`, of an h5ad or of pbmc68k_reduced."""
    if data == "pbmc68k_reduced":
        adata = datasets.load(data, Path(tempfile.gettempdir()), "", None).cells.in_memory()
    else:
        adata = ad.read_h5ad(user_path(data))
    if "cell_type" not in adata.obs:
        raise ValueError(f"{data} has no obs['cell_type']; give stage 0 the labels (--labels-file, --cell-type-key)")
    return as_cells(adata[adata.obs["cell_type"].notna().to_numpy()], data, *columns)


def as_cells(adata: ad.AnnData, name: str, *columns: str) -> ad.AnnData:
    """Counts (n_cells, n_genes) in CSR; obs["cell_type"] and other columns of obs, as categories; the name in uns."""
    obs = adata.obs[["cell_type", *columns]].astype(str).astype("category")
    counts = sp.csr_matrix(adata.X, dtype=np.float32)
    return ad.AnnData(counts, obs=obs, var=pd.DataFrame(index=adata.var_names), uns={"dataset": name, "split_id": name})


def with_counts(cells: ad.AnnData, counts: sp.csr_matrix) -> ad.AnnData:
    """Cells of the same types, over the same genes, with other counts."""
    other = ad.AnnData(counts, obs=cells.obs[["cell_type"]].copy(), var=cells.var[[]].copy())
    other.X.sort_indices()
    return other


def codes(cells: ad.AnnData) -> np.ndarray:
    """(n_cells,) number of each cell's type."""
    return cells.obs["cell_type"].cat.codes.to_numpy(dtype=np.int64)


def dataset(cells: ad.AnnData) -> batches.CellDataset:
    return batches.CellDataset(cells.X, codes(cells), CPU)


def load(data: str, min_cells: int = 0, test_fraction: float = 0.25) -> tuple[ad.AnnData, ad.AnnData]:
    """Train and test cells, split within the types, always the same split, over the genes that so many cells hold."""
    cells = read(data)
    cells = cells[:, cells.X.getnnz(axis=0) >= min_cells].copy()
    train, test = split(cells, select_per_type(codes(cells), test_fraction, np.random.default_rng(SPLIT_SEED)))
    sizes = f"{train.n_obs:,} train cells, {test.n_obs:,} test cells, {train.n_vars:,} genes"
    print(f"{data}: {sizes}, {codes(cells).max() + 1} cell types")
    return train, test


def split(cells: ad.AnnData, is_test: np.ndarray) -> tuple[ad.AnnData, ad.AnnData]:
    """Train and test cells, with the genes that three train cells hold."""
    genes = cells.X[~is_test].getnnz(axis=0) >= MIN_CELLS
    uns = {"dataset": cells.uns["dataset"], "split_id": digest([cells.uns["dataset"], str(is_test.tobytes())])}
    parts = []
    for rows in (~is_test, is_test):
        part = ad.AnnData(cells.X[rows][:, genes], obs=cells.obs[rows].copy(), var=cells.var[genes], uns=uns.copy())
        part.X.sort_indices()
        parts.append(part)
    return parts[0], parts[1]


def real_cells(train: ad.AnnData, test: ad.AnnData, seed: int) -> ad.AnnData:
    """Random train cells of the types and numbers of the test cells."""
    return train[metrics.select_like(train, test.obs["cell_type"], np.random.default_rng(seed))].copy()


def evaluation_set(train: ad.AnnData, test: ad.AnnData, seed: int) -> metrics.EvaluationCells:
    """What generators are compared with; the real reference is selected anew with each seed."""
    genes = embedding.variable_genes(train, metrics.N_CORRELATED_GENES)
    return metrics.EvaluationCells(test, real_cells(train, test, seed), train, test, genes, seed)


def components(test: ad.AnnData, cells: ad.AnnData) -> tuple[np.ndarray, np.ndarray]:
    """Principal components of both sets together: those of the test cells, and those of the other cells."""
    pcs = embedding.principal_components(ad.concat([test, cells], index_unique="-"), metrics.N_TOP_GENES, metrics.N_PCS)
    return pcs[: test.n_obs], pcs[test.n_obs :]


def aucs(test: ad.AnnData, cells: ad.AnnData, pcs: tuple[np.ndarray, np.ndarray], seed: int) -> dict[str, float]:
    """How well two classifiers distinguish two sets. pcs: from `components`."""
    forest = metrics.forest_auc(np.vstack(pcs), np.arange(test.n_obs + cells.n_obs) >= test.n_obs, seed)
    return {"forest AUC": forest, "linear AUC": metrics.linear_auc(test, cells, seed)}


@contextlib.contextmanager
def workplace(**sets: ad.AnnData) -> Iterator[Workplace]:
    """A temporary folder that holds these cells (train, test) as stage 1 writes them, to run the later stages in."""
    with tempfile.TemporaryDirectory() as folder:
        place = Workplace(Path(folder))
        place.data.mkdir()
        for name, cells in sets.items():
            write_h5ad(cells, place.data / f"{name}.h5ad")
        yield place


def trained(train: ad.AnnData, seed: int, **constants: Any) -> tuple[Any, dict[str, Any]]:
    """A generator trained by the real stage 3, with its defaults but for these constants, and its checkpoint."""
    with workplace(train=train) as place:
        place.main(STAGES[3], SEED=seed, **constants)
        checkpoint = load_checkpoint(place.models / f"{constants.get('GENERATOR', 'gmvae')}.pt", STAGES[3])
    return registry.load(checkpoint, CPU), checkpoint


def mean_and_half_range(groups: pd.api.typing.DataFrameGroupBy, style: str = "{:.3f}") -> pd.DataFrame:
    """The mean of each group as text, half its range after +- where a group has several rows; empty for NaN."""
    mean, half = groups.mean(), (groups.max() - groups.min()) / 2
    text = mean.map(style.format) + (" +- " + half.map(style.format) if groups.size().max() > 1 else "")
    return text.where(mean.notna(), "")
