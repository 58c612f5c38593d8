"""Read raw counts of many formats as streams of cells, and tables of gene lengths.

The counts of an .h5ad file that are sparse by cells are read in blocks of cells; every other format is read as a whole.
"""

import contextlib
import csv
import multiprocessing
import re
import signal
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import scanpy as sc
import scipy.io
import scipy.sparse as sp
from anndata.abc import CSCDataset, CSRDataset

from lib.data.counts import (
    BLOCK_CELLS,
    check_orientation,
    check_values,
    clean,
    count_known_genes,
    row_blocks,
    sum_duplicate_genes,
)
from lib.data.labels import BARCODE_COLUMNS, read_labels, take_labels
from lib.data.tables import EXPECTED, open_text, read_rows, read_table, separator
from lib.run import reading

CSV_BLOCK_ROWS = 500  # of a csv in memory at a time: 18,000 genes x 10,000 cells are 1.5 GB when dense, a block 0.04 GB
TABLE_SUFFIXES = (".csv", ".csv.gz", ".tsv", ".tsv.gz", ".txt", ".txt.gz")
CHECK_S = 60  # seconds that the check of an HDF5 file may take
SMALL = 1 << 20  # values of an HDF5 array that the check reads


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
        counts.check_format(full_check=True)
        return cls(adata.obs, adata.var_names, (block for _, block in row_blocks(counts)), name)

    def in_memory(self) -> ad.AnnData:
        """Read all counts."""
        counts = sp.vstack(list(self.blocks), format="csr")
        return ad.AnnData(counts, obs=self.obs, var=pd.DataFrame(index=self.gene_names))

    def tidy(self) -> "CellStream":
        """The same cells with unique barcodes and genes; ValueError if there are none.

        The counts are checked when the blocks are read: ValueError for values that are not counts, and for zeros only.
        """
        obs, n_genes = self.obs.set_axis(self.obs.index.astype(str)), len(self.gene_names)
        if not len(obs) or not n_genes:
            raise ValueError(
                f"{self.name} is empty: got {len(obs)} cells x {n_genes} genes, expected at least one of each"
            )
        repeated = obs.index[obs.index.duplicated()].unique()
        if len(repeated):
            print(
                f"{len(repeated):,} duplicate barcodes (such as {repeated[0]}): -1, -2, ... is added to all but the first"
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
        if start != len(self.obs):
            raise ValueError(f"{self.name} is damaged: it has counts of {start:,} cells, expected {len(self.obs):,}")
        if not any_count:
            raise ValueError(f"{self.name} holds zeros only; expected raw counts")


def open_dataset(path: Path, orientation: str = "auto", cell_type_key: str | None = None) -> CellStream:
    """Open raw counts: `.h5ad`, `.zarr`, 10x `.h5`, an `.mtx(.gz)` or a folder with one, or a table (csv, tsv), as the name says.

    Parameters
    ----------
    orientation
        Of a table: "genes_in_rows", "cells_in_rows", or "auto" to recognise it by common gene names.
    cell_type_key
        Column with the cell types, in `obs` or in the file of labels beside an `.mtx`; None takes a column named like cell_type.

    Raises
    ------
    ValueError
        For other formats, damaged files, and values that are not counts, some of them only when the blocks are read.
    """
    name = path.name.lower()
    if name.endswith((".mtx", ".mtx.gz")) or (path.is_dir() and not name.endswith(".zarr")):
        cells = open_mtx(path, cell_type_key)
    else:
        if name.endswith((".h5ad", ".zarr")):
            cells = open_anndata(path)
        elif name.endswith(".h5"):
            cells = open_10x(path)
        elif name.endswith(TABLE_SUFFIXES):
            cells = CellStream.of(read_count_table(path, orientation), str(path))
        else:
            raise ValueError(
                f"{path} has an unknown format; expected .h5ad, 10x .h5, .zarr, a 10x or MTX folder, "
                f"or one of {', '.join(TABLE_SUFFIXES)}"
            )
        cells.obs = take_labels(cells.obs, cell_type_key)
    check_orientation(cells.obs.index, cells.gene_names, str(path))
    return cells.tidy()


def open_anndata(path: Path) -> CellStream:
    """Open the first of `layers["counts"]`, `raw.X` and `X` whose first cells hold counts, in an .h5ad file or a .zarr folder."""
    refused = []
    with reading(path, "an AnnData in h5ad or zarr format"):
        for where, stored, obs, gene_names in _matrices(path):
            name, expected = f"{where} of {path}", (len(obs), len(gene_names))
            if stored.shape != expected:
                raise ValueError(
                    f"{name} is damaged: it has the shape {stored.shape}, expected {expected}: save it again"
                )
            counts = _by_cell(stored)
            first = next(_blocks(counts, path), sp.csr_matrix(expected))
            try:
                check_values(first.data.astype(np.float32), name)
            except ValueError as error:
                refused.append(str(error))
                continue
            if where != "X":
                print(f"counts are taken from {where}")
            return CellStream(obs, gene_names, _blocks(counts, path), name)
    raise ValueError(
        "; ".join(refused) or f"{path} holds no matrix; expected raw counts in X, raw.X or layers['counts']"
    )


def _matrices(path: Path) -> Iterator[tuple[str, Any, pd.DataFrame, pd.Index]]:
    """Where each matrix of an AnnData is, the matrix (that of an .h5ad file is not read yet), its cells and its genes."""
    if path.suffix.lower() == ".zarr":
        adata = ad.read_zarr(path)
    else:
        check_foreign(path, ("obs", "var"), indices=False)
        file = h5py.File(path)
        if isinstance(file["obs"], h5py.Group):
            obs = ad.io.read_elem(file["obs"])
            places = {"layers['counts']": ("layers/counts", "var"), "raw.X": ("raw/X", "raw/var"), "X": ("X", "var")}
            for where, (key, var) in places.items():
                if key in file:
                    stored = ad.io.sparse_dataset(file[key]) if isinstance(file[key], h5py.Group) else file[key]
                    yield where, stored, obs, ad.io.read_elem(file[var]).index
            return
        adata = ad.read_h5ad(path)  # written by anndata before 0.7
    if "counts" in adata.layers:
        yield "layers['counts']", adata.layers["counts"], adata.obs, adata.var_names
    if adata.raw is not None:
        yield "raw.X", adata.raw.X, adata.obs, adata.raw.var_names
    if adata.X is not None:
        yield "X", adata.X, adata.obs, adata.var_names


def _by_cell(stored: Any) -> sp.csr_matrix | CSRDataset:
    """A valid CSR matrix: on disk if it is stored like that in an .h5ad file, otherwise in memory."""
    if isinstance(stored, CSRDataset):
        return stored
    if isinstance(stored, h5py.Dataset):
        starts = range(0, max(1, len(stored)), BLOCK_CELLS)
        return sp.vstack([sp.csr_matrix(stored[start : start + BLOCK_CELLS]) for start in starts], format="csr")
    matrix = stored.to_memory() if isinstance(stored, CSCDataset) else stored
    if sp.issparse(matrix):
        matrix.check_format(full_check=True)
    return sp.csr_matrix(matrix)


def _blocks(counts: sp.csr_matrix | CSRDataset, path: Path) -> Iterator[sp.csr_matrix]:
    """Blocks of cells, after a check of their indices."""
    with reading(path, "valid sparse counts"):
        for _, block in row_blocks(counts):
            block.check_format(full_check=True)
            yield block


def check_foreign(path: Path, needs: tuple[str, ...] = (), indices: bool = True) -> None:
    """Read the structure of a user's HDF5 file in a process of its own, because damage can make HDF5 crash or loop without end.

    ValueError if it does, if the file lacks one of `needs`, or if (`indices`) one of its sparse matrices is not valid.
    """
    if "fork" in multiprocessing.get_all_start_methods():
        child = multiprocessing.get_context("fork").Process(target=_read_structure, args=(path,), daemon=True)
        child.start()
        try:
            child.join(CHECK_S)
            status = child.exitcode
        finally:
            child.kill()
            child.join()
        if status != 0:
            problem = f"does not finish reading it in {CHECK_S} s" if status is None else "crashes when it reads it"
            raise ValueError(f"{path} is damaged: HDF5 {problem}: save or download it again")
    with reading(path, "an HDF5 file"), h5py.File(path) as file:
        missing = [name for name in needs if name not in file]
        if missing:
            raise ValueError(f"{path} lacks {' and '.join(missing)}: save it again with AnnData.write_h5ad")
        items: list[h5py.Group | h5py.Dataset] = []
        file.visititems(lambda _, item: items.append(item))  # returns None, so that the visit goes on
        for item in items:
            if isinstance(item, h5py.Group) and "indptr" in item:
                if (item["indptr"][0], item["indptr"][-1]) != (0, len(item["data"])):  # scipy would leave values out
                    raise ValueError(
                        f"{path} is damaged: the index pointers of {item.name} do not fit: download it again"
                    )
                if indices:
                    ad.io.sparse_dataset(item).to_memory().check_format(full_check=True)


def _read_structure(path: Path) -> None:
    """Read all attributes, all small arrays, and the chunk index of the others. Errors are met again when the file is used."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    names: list[str] = []
    with contextlib.suppress(Exception), h5py.File(path) as file:
        file.visit(names.append)  # returns None, so that the visit goes on
        for name in names:
            with contextlib.suppress(Exception):
                item = file[name]
                dict(item.attrs)
                if isinstance(item, h5py.Dataset) and item.shape:
                    item[()] if item.size < SMALL or item.dtype.kind == "O" else item[:1]
                    item.id.get_num_chunks()


def open_10x(path: Path) -> CellStream:
    """Open a 10x .h5 file of Cell Ranger 2 or 3: genes only, no antibodies."""
    check_foreign(path, indices=False)
    with reading(path, "a 10x .h5 file of Cell Ranger"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Variable names are not unique")  # `tidy` sums them
        adata = sc.read_10x_h5(path, gex_only=False)  # which would select the genes of a damaged matrix
        adata.X.check_format(full_check=True)
        if "feature_types" in adata.var:
            adata = adata[:, (adata.var["feature_types"] == "Gene Expression").to_numpy()]
    return CellStream.of(ad.AnnData(adata.X, obs=adata.obs[[]], var=adata.var[[]]), str(path))


def open_mtx(path: Path, cell_type_key: str | None = None) -> CellStream:
    """Open an MTX table of genes x cells, or a folder with one; files beside it with such names list genes, barcodes, cell types.

    These are the files of Cell Ranger 2 and 3, and of the paper's code; ValueError if one is missing or does not fit the table.
    """
    files = sorted(f for f in (path if path.is_dir() else path.parent).iterdir() if f.is_file() and f.name[0] != ".")
    tables = [f for f in files if f.name.lower().endswith((".mtx", ".mtx.gz"))] if path.is_dir() else [path]
    if len(tables) != 1:
        raise ValueError(
            f"{path} holds {len(tables)} .mtx files ({', '.join(f.name for f in tables)}), expected one; set DATASET to the file itself"
        )
    with reading(tables[0], "a complete MatrixMarket file"):
        n_genes, n_cells = scipy.io.mminfo(tables[0])[:2]

    def named(pattern: str) -> list[Path]:
        return [f for f in files if re.search(pattern, f.name.lower()) and ".mtx" not in f.name.lower()]

    label_files = named("cluster|cell.?type|label|annot|partition")
    files = [f for f in files if f not in label_files]
    genes = _read_list(named("gene|feature"), n_genes, "gene names, one for each row", tables[0])
    barcode_files = named("barcode|cell")
    barcodes = [f"cell_{i + 1}" for i in range(n_cells)]
    if barcode_files:
        barcodes = list(_read_list(barcode_files, n_cells, "barcodes, one for each column", tables[0])[0])
    elif len(label_files) == 1:
        labels = read_table(label_files[0])
        if len(labels) != n_cells:
            raise ValueError(f"{label_files[0]} has {len(labels):,} rows, expected one for each of {n_cells:,} cells")
        columns = [c for c in labels if c.lower() in BARCODE_COLUMNS and labels[c].is_unique]
        barcodes = list(labels[columns[0]]) if columns else barcodes
    if len(label_files) == 1:
        obs = read_labels(label_files[0], pd.Index(barcodes), cell_type_key)
    else:
        unused = f"{len(label_files)} files beside {tables[0].name} look like labels, expected one: set LABELS_FILE"
        if cell_type_key is not None:
            raise ValueError(f"CELL_TYPE_KEY is {cell_type_key!r}, but {unused}")
        if label_files:
            print(f"WARNING: {unused}")
        obs = pd.DataFrame(index=barcodes)

    with reading(tables[0], "a complete MatrixMarket file"):
        counts = sp.csr_matrix(scipy.io.mmread(tables[0]).T)
    symbols = genes.iloc[:, min(1, genes.shape[1] - 1)]  # Cell Ranger: gene ID, symbol, type of feature
    adata = ad.AnnData(counts, obs=obs, var=pd.DataFrame(index=symbols.to_numpy()))
    if genes.shape[1] > 2 and (genes[2] == "Gene Expression").any():  # the list may hold antibodies too
        adata = adata[:, (genes[2] == "Gene Expression").to_numpy()]
    return CellStream.of(adata, str(path))


def _read_list(files: list[Path], length: int, what: str, table: Path) -> pd.DataFrame:
    """Read a list of genes or cells, without a header such as that of R's write.csv."""
    if len(files) != 1:
        raise ValueError(f"{table} has {len(files)} files of {what} beside it, expected one (genes.tsv, barcodes.tsv)")
    rows = read_rows(files[0])
    rows = rows[1:] if len(rows) == length + 1 else rows
    if len(rows) != length:
        raise ValueError(
            f"{files[0]} has {len(rows):,} lines, expected {length:,} {what} of {table.name} (genes x cells)"
        )
    return pd.DataFrame(rows, dtype=object)


def read_count_table(path: Path, orientation: str = "auto") -> ad.AnnData:
    """Read a csv or tsv of counts, never all of it dense; ValueError for columns of text, or where genes and cells look alike."""
    blocks, row_names, delimiter = [], [], separator(path)
    with reading(path, EXPECTED), open_text(path) as file:
        header = next(csv.reader(file, delimiter=delimiter), [])  # pandas would rename duplicate columns
        file.seek(0)
        options = dict(sep=delimiter, index_col=0, low_memory=False, keep_default_na=False, na_values=[""])
        for block in pd.read_csv(file, chunksize=CSV_BLOCK_ROWS, **options) if header else []:
            text = block.select_dtypes(exclude="number").columns
            if len(block) and len(text):
                raise ValueError(
                    f"{path} has columns that are not numbers ({', '.join(map(repr, text[:3]))}); "
                    "expected names in the first column and counts in all others"
                )
            blocks.append(sp.csr_matrix(block.to_numpy(dtype=np.float32)))
            row_names += block.index.astype(str).tolist()
    if not row_names:
        raise ValueError(f"{path} is empty: it has no rows; expected a table of counts")
    if any("\n" in name for name in (*header, *row_names)):
        raise ValueError(
            f"{path} has a line break inside a name; expected one row per line: is a quotation mark not closed?"
        )
    matrix, rows = sp.vstack(blocks, format="csr"), pd.Index(row_names)
    columns = pd.Index(header[len(header) - matrix.shape[1] :])
    if orientation == "auto":
        in_rows, in_columns = count_known_genes(rows), count_known_genes(columns)
        if in_rows == in_columns:
            raise ValueError(
                f"{path}: cannot tell genes from cells: {in_rows:,} known gene names in rows, {in_columns:,} in columns (rows: "
                f"{', '.join(rows[:3])}; columns: {', '.join(columns[:3])}); set ORIENTATION to genes_in_rows or cells_in_rows"
            )
        orientation = "genes_in_rows" if in_rows > in_columns else "cells_in_rows"
    if orientation == "genes_in_rows":
        matrix, rows, columns = matrix.T.tocsr(), columns, rows
    return ad.AnnData(matrix, obs=pd.DataFrame(index=rows), var=pd.DataFrame(index=columns))


def read_gene_lengths(path: Path) -> pd.Series:
    """Read gene lengths in base pairs, by gene name.

    Either the original's GeneLength.txt (Gene name, Transcript start, Transcript end: the length is end - start, a genomic span with
    introns) or a table of two columns, gene and length (exonic lengths); ValueError if it is neither. A duplicate gene gets its
    largest length.
    """
    table = read_table(path)
    if table.shape[1] == 2 and re.fullmatch(r"[0-9.]+", str(table.columns[1])):  # no header
        table = pd.DataFrame(read_rows(path), dtype=object)
    sides = ["Transcript start (bp)", "Transcript end (bp)"]
    if {"Gene name", *sides} <= set(table.columns):
        names, numbers = table["Gene name"], table[sides]
    elif table.shape[1] == 2 and len(table):
        names, numbers = table.iloc[:, 0], table.iloc[:, [1]]
    else:
        raise ValueError(
            f"{path} is not a table of gene lengths: it has the columns {', '.join(map(str, table.columns))}; "
            "expected gene and length, or the columns of GeneLength.txt"
        )
    with reading(path, "numbers of base pairs, NA where there is none"):
        numbers = numbers.replace({"": np.nan, "NA": np.nan}).astype(float)
    lengths = numbers.iloc[:, 0] if numbers.shape[1] == 1 else numbers[sides[1]] - numbers[sides[0]]
    lengths = pd.Series(lengths.to_numpy(), index=names.astype(str)).groupby(level=0).max()
    return lengths[(lengths > 0) & np.isfinite(lengths)].rename("gene_length_bp")
