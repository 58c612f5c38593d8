"""The count files that the stages exchange: AnnData, cells x genes, raw counts in X as float32 CSR, types in obs["cell_type"].

`uns` holds the name of the data set and a fingerprint of the counts and of the split. A model keeps the fingerprint of the
cells that it was trained on, so files and models that do not belong together are refused (`lib.files.check_same_split`).
"""

import hashlib
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import scipy.io
import scipy.sparse as sp
from anndata.abc import CSRDataset
from tqdm import tqdm

from lib.data.hdf5 import describe, new_hdf5, read_h5ad, write_h5ad
from lib.files import check_same_split, reading, replacing, require

BLOCK_CELLS = 2048  # cells in memory at a time: 10-30 MB of counts
# Of 65,536 counts, 60 cells; with shuffled bytes and gzip, a fifth of the size. Index pointers count beyond 2^31.
STORED = {"chunks": (1 << 16,), "compression": "gzip", "compression_opts": 1, "shuffle": True, "indptr_dtype": np.int64}

# Nearly every human or mouse table has these genes; they show whether genes are in rows or in columns.
COMMON_GENES = frozenset(
    "ACTB ACTG1 B2M CALM1 CD74 EEF1A1 EEF2 FAU FTH1 FTL GAPDH HSP90AB1 HSPA8 LDHA MALAT1 NEAT1 PABPC1 PTMA TMSB10 TMSB4X "
    "TPT1 TUBA1B UBA52 UBB UBC VIM".split()
)


def check_values(values: np.ndarray, what: str) -> None:
    """Refuse values that are not raw counts.

    Parameters
    ----------
    values
        Entries of a matrix.
    what
        Name of the matrix in messages.

    Raises
    ------
    ValueError
        If there are NaN, negative, fractional or too large values; the message says whether they look log-normalised.
    """
    if not np.isfinite(values).all():
        raise ValueError(
            f"{what} holds {np.sum(~np.isfinite(values)):,} values that are NaN or infinite; expected raw counts"
        )
    if values.size and values.min() < 0:
        raise ValueError(
            f"{what} holds negative values (lowest {values.min():g}): scaled or corrected data; expected raw counts"
        )
    fractional = np.sum(values != np.rint(values))
    if fractional:
        kind = "looks log-normalised" if values.max() < 25 else "looks normalised or corrected"
        raise ValueError(
            f"{what} {kind}: {fractional / np.count_nonzero(values):.0%} of its non-zero values are fractions "
            f"(largest {values.max():g}); expected raw counts, as before scanpy's normalize_total and log1p"
        )
    if values.size and values.max() >= 2**24:
        raise ValueError(
            f"{what} holds counts up to {values.max():,.0f}; expected less than 16,777,216 of a gene in a cell"
        )


def clean(counts: sp.csr_matrix) -> sp.csr_matrix:
    """The same counts with explicit zeros removed, duplicate entries summed and indices sorted."""
    counts.sum_duplicates()
    counts.eliminate_zeros()
    return counts


def sum_duplicate_genes(gene_names: pd.Index) -> tuple[sp.csr_matrix | None, pd.Index]:
    """A matrix that sums the columns of the same gene name, and the names in the order of first appearance, with a message.

    The matrix is None if all names differ.
    """
    if gene_names.is_unique:
        return None, gene_names
    codes, unique = pd.factorize(gene_names)
    merge = sp.csr_matrix(
        (np.ones(len(codes), np.float32), (np.arange(len(codes)), codes)), shape=(len(codes), len(unique))
    )
    repeated = gene_names[gene_names.duplicated()].unique()
    print(
        f"{len(repeated):,} duplicate gene names (such as {', '.join(map(str, repeated[:3]))}): their counts are summed"
    )
    return merge, pd.Index(unique)


def count_known_genes(names: pd.Index) -> int:
    """Number of names that are `COMMON_GENES` or Ensembl gene IDs."""
    upper = pd.Index(names).astype(str).str.upper()
    return int(upper.isin(COMMON_GENES).sum() + upper.str.match(r"ENS[A-Z]*G\d{6,}").sum())


def check_orientation(barcodes: pd.Index, gene_names: pd.Index, what: str) -> None:
    """Refuse a table of genes x cells.

    Raises
    ------
    ValueError
        If more row names than column names are gene names.
    """
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


def write_counts(adata: ad.AnnData, path: Path) -> None:
    """Write a count file from memory."""
    write_h5ad(adata, path)


