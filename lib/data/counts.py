"""The data contract between the stages: AnnData, cells x genes, raw counts in X as float32 CSR, types in obs["cell_type"].

Every file carries, in `uns`, the name of its data set and a fingerprint of what it holds, and every model that of the
cells it was trained on: so two files that do not belong together are refused (`check_same_split`).
"""

import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import scipy.sparse as sp
from anndata.abc import CSRDataset

from lib.files import replacing, require

BLOCK_CELLS = 2048  # cells in memory at a time: 10-30 MB of counts

# Genes that nearly every human or mouse table holds; they tell the gene axis from the cell axis.
COMMON_GENES = frozenset(
    "ACTB ACTG1 B2M CALM1 CD74 EEF1A1 EEF2 FAU FTH1 FTL GAPDH HSP90AB1 HSPA8 LDHA MALAT1 NEAT1 PABPC1 PTMA TMSB10 TMSB4X "
    "TPT1 TUBA1B UBA52 UBB UBC VIM".split()
)


def to_counts(matrix, what: str) -> sp.csr_matrix:
    """A count matrix as float32 CSR, with explicit zeros removed and indices sorted.

    Parameters
    ----------
    matrix
        Cells x genes, dense or sparse.
    what
        Name of the matrix in messages.

    Raises
    ------
    ValueError
        If it is empty or holds NaN, negative or fractional values (log-normalised data are named as such).
    """
    if 0 in matrix.shape:
        raise ValueError(
            f"{what} is empty: got {matrix.shape[0]} cells x {matrix.shape[1]} genes, expected at least one of each"
        )
    counts = sp.csr_matrix(matrix, dtype=np.float32, copy=False)
    values = counts.data
    if not np.isfinite(values).all():
        raise ValueError(
            f"{what} holds {np.sum(~np.isfinite(values)):,} values that are NaN or infinite; expected raw counts"
        )
    if values.size and values.min() < 0:
        raise ValueError(
            f"{what} holds negative values (lowest {values.min():g}): scaled or corrected data; expected raw counts"
        )
    fractional = np.mean(values != np.rint(values)) if values.size else 0
    if fractional:
        kind = "looks log-normalised" if values.max() < 25 else "looks normalised or corrected"
        raise ValueError(
            f"{what} {kind}: {fractional:.0%} of its non-zero values are fractions (largest {values.max():g}); "
            "expected raw counts, as they are before scanpy's normalize_total and log1p"
        )
    if values.size and values.max() >= 2**24:
        raise ValueError(
            f"{what} holds counts up to {values.max():,.0f}; expected below 16,777,216 for a gene in a cell"
        )
    if not values.any():
        raise ValueError(f"{what} holds zeros only; expected raw counts")
    counts.eliminate_zeros()
    counts.sort_indices()
    return counts


def sum_duplicate_genes(counts: sp.csr_matrix, gene_names: pd.Index) -> tuple[sp.csr_matrix, pd.Index]:
    """Columns of one gene name summed into one, in the order of first appearance; says so."""
    if gene_names.is_unique:
        return counts, gene_names
    codes, unique = pd.factorize(gene_names)
    merge = sp.csr_matrix(
        (np.ones(len(codes), np.float32), (np.arange(len(codes)), codes)), shape=(len(codes), len(unique))
    )
    repeated = gene_names[gene_names.duplicated()].unique()
    print(
        f"{len(repeated):,} gene names stand more than once (such as {', '.join(map(str, repeated[:3]))}): their counts were summed"
    )
    return (counts @ merge).tocsr(), pd.Index(unique)


def gene_share(names: pd.Index) -> float:
    """How many of the names are well-known genes or Ensembl gene IDs, as a score that only compares two axes."""
    upper = pd.Index(names).astype(str).str.upper()
    return upper.isin(COMMON_GENES).sum() + upper.str.match(r"ENS[A-Z]*G\d{6,}").sum()


def check_orientation(adata: ad.AnnData, what: str) -> None:
    """
    Raises
    ------
    ValueError
        If the rows carry gene names and the columns do not.
    """
    if gene_share(adata.obs_names) > gene_share(adata.var_names):
        raise ValueError(
            f"{what} looks transposed: its rows carry gene names ({', '.join(adata.obs_names[:3])}), its columns do not "
            f"({', '.join(adata.var_names[:3])}); expected cells in rows and genes in columns: save its transpose (adata.T)"
        )


def fingerprint(adata: ad.AnnData) -> str:
    """Twelve hexadecimal digits that change with any count, barcode, gene name or cell type."""
    cell_types = adata.obs["cell_type"].astype(str) if "cell_type" in adata.obs else []
    return digest([*adata.obs_names, *adata.var_names, *cell_types], adata.X.data, adata.X.indices, adata.X.indptr)


def digest(names: list[str], *arrays: np.ndarray) -> str:
    """Twelve hexadecimal digits that change with any of these."""
    sha = hashlib.sha256("\n".join(names).encode())
    for array in arrays:
        sha.update(np.ascontiguousarray(array))
    return sha.hexdigest()[:12]


def write_counts(adata: ad.AnnData, path: Path) -> None:
    with replacing(path) as temporary:
        adata.write_h5ad(temporary)


