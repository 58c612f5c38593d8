"""What the benchmarks share: the data and their split, a folder to run the stages in, the table of results."""

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
from lib.data import datasets  # noqa: E402
from lib.data.counts import digest, select_per_type, write_h5ad  # noqa: E402
from lib.data.embedding import variable_genes  # noqa: E402
from lib.evaluation import metrics  # noqa: E402
from lib.evaluation.metrics import EvaluationCells
from lib.models.gmvae import GMVAE  # noqa: E402
from lib.run import user_path
from lib.training import load_checkpoint

SPLIT_SEED, TEST_FRACTION = 123, 0.25
MIN_CELLS = 3  # train cells that must hold a gene, as in stage 1


def parser(description: str | None, seeds: int) -> argparse.ArgumentParser:
    """The options that most benchmarks have: the data, and the number of seeds."""
    options = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_data_option(options)
    options.add_argument("--seeds", type=int, default=seeds, help=f"number of seeds: 0, 1, ...; default: {seeds}")
    return options


def add_data_option(options: argparse.ArgumentParser, other: str = "") -> None:
    choices = ["h5ad with raw counts in X and obs['cell_type']", "pbmc68k_reduced", *([other] if other else [])]
    text = f"{', or '.join(choices)}; default: data/counts.h5ad, from stage 0"
    options.add_argument("--data", default="data/counts.h5ad", help=text)


def read(data: str, column: str | None = None) -> ad.AnnData:
    """The cells that have a type: counts (n_cells, n_genes) in CSR, obs["cell_type"], and another column of obs, as text.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If it has no obs["cell_type"].
    """
    if data == "pbmc68k_reduced":
        adata = datasets.load(data, Path(tempfile.gettempdir()), "", None).cells.in_memory()
    else:
        try:
            adata = ad.read_h5ad(user_path(data))
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"{error}; run _0_download_data.py --dataset pbmc3k, which writes data/counts.h5ad, or give --data another h5ad"
            ) from error
    if "cell_type" not in adata.obs:
        raise ValueError(f"{data} has no obs['cell_type']; give stage 0 the labels (--labels-file, --cell-type-key)")
    adata = adata[adata.obs["cell_type"].notna().to_numpy()]
    cells = ad.AnnData(
        sp.csr_matrix(adata.X, dtype=np.float32),
        obs=pd.DataFrame({"cell_type": pd.Categorical(adata.obs["cell_type"].astype(str))}, index=adata.obs_names),
        var=pd.DataFrame(index=adata.var_names),
    )
    if column is not None:
        cells.obs[column] = adata.obs[column].astype(str).to_numpy()
    cells.uns["dataset"] = data
    return cells


def load(data: str) -> tuple[ad.AnnData, ad.AnnData]:
    """Train and test cells: 75/25 within the types, always the same split."""
    cells = read(data)
    codes = cells.obs["cell_type"].cat.codes.to_numpy(dtype=np.int64)
    train, test = split(cells, select_per_type(codes, TEST_FRACTION, np.random.default_rng(SPLIT_SEED)))
    print(
        f"{data}: {train.n_obs:,} train cells, {test.n_obs:,} test cells, {train.n_vars:,} genes, {codes.max() + 1} cell types"
    )
    return train, test


def split(cells: ad.AnnData, is_test: np.ndarray) -> tuple[ad.AnnData, ad.AnnData]:
    """Train and test cells, with the genes that three train cells hold."""
    genes = cells.X[~is_test].getnnz(axis=0) >= MIN_CELLS
    split_id = digest([cells.uns["dataset"], str(is_test.tobytes())])
    parts = []
    for rows in (~is_test, is_test):
        part = ad.AnnData(cells.X[rows][:, genes], obs=cells.obs[rows].copy(), var=cells.var[genes].copy())
        part.X.sort_indices()
        part.uns |= {"dataset": cells.uns["dataset"], "split_id": split_id}
        parts.append(part)
    return parts[0], parts[1]


def evaluation_cells(train: ad.AnnData, test: ad.AnnData, seed: int) -> EvaluationCells:
    """The test cells, with train cells of the same types and numbers, selected anew with each seed, as the real reference."""
    rows = metrics.select_like(train, test.obs["cell_type"], np.random.default_rng(seed))
    unseen = np.setdiff1d(np.arange(train.n_obs), rows)
    genes = variable_genes(train, metrics.N_CORRELATED_GENES)
    return EvaluationCells(test, train[rows].copy(), train[unseen].copy(), genes, seed)


def with_counts(cells: ad.AnnData, counts: sp.csr_matrix) -> ad.AnnData:
    """Cells of the same types, over the same genes, with other counts."""
    other = ad.AnnData(counts, obs=cells.obs[["cell_type"]].copy(), var=cells.var[[]].copy())
    other.X.sort_indices()
    return other


@contextlib.contextmanager
def workplace(train: ad.AnnData, test: ad.AnnData | None = None) -> Iterator[Workplace]:
    """A temporary folder that holds these cells as stage 1 writes them, to run the later stages in."""
    with tempfile.TemporaryDirectory() as folder:
        place = Workplace(Path(folder))
        place.data.mkdir()
        for name, cells in (("train", train), ("test", test)):
            if cells is not None:
                write_h5ad(cells, place.data / f"{name}.h5ad")
        yield place


def train_gmvae(train: ad.AnnData, seed: int, **constants) -> tuple[GMVAE, dict[str, Any]]:
    """The GMVAE of the real stage 3, with its defaults but for these constants, and its checkpoint."""
    with workplace(train) as place:
        place.main(STAGES[3], SEED=seed, **constants)
        checkpoint = load_checkpoint(place.models / "gmvae.pt", STAGES[3])
    return registry.load(checkpoint, CPU), checkpoint


def mean_and_half_range(groups: pd.api.typing.DataFrameGroupBy, style: str = "{:.3f}") -> pd.DataFrame:
    """The mean of each group as text and, where a group has several rows, half its range after +-."""
    mean, half = groups.mean(), (groups.max() - groups.min()) / 2
    return mean.map(style.format) + (" +- " + half.map(style.format) if groups.size().max() > 1 else "")