def read_counts(path: Path, stage: str) -> ad.AnnData:
    """Open a count file of an earlier stage; `X` stays on disk and is read in blocks of rows.

    Raises
    ------
    FileNotFoundError
        If the stage was not run.
    ValueError
        If another program wrote the file, or if data/counts.h5ad has changed since.
    """
    adata = read_h5ad(require(path, stage), backed="r")
    if "dataset" not in adata.uns or not isinstance(adata.X, CSRDataset):
        raise ValueError(f"{path} was not written by {stage}: it lacks uns['dataset'] or sparse counts; run {stage}")
    source = path.parent / "counts.h5ad"
    if path.name not in ("train.h5ad", "test.h5ad"):
        return adata
    labels = adata.obs.get("cell_type")
    if (
        "split_id" not in adata.uns
        or labels is None
        or not isinstance(labels.dtype, pd.CategoricalDtype)
        or labels.isna().all()
    ):
        raise ValueError(
            f"{path} was not written by {stage}: it lacks uns['split_id'] or categories in obs['cell_type']; run {stage} again"
        )
    if source.exists() and (current := read_uns(source, "counts_id")) != adata.uns.get("counts_id"):
        raise ValueError(
            f"{path} is stale: it was made from other counts of {adata.uns['dataset']} than {source} holds now "
            f"({read_uns(source, 'dataset')}, counts {current}; expected counts {adata.uns.get('counts_id')}); "
            "run _1_split_train_test.py again"
        )
    return adata


def write_blocks(cells: ad.AnnData, blocks: Iterable[sp.csr_matrix], path: Path) -> None:
    """Write a count file block by block of rows; `cells` holds everything but `X`.

    `obs`, `var` and `uns` are written last: the caller may fill them with each block.
    """
    with replacing(path) as temporary, new_hdf5(temporary) as (file, disk):
        ad.io.write_elem(file, "/", ad.AnnData())
        ad.io.write_elem(file, "X", sp.csr_matrix((0, cells.n_vars), dtype=np.float32), dataset_kwargs=STORED)
        X = ad.io.sparse_dataset(file["X"])
        with tqdm(total=cells.n_obs, desc=path.name, unit=" cells", delay=5, leave=False) as progress:
            for block in blocks:
                X.append(block)
                disk.check()
                progress.update(block.shape[0])
        assert X.shape == cells.shape
        describe(cells)
        for name, part in (("obs", cells.obs), ("var", cells.var), ("uns", dict(cells.uns))):
            ad.io.write_elem(file, name, part)


def n_entries(counts: sp.csr_matrix | CSRDataset) -> int:
    """Number of counts above zero."""
    return counts.nnz if sp.issparse(counts) else counts.group["data"].shape[0]


def select_cells(adata: ad.AnnData, rows: np.ndarray) -> ad.AnnData:
    """Read some cells of a count file into memory; `rows` ascending."""
    counts = sp.vstack([block for block, _ in selected_blocks(adata.X, rows)], format="csr")
    return ad.AnnData(counts, obs=adata.obs.iloc[rows].copy(), var=adata.var.copy(), uns=dict(adata.uns))


def read_uns(path: Path, key: str) -> str | None:
    """Read one text of `uns`, and nothing else of the file; None if it is missing."""
    with reading(path, "a file of counts"), h5py.File(path) as file:
        value = file["uns"].get(key)
        return None if value is None else value.asstr()[()]


def read_split(data_folder: Path) -> tuple[ad.AnnData, ad.AnnData]:
    """Open the train cells and the test cells.

    Raises
    ------
    ValueError
        If they come from two different splits.
    """
    train = read_counts(data_folder / "train.h5ad", "_1_split_train_test.py")
    test = read_counts(data_folder / "test.h5ad", "_1_split_train_test.py")
    check_same_split(
        test.uns["split_id"],
        data_folder / "test.h5ad",
        train.uns["split_id"],
        data_folder / "train.h5ad",
        "_1_split_train_test.py",
    )
    return train, test


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
    for block_rows, block in row_blocks(counts):
        places = slice(*np.searchsorted(rows, [block_rows.start, block_rows.stop]))
        yield block[rows[places] - block_rows.start], places


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


def log_normalize(counts: sp.csr_matrix, target: float) -> sp.csr_matrix:
    """log(1 + count x target / library size) per cell, sparse; `target` in counts per cell."""
    library_size = np.asarray(counts.sum(axis=1)).ravel()
    scaled = sp.diags_array(target / np.maximum(library_size, 1)).dot(counts)
    return sp.csr_matrix(scaled.log1p(), dtype=np.float32)


def write_mtx(cells: ad.AnnData, path: Path) -> Path:
    """Write counts in the form of the paper's code to the folder `path`, which is returned.

    counts.mtx: genes x cells; genes.csv and clusters.csv: a row for each of its rows and columns. `partition` numbers the types from
    0, in the order of the categories, as in the paper's cluster files; cell_type names them.
    """
    path.mkdir(exist_ok=True)
    with replacing(path / "counts.mtx") as temporary:
        scipy.io.mmwrite(temporary, cells.X.T.astype(np.int64))
    with replacing(path / "genes.csv") as temporary:
        pd.Series(cells.var_names, name="gene").to_csv(temporary, index=False)
    clusters = cells.obs[["cell_type", "sample"]].copy()
    clusters.insert(0, "partition", cells.obs["cell_type"].cat.codes)
    with replacing(path / "clusters.csv") as temporary:
        clusters.to_csv(temporary, index_label="barcode")
    return path
