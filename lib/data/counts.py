"""The files of cells that the stages exchange: AnnData, raw counts in X as float32 CSR, cell types in obs["cell_type"].

`uns` holds the name of the data set and a fingerprint of its counts and of the split. A model keeps the fingerprint of the cells that
it was trained on, so files and models that do not belong together are refused (`check_same_split`).
"""

import contextlib
import hashlib
import io
import json
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import scipy.io
import scipy.sparse as sp
from anndata.abc import CSRDataset
from tqdm import tqdm

from lib.run import check_same_split, description, reading, replacing, require

BLOCK_CELLS = 2048  # cells in memory at a time: 10-30 MB of counts
# Of 65,536 counts, 60 cells; with shuffled bytes and gzip, a fifth of the size. Index pointers count beyond 2^31.
STORED = {"chunks": (1 << 16,), "compression": "gzip", "compression_opts": 1, "shuffle": True, "indptr_dtype": np.int64}


def log_normalize(counts: sp.csr_matrix, target: float) -> sp.csr_matrix:
    """log(1 + count x target / library size) per cell, sparse; `target` in counts per cell."""
    library_size = np.asarray(counts.sum(axis=1)).ravel()
    scaled = sp.diags_array(target / np.maximum(library_size, 1)).dot(counts)
    return sp.csr_matrix(scaled.log1p(), dtype=np.float32)


def n_entries(counts: sp.csr_matrix | CSRDataset) -> int:
    """Number of counts above zero."""
    return counts.nnz if sp.issparse(counts) else counts.group["data"].shape[0]


def read_rows(counts: sp.csr_matrix | CSRDataset, rows: slice) -> sp.csr_matrix:
    """Consecutive rows of a matrix, in memory or on disk (anndata's own slices take several milliseconds more).

    ValueError if those on disk are not valid; the check takes 1 to 2 % of the time of reading a file of a stage.
    """
    if sp.issparse(counts):
        return counts[rows]
    group = counts.group
    with reading(Path(group.file.filename), "valid sparse counts"):
        pointers = group["indptr"][rows.start : rows.stop + 1].astype(np.int64)
        entries = slice(pointers[0], pointers[-1])
        parts = group["data"][entries], group["indices"][entries], pointers - pointers[0]
        block = sp.csr_matrix(parts, shape=(rows.stop - rows.start, counts.shape[1]))
        block.check_format(full_check=True)
    return block


def row_blocks(counts: sp.csr_matrix | CSRDataset, size: int = BLOCK_CELLS) -> Iterator[tuple[slice, sp.csr_matrix]]:
    """Read a matrix, in memory or on disk, in blocks of `size` rows: the rows' numbers and their counts."""
    for start in range(0, counts.shape[0], size):
        rows = slice(start, min(start + size, counts.shape[0]))
        yield rows, read_rows(counts, rows)


