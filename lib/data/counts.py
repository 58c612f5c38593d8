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
# Nearly every human or mouse table has these genes; they show whether genes are in rows or in columns.
COMMON_GENES = frozenset(
    "ACTB ACTG1 B2M CALM1 CD74 EEF1A1 EEF2 FAU FTH1 FTL GAPDH HSP90AB1 HSPA8 LDHA MALAT1 NEAT1 PABPC1 PTMA TMSB10 TMSB4X "
    "TPT1 TUBA1B UBA52 UBB UBC VIM".split()
)


def log_normalize(counts: sp.csr_matrix, target: float) -> sp.csr_matrix:
    """log(1 + count x target / library size) per cell, sparse; `target` in counts per cell."""
    library_size = np.asarray(counts.sum(axis=1)).ravel()
    scaled = sp.diags_array(target / np.maximum(library_size, 1)).dot(counts)
    return sp.csr_matrix(scaled.log1p(), dtype=np.float32)


def n_entries(counts: sp.csr_matrix | CSRDataset) -> int:
    """Number of counts above zero."""
    return counts.nnz if sp.issparse(counts) else counts.group["data"].shape[0]


def read_rows(counts: sp.csr_matrix | CSRDataset, rows: slice) -> sp.csr_matrix:
    """Consecutive rows of a matrix, in memory or on disk (anndata's own slices take several milliseconds more)."""
    if sp.issparse(counts):
        return counts[rows]
    group = counts.group
    with reading(Path(group.file.filename), "counts"):
        pointers = group["indptr"][rows.start : rows.stop + 1].astype(np.int64)
        entries = slice(pointers[0], pointers[-1])
        parts = group["data"][entries], group["indices"][entries], pointers - pointers[0]
    return sp.csr_matrix(parts, shape=(len(pointers) - 1, counts.shape[1]))


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


def check_values(values: np.ndarray, what: str) -> None:
    """Refuse values that are not raw counts: NaN, negative, fractional or too large; `what` names the matrix in messages."""
    if not np.isfinite(values).all():
        n_bad = np.sum(~np.isfinite(values))
        raise ValueError(f"{what} holds {n_bad:,} values that are NaN or infinite; expected raw counts")
    low, high = values.min(initial=0), values.max(initial=0)
    if low < 0:
        raise ValueError(f"{what} holds negative values (lowest {low:g}): scaled or corrected; expected raw counts")
    fractional = np.sum(values != np.rint(values))
    if fractional:
        scale = "log-normalised" if high < 25 else "normalised or corrected"
        raise ValueError(
            f"{what} looks {scale}: {fractional / np.count_nonzero(values):.0%} of its non-zero values are fractions "
            f"(largest {high:g}); expected raw counts, as before scanpy's normalize_total and log1p"
        )
    if high >= 2**24:
        raise ValueError(f"{what} holds counts up to {high:,.0f}; expected less than 16,777,216 of a gene in a cell")


def clean(counts: sp.csr_matrix) -> sp.csr_matrix:
    """The same counts with explicit zeros removed, duplicate entries summed and indices sorted."""
    counts.sum_duplicates()
    counts.eliminate_zeros()
    return counts


def sum_duplicate_genes(gene_names: pd.Index) -> tuple[sp.csr_matrix | None, pd.Index]:
    """A matrix that sums the columns of the same gene (None if all differ), and the names in the order of first appearance."""
    if gene_names.is_unique:
        return None, gene_names
    codes, unique = pd.factorize(gene_names)
    repeated = gene_names[gene_names.duplicated()].unique()
    print(f"{len(repeated):,} duplicate gene names (such as {', '.join(repeated[:3])}): their counts are summed")
    return sp.identity(len(unique), np.float32, "csr")[codes], unique


def count_known_genes(names: pd.Index) -> int:
    """Number of names that are `COMMON_GENES` or Ensembl gene IDs."""
    upper = pd.Index(names).astype(str).str.upper()
    return int((upper.isin(COMMON_GENES) | upper.str.match(r"ENS[A-Z]*G\d{6,}")).sum())