def read_counts(path: Path, stage: str) -> ad.AnnData:
    """A count file that an earlier stage wrote; `X` stays on disk, to be read some rows at a time.

    Raises
    ------
    FileNotFoundError
        If the stage was not run.
    ValueError
        If the file was put there by something else.
    """
    adata = ad.read_h5ad(require(path, stage), backed="r")
    if "dataset" not in adata.uns or not isinstance(adata.X, CSRDataset):
        raise ValueError(f"{path} was not written by {stage}: it lacks uns['dataset'] or sparse counts; run {stage}")
    source = path.parent / "counts.h5ad"
    if path != source and source.exists() and (current := read_uns(source, "counts_id")) != adata.uns.get("counts_id"):
        raise ValueError(
            f"{path} is stale: it was made of other counts of {adata.uns['dataset']} than {source} holds now "
            f"({read_uns(source, 'dataset')}, counts {current}; expected counts {adata.uns.get('counts_id')}); run _1_split_train_test.py again"
        )
    return adata


def write_blocks(cells: ad.AnnData, blocks: Iterable[sp.csr_matrix], path: Path) -> None:
    """A count file whose counts are written some rows at a time; `cells` holds all the rest, and no `X`."""
    with replacing(path) as temporary:
        cells.write_h5ad(temporary)
        with h5py.File(temporary, "a") as file:
            file.pop("X", None)
            ad.io.write_elem(file, "X", sp.csr_matrix((0, cells.n_vars), dtype=np.float32))
            X = ad.io.sparse_dataset(file["X"])
            for block in blocks:
                X.append(block)
            assert X.shape == cells.shape
            ad.io.write_elem(file, "obs", cells.obs)  # again: the blocks may have filled a column


def n_entries(counts: sp.csr_matrix | CSRDataset) -> int:
    """How many counts above zero there are."""
    return counts.nnz if sp.issparse(counts) else counts.group["data"].shape[0]


def select_cells(adata: ad.AnnData, rows: np.ndarray) -> ad.AnnData:
    """Some cells of a count file, in memory. rows: ascending."""
    counts = sp.vstack([block for block, _ in selected_blocks(adata.X, rows)], format="csr")
    return ad.AnnData(counts, obs=adata.obs.iloc[rows].copy(), var=adata.var.copy(), uns=dict(adata.uns))


def read_uns(path: Path, key: str) -> str | None:
    """One text of `uns`, without reading the counts."""
    with h5py.File(path) as file:
        value = file["uns"].get(key)
        return None if value is None else value.asstr()[()]


def read_split(data_folder: Path) -> tuple[ad.AnnData, ad.AnnData]:
    """The train and the test cells; refused if they come from two different splits."""
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


def check_same_split(split_id: str, what: object, expected_id: str, expected_by: object, remedy: str) -> None:
    """
    Raises
    ------
    ValueError
        If two files come from two data sets, or from two splits of one.
    """
    if split_id != expected_id:
        raise ValueError(
            f"{what} does not belong to {expected_by}: it comes from split {split_id}, expected split {expected_id} "
            f"(the data or their split have changed since); run {remedy} again"
        )


def check_same_names(
    got: list[str], got_by: object, expected: list[str], expected_by: object, kind: str, remedy: str
) -> None:
    """
    Raises
    ------
    ValueError
        If two files disagree about the genes or the cell types (`kind`), naming both sides.
    """
    if list(got) == list(expected):
        return
    only_got = [name for name in got if name not in set(expected)]
    only_expected = [name for name in expected if name not in set(got)]
    difference = "the same names in another order"
    if only_got or only_expected:
        difference = f"only there: {_some(only_got)}; missing there: {_some(only_expected)}"
    raise ValueError(
        f"{got_by} has {len(got):,} {kind}, {expected_by} has {len(expected):,}, and they differ ({difference}); run {remedy}"
    )


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3:,} more" if len(names) > 3 else "") if names else "none"


def row_blocks(counts: sp.csr_matrix | CSRDataset, size: int = BLOCK_CELLS) -> Iterator[tuple[slice, sp.csr_matrix]]:
    """All rows of a matrix in memory or on disk, some at a time."""
    for start in range(0, counts.shape[0], size):
        rows = slice(start, min(start + size, counts.shape[0]))
        yield rows, counts[rows]


def selected_blocks(counts: sp.csr_matrix | CSRDataset, rows: np.ndarray) -> Iterator[tuple[sp.csr_matrix, slice]]:
    """Some rows (ascending), those of a block at a time, and their places among all that are chosen."""
    for block_rows, block in row_blocks(counts):
        places = slice(*np.searchsorted(rows, [block_rows.start, block_rows.stop]))
        yield block[rows[places] - block_rows.start], places


def select_per_type(cell_type_idx: np.ndarray, fraction: float, rng: np.random.Generator) -> np.ndarray:
    """Mask of cells drawn at random: this fraction of each type, at least one cell; none of unknown type (-1)."""
    drawn = np.zeros(len(cell_type_idx), dtype=bool)
    for k in range(cell_type_idx.max() + 1):
        cells = rng.permutation(np.flatnonzero(cell_type_idx == k))
        drawn[cells[: max(1, round(fraction * len(cells)))]] = True
    return drawn


def log_normalize(counts: sp.csr_matrix, target: float) -> sp.csr_matrix:
    """log(1 + count x target / library size) per cell, sparse; `target` in counts per cell."""
    library_size = np.asarray(counts.sum(axis=1)).ravel()
    scaled = sp.diags_array(target / np.maximum(library_size, 1)).dot(counts)
    return sp.csr_matrix(scaled.log1p(), dtype=np.float32)