def selected_blocks(counts: sp.csr_matrix | CSRDataset, rows: np.ndarray) -> Iterator[tuple[sp.csr_matrix, slice]]:
    """Read some rows (ascending) block by block: their counts and their positions in `rows`."""
    for number in np.unique(rows // BLOCK_CELLS) if len(rows) else [0]:
        start, stop = number * BLOCK_CELLS, min((number + 1) * BLOCK_CELLS, counts.shape[0])
        places = slice(*np.searchsorted(rows, [start, stop]))
        yield read_rows(counts, slice(start, stop))[rows[places] - start], places


def select_cells(adata: ad.AnnData, rows: np.ndarray) -> ad.AnnData:
    """Read some cells of a file into memory; `rows` ascending."""
    counts = sp.vstack([block for block, _ in selected_blocks(adata.X, rows)], format="csr")
    return ad.AnnData(counts, obs=adata.obs.iloc[rows].copy(), var=adata.var.copy(), uns=dict(adata.uns))


def select_per_type(cell_type_idx: np.ndarray, fraction: float, rng: np.random.Generator) -> np.ndarray:
    """Mask of randomly selected cells: this fraction of each type, at least one cell; none of unknown type (-1)."""
    selected = np.zeros(len(cell_type_idx), dtype=bool)
    for k in range(cell_type_idx.max() + 1):
        cells = rng.permutation(np.flatnonzero(cell_type_idx == k))
        selected[cells[: max(1, round(fraction * len(cells)))]] = True
    return selected


def hold_out(cell_type_idx: np.ndarray, fraction: float, rng: np.random.Generator) -> np.ndarray:
    """Mask of held-out cells: this fraction of each type, at least one cell, but never a type's only cell."""
    n_cells = np.bincount(cell_type_idx[cell_type_idx >= 0], minlength=1)
    return select_per_type(cell_type_idx, fraction, rng) & (n_cells[cell_type_idx] > 1)


class Fingerprint:
    """Twelve hexadecimal digits that change with any count, barcode, gene name or cell type; counts are added in blocks."""

    def __init__(self, obs: pd.DataFrame, gene_names: pd.Index):
        cell_types = map(str, obs["cell_type"]) if "cell_type" in obs else ()
        self.names = digest(chain(obs.index, gene_names, cell_types))
        self.parts = [hashlib.sha256() for _ in range(3)]

    def add(self, counts: sp.csr_matrix) -> None:
        for part, array in zip(self.parts, (counts.data, counts.indices, np.diff(counts.indptr))):
            part.update(array if array.dtype == np.float32 else array.astype(np.int32))

    def __str__(self) -> str:
        return digest([self.names, *(part.hexdigest() for part in self.parts)])


def digest(names: Iterable[str], *arrays: np.ndarray) -> str:
    """Twelve hexadecimal digits that change with any of these."""
    sha = hashlib.sha256()
    for name in names:
        sha.update(f"{name}\n".encode())
    for array in arrays:
        sha.update(np.ascontiguousarray(array).data)
    return sha.hexdigest()[:12]


def read_h5ad(path: Path, backed: Literal["r"] | None = None) -> ad.AnnData:
    """Read an .h5ad file, or open it with `X` on disk; an error of the reader names the file and the remedy."""
    with reading(path, "an .h5ad file"):
        return ad.read_h5ad(path, backed=backed)


def read_counts(path: Path, stage: str) -> ad.AnnData:
    """Open the cells that an earlier stage wrote; `X` stays on disk and is read in blocks of rows.

    FileNotFoundError if the stage was not run; ValueError if another program wrote the file, or data/counts.h5ad has changed.
    """
    adata = read_h5ad(require(path, stage), backed="r")
    is_split, labels = path.name in ("train.h5ad", "test.h5ad"), adata.obs.get("cell_type")
    is_ours = "dataset" in adata.uns and isinstance(adata.X, CSRDataset)
    if is_split:
        has_types = labels is not None and labels.dtype == "category" and labels.notna().any()
        is_ours = is_ours and "split_id" in adata.uns and has_types
    if not is_ours:
        needs = "uns['dataset'], sparse counts" + ", uns['split_id'] and categories in obs['cell_type']" * is_split
        raise ValueError(f"{path} was not written by {stage}: expected {needs}; run {stage} again")
    source = path.parent / "counts.h5ad"
    if is_split and source.exists():
        with reading(source, "an .h5ad file"), h5py.File(source) as file:
            current = ad.io.read_elem(file["uns"])
        if current.get("counts_id") != adata.uns.get("counts_id"):
            raise ValueError(
                f"{path} is stale: it was made from other counts of {adata.uns['dataset']} than {source} holds now "
                f"({current.get('dataset')}); run {stage} again"
            )
    return adata


def read_split(data_folder: Path) -> tuple[ad.AnnData, ad.AnnData]:
    """Open the train cells and the test cells; ValueError if they come from two different splits."""
    stage, paths = "_1_split_train_test.py", [data_folder / "train.h5ad", data_folder / "test.h5ad"]
    train, test = (read_counts(path, stage) for path in paths)
    check_same_split(test.uns["split_id"], paths[1], train.uns["split_id"], paths[0], stage)
    return train, test


def write_h5ad(adata: ad.AnnData, path: Path) -> None:
    """Write an AnnData that is in memory; uns["made_by"] says which run did it (`description`, as JSON)."""
    _describe(adata)
    with new_h5ad(path, adata):
        pass


def write_blocks(cells: ad.AnnData, blocks: Iterable[sp.csr_matrix], path: Path) -> None:
    """Write counts block by block of rows; `cells` holds everything but `X`.

    `obs`, `var`, `obsm` and `uns` are written last: the caller may fill them with each block.
    """
    with new_h5ad(path, ad.AnnData()) as (file, disk):
        ad.io.write_elem(file, "X", sp.csr_matrix((0, cells.n_vars), dtype=np.float32), dataset_kwargs=STORED)
        X = ad.io.sparse_dataset(file["X"])
        with tqdm(total=cells.n_obs, desc=path.name, unit=" cells", delay=5, leave=False) as progress:
            for block in blocks:
                X.append(block)
                disk.check()
                progress.update(block.shape[0])
        assert X.shape == cells.shape
        _describe(cells)
        for name in ("obs", "var", "obsm", "uns"):
            part = getattr(cells, name)
            ad.io.write_elem(file, name, part if isinstance(part, pd.DataFrame) else dict(part))


def _describe(adata: ad.AnnData) -> None:
    """Set uns["made_by"] in a run; columns of text become categories, as in AnnData.write_h5ad."""
    if made_by := description():
        adata.uns["made_by"] = json.dumps(made_by, default=str)
    adata.strings_to_categoricals()


@contextlib.contextmanager
def new_h5ad(path: Path, content: ad.AnnData) -> Iterator[tuple[h5py.File, "Disk"]]:
    """Open a new file that holds `content`. An OSError of a failed write is raised when the block ends, or earlier by `Disk.check`."""
    with replacing(path) as temporary, Disk(temporary, "w+") as disk:
        try:
            with h5py.File(disk, "w") as file:
                ad.io.write_elem(file, "/", content)
                if content.raw is None:
                    del file["raw"]  # anndata writes a null, which it cannot read in backed mode
                yield file, disk
        finally:
            disk.check()


class Disk(io.FileIO):
    """A new file that keeps the error of a failed write for `check`: HDF5 would crash when it closes the file."""

    failure: OSError | None = None

    def check(self) -> None:
        if self.failure is not None:
            raise self.failure

    def write(self, data: Any) -> int:
        left = memoryview(data).cast("B")
        try:
            while left and self.failure is None:
                left = left[super().write(left) :]
        except OSError as error:
            self.failure = error
        return len(memoryview(data).cast("B"))

    def truncate(self, size: int | None = None) -> int:
        try:
            super().truncate(size)
        except OSError as error:
            self.failure = error
        return size or 0

    def readinto(self, buffer: Any) -> int:
        n_bytes = super().readinto(buffer) or 0
        memoryview(buffer).cast("B")[n_bytes:] = bytes(len(buffer) - n_bytes)  # what was not written reads as zeros
        return n_bytes


def write_mtx(cells: ad.AnnData, path: Path) -> Path:
    """Write counts in the form of the paper's code to the folder `path`, which is returned: counts.mtx (genes x cells), genes.csv
    and clusters.csv, whose `partition` numbers the types from 0.
    """
    path.mkdir(exist_ok=True)
    clusters = cells.obs[["cell_type", "sample"]].rename_axis("barcode").reset_index()
    clusters.insert(1, "partition", cells.obs["cell_type"].cat.codes.to_numpy())
    with replacing(path / "counts.mtx") as temporary:
        scipy.io.mmwrite(temporary, cells.X.T.astype(np.int64))
    for name, table in (("genes", cells.var_names.to_frame(name="gene")), ("clusters", clusters)):
        with replacing(path / f"{name}.csv") as temporary:
            table.to_csv(temporary, index=False)
    return path