def check_orientation(barcodes: pd.Index, gene_names: pd.Index, what: str) -> None:
    """Refuse a table of genes x cells: its row names are gene names, more than its column names are."""
    if count_known_genes(barcodes) > count_known_genes(gene_names):
        raise ValueError(
            f"{what} looks transposed: its rows have gene names ({', '.join(barcodes[:3])}), its columns do not "
            f"({', '.join(gene_names[:3])}); expected cells in rows and genes in columns: save its transpose (adata.T)"
        )


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


def fingerprint(adata: ad.AnnData) -> str:
    """`Fingerprint` of an AnnData in memory."""
    whole = Fingerprint(adata.obs, adata.var_names)
    whole.add(adata.X)
    return str(whole)


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

    A FileNotFoundError says if the stage was not run; a ValueError if another program wrote the file, or data/counts.h5ad has changed.
    """
    adata = read_h5ad(require(path, stage), backed="r")
    is_split = path.name in ("train.h5ad", "test.h5ad")
    labels = adata.obs.get("cell_type")
    if (
        not {"dataset", *["split_id"] * is_split} <= adata.uns.keys()
        or not isinstance(adata.X, CSRDataset)
        or (is_split and (labels is None or labels.dtype != "category" or labels.isna().all()))
    ):
        needs = "uns['dataset'], sparse counts" + ", uns['split_id'] and categories in obs['cell_type']" * is_split
        raise ValueError(f"{path} was not written by {stage}: expected {needs}; run {stage} again")
    source = path.parent / "counts.h5ad"
    if is_split and source.exists():
        with reading(source, "an .h5ad file"), h5py.File(source) as file:
            current = ad.io.read_elem(file["uns"])
        if current.get("counts_id") != adata.uns.get("counts_id"):
            raise ValueError(
                f"{path} is stale: it was made from other counts of {adata.uns['dataset']} than {source} holds now "
                f"({current.get('dataset')}, counts {current.get('counts_id')}; expected counts {adata.uns.get('counts_id')}); "
                f"run {stage} again"
            )
    return adata


def read_split(data_folder: Path) -> tuple[ad.AnnData, ad.AnnData]:
    """Open the train cells and the test cells; a ValueError says if they come from two different splits."""
    stage, paths = "_1_split_train_test.py", [data_folder / "train.h5ad", data_folder / "test.h5ad"]
    train, test = (read_counts(path, stage) for path in paths)
    check_same_split(test.uns["split_id"], paths[1], train.uns["split_id"], paths[0], stage)
    return train, test


def write_h5ad(adata: ad.AnnData, path: Path) -> None:
    """Write an AnnData that is in memory; uns["made_by"] says which run did it (`description`, as JSON)."""
    with replacing(path) as temporary, new_hdf5(temporary) as (file, _):
        _describe(adata)
        _write_elements(adata, file)


def write_blocks(cells: ad.AnnData, blocks: Iterable[sp.csr_matrix], path: Path) -> None:
    """Write counts block by block of rows; `cells` holds everything but `X`.

    `obs`, `var`, `obsm` and `uns` are written last: the caller may fill them with each block.
    """
    with replacing(path) as temporary, new_hdf5(temporary) as (file, disk):
        _write_elements(ad.AnnData(), file)
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


def _write_elements(adata: ad.AnnData, file: h5py.File) -> None:
    ad.io.write_elem(file, "/", adata)
    if adata.raw is None:
        del file["raw"]  # anndata writes a null, which it cannot read in backed mode


@contextlib.contextmanager
def new_hdf5(path: Path) -> Iterator[tuple[h5py.File, "Disk"]]:
    """Open a new HDF5 file. An OSError of a failed write is raised when the block ends, or earlier by `Disk.check`."""
    with Disk(path, "w+") as disk:
        try:
            with h5py.File(disk, "w") as file:
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
    """Write counts in the form of the paper's code to the folder `path`, which is returned: counts.mtx (genes x cells), and genes.csv
    and clusters.csv for its rows and columns. `partition` numbers the types from 0, as in the paper's cluster files.
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
