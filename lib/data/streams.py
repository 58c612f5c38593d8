"""Counts of a source, read once in blocks of cells, so that memory does not grow with the number of cells."""

import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp

from lib.data.counts import BLOCK_CELLS, check_values, clean, row_blocks, sum_duplicate_genes
from lib.data.hdf5 import ENTRIES_AT_ONCE, check_indices
from lib.files import writing

PART_ENTRIES = 1 << 23  # counts above zero that are sorted by cell at a time: 300 MB
MAX_PARTS = 200  # files on disk, of counts that are sorted; above 1.7e9 counts the parts are larger
ENTRY = np.dtype([("cell", np.int32), ("gene", np.int32), ("value", np.float32)])


class Entries(NamedTuple):
    """Some counts above zero, in any order."""

    cells: np.ndarray
    genes: np.ndarray
    values: np.ndarray


@dataclass
class CellStream:
    """Cells of a source: their names and annotations, and their counts as blocks that can be read once."""

    obs: pd.DataFrame  # one row per cell, by barcode
    gene_names: pd.Index
    blocks: Iterable[sp.csr_matrix]  # cells x genes, in the order of obs
    name: str  # of the counts, in messages

    @classmethod
    def of(cls, adata: ad.AnnData, name: str) -> "CellStream":
        """Cells that are in memory."""
        counts = sp.csr_matrix(adata.X)
        return cls(adata.obs, adata.var_names, (block for _, block in row_blocks(counts)), name)

    def select_genes(self, mask: np.ndarray) -> "CellStream":
        """The same cells with some of their genes."""
        return CellStream(self.obs, self.gene_names[mask], (block[:, mask] for block in self.blocks), self.name)

    def in_memory(self) -> ad.AnnData:
        """Read all counts."""
        counts = sp.vstack(list(self.blocks), format="csr")
        return ad.AnnData(counts, obs=self.obs, var=pd.DataFrame(index=self.gene_names))

    def tidy(self) -> "CellStream":
        """Check the counts while they are read (`check_values`) and make gene names and barcodes unique.

        Raises
        ------
        ValueError
            If there are no cells or no genes; while the blocks are read: for values that are not counts, and for zeros only.
        """
        if not len(self.obs) or not len(self.gene_names):
            raise ValueError(
                f"{self.name} is empty: got {len(self.obs)} cells x {len(self.gene_names)} genes, expected at least one of each"
            )
        obs = self.obs.copy()
        obs.index = obs.index.astype(str)
        if not obs.index.is_unique:
            repeated = obs.index[obs.index.duplicated()].unique()
            print(
                f"{len(repeated):,} duplicate barcodes (such as {repeated[0]}): -1, -2, ... is added to the second, third, ... cell"
            )
            obs.index = ad.utils.make_index_unique(obs.index)
        merge, gene_names = sum_duplicate_genes(pd.Index(self.gene_names.astype(str)))
        return CellStream(obs, gene_names, self._checked(merge), self.name)

    def _checked(self, merge: sp.csr_matrix | None) -> Iterator[sp.csr_matrix]:
        """The blocks as float32 CSR of counts, with duplicate genes summed."""
        start, any_count = 0, False
        for block in self.blocks:
            stop = start + block.shape[0]
            counts = sp.csr_matrix(block, dtype=np.float32)
            check_values(counts.data, f"{self.name}, cells {start + 1:,} to {stop:,},")
            counts = clean(counts)
            any_count |= counts.nnz > 0
            yield counts if merge is None else clean(counts @ merge)
            start = stop
        assert start == len(self.obs), "a reader gave another number of cells"
        if not any_count:
            raise ValueError(f"{self.name} holds zeros only; expected raw counts")


def blocks_of_rows(matrix: Any, shape: tuple[int, int], path: Path) -> Iterator[sp.csr_matrix]:
    """Read a matrix of cells x genes on disk: dense, or a group with data, indices and indptr of its rows.

    Raises
    ------
    Unusable
        If a column index is outside of the matrix.
    """
    if hasattr(matrix, "shape"):
        rows = max(1, min(BLOCK_CELLS, ENTRIES_AT_ONCE // max(1, shape[1])))
        for start in range(0, shape[0], rows):
            yield sp.csr_matrix(matrix[start : start + rows])
        return
    data, indices, indptr = matrix["data"], matrix["indices"], matrix["indptr"][()]
    for start in range(0, shape[0], BLOCK_CELLS):
        pointers = indptr[start : start + BLOCK_CELLS + 1].astype(np.int64)
        entries = slice(pointers[0], pointers[-1])
        columns = indices[entries]
        check_indices(columns, shape[1], matrix.name, path)
        yield sp.csr_matrix((data[entries], columns, pointers - pointers[0]), shape=(len(pointers) - 1, shape[1]))


def entries_of_columns(matrix: Any, shape: tuple[int, int], path: Path) -> Iterator[Entries]:
    """Read a matrix of cells x genes whose data, indices and indptr on disk are those of its columns."""
    data, indices, indptr = matrix["data"], matrix["indices"], matrix["indptr"][()].astype(np.int64)
    for start in range(0, indptr[-1], ENTRIES_AT_ONCE):
        stop = min(start + ENTRIES_AT_ONCE, indptr[-1])
        cells = indices[start:stop]
        check_indices(cells, shape[0], matrix.name, path)
        genes = np.searchsorted(indptr, np.arange(start, stop), side="right") - 1
        yield Entries(cells, genes, data[start:stop])


def sorted_by_cell(
    entries: Iterable[Entries], shape: tuple[int, int], n_entries: int, scratch: Path | None
) -> Iterator[sp.csr_matrix]:
    """Blocks of cells from entries in any order. More than `PART_ENTRIES` entries are sorted on disk.

    Parameters
    ----------
    n_entries
        How many there are, as far as the source says; it decides into how many parts they are sorted.
    scratch
        Folder for files without a name, 12 bytes per entry; None: that of the system.
    """
    n_parts = min(MAX_PARTS, -(-n_entries // PART_ENTRIES), shape[0])
    if n_parts <= 1:
        yield from _csr_blocks(list(entries), 0, shape)
        return
    width = -(-shape[0] // n_parts)
    files = [tempfile.TemporaryFile(dir=scratch) for _ in range(0, shape[0], width)]  # noqa: SIM115  (closed below)
    try:
        with writing(scratch or Path(tempfile.gettempdir())):
            for some in entries:
                parts = some.cells // width
                for part in np.unique(parts):
                    in_part = parts == part
                    packed = np.empty(in_part.sum(), ENTRY)
                    for field, values in zip(ENTRY.names or (), some):
                        packed[field] = values[in_part]
                    packed.tofile(files[part])
            for file in files:
                file.flush()
        for part, file in enumerate(files):
            file.seek(0)
            packed, first = np.fromfile(file, ENTRY), part * width
            n_cells = min(width, shape[0] - first)
            yield from _csr_blocks(
                [Entries(*(packed[field] for field in ENTRY.names or ()))], first, (n_cells, shape[1])
            )
    finally:
        for file in files:
            file.close()


def _csr_blocks(entries: list[Entries], first: int, shape: tuple[int, int]) -> Iterator[sp.csr_matrix]:
    """Blocks of the cells `first` to `first` + shape[0] - 1 from all of their entries; entries of one cell and gene are summed."""
    cells, genes, values = (np.concatenate(parts) for parts in zip(*entries)) if entries else ([], [], [])
    counts = sp.coo_matrix((values, (np.asarray(cells, np.int64) - first, genes)), shape=shape).tocsr()
    for _, block in row_blocks(counts):
        yield block
