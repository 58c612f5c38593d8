"""MatrixMarket tables with their lists of genes and barcodes, as streams of cells."""

import io
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
import pandas as pd
import scipy.io
import scipy.sparse as sp

from lib.data.hdf5 import ENTRIES_AT_ONCE
from lib.data.labels import BARCODE_COLUMNS, align_labels, read_label_table
from lib.data.streams import CellStream, Entries, sorted_by_cell
from lib.data.tables import open_text, read_rows
from lib.files import check_unpacked, reading

LIST_HEADERS = ("x", "v1", "gene", "genes", "gene_name", "feature", "features", "symbol", "barcode", "barcodes", "cell")


class MtxTable(NamedTuple):
    """A MatrixMarket table whose header is read."""

    path: Path
    open: Callable[[], IO[str]]  # its text, from the beginning
    shape: tuple[int, int]
    n_entries: int
    field: str  # integer, unsigned-integer, real, pattern
    is_list: bool  # of (row, column, value); otherwise dense or symmetric

    @classmethod
    def of(cls, path: Path, open: Callable[[], IO[str]] | None = None) -> "MtxTable":
        """Read the header, and check the size that it declares; `open` opens a table that is inside of the file `path`."""
        with reading(path, "a complete MatrixMarket file"):
            opened = open or partial(open_text, path)
            with opened() as text:
                header = _skip_header(text)
            n_rows, n_columns, n_entries, form, field, symmetry = scipy.io.mminfo(io.BytesIO(header.encode()))
            check_unpacked(path, 8 * (n_rows + n_columns) + 16 * n_entries)
            is_list = form == "coordinate" and symmetry == "general" and field != "complex"
            return cls(path, opened, (n_rows, n_columns), n_entries, field, is_list)

    def cells(self, genes_in_rows: bool, scratch: Path | None) -> Iterator[sp.csr_matrix]:
        """Blocks of cells."""
        shape = self.shape[::-1] if genes_in_rows else self.shape
        if self.is_list:
            yield from sorted_by_cell(self._entries(genes_in_rows), shape, self.n_entries, scratch)
            return
        with reading(self.path, "a complete MatrixMarket file"), self.open() as text:
            matrix = sp.csr_matrix(scipy.io.mmread(io.BytesIO(text.read().encode())))
        yield matrix.T.tocsr() if genes_in_rows else matrix

    def _entries(self, genes_in_rows: bool) -> Iterator[Entries]:
        """Its lines, some at a time."""
        names = ["row", "column", "value"][: 2 if self.field == "pattern" else 3]
        dtypes = {"row": np.int64, "column": np.int64, "value": np.float32 if self.field == "real" else np.int64}
        n_read = 0
        with reading(self.path, "a complete MatrixMarket file"), self.open() as text:
            _skip_header(text)
            if self.n_entries == 0:
                return
            for lines in pd.read_csv(
                text, sep=r"\s+", header=None, names=names, dtype=dtypes, chunksize=ENTRIES_AT_ONCE
            ):
                values = lines["value"].to_numpy(np.float32) if len(names) == 3 else np.ones(len(lines), np.float32)
                rows, columns = (lines[name].to_numpy() - 1 for name in ("row", "column"))
                for side, n in zip((rows, columns), self.shape):
                    if side.min() < 0 or side.max() >= n:
                        raise ValueError(
                            f"a line has row or column {(side.min() if side.min() < 0 else side.max()) + 1:,} of {n:,}"
                        )
                n_read += len(lines)
                yield Entries(columns, rows, values) if genes_in_rows else Entries(rows, columns, values)
            if n_read != self.n_entries:
                raise ValueError(f"it has {n_read:,} entries, its header declares {self.n_entries:,}")


def _skip_header(text: IO[str]) -> str:
    """Read the comments and the line of sizes, which are returned."""
    header = ""
    for line in iter(text.readline, ""):
        header += line
        if line.strip() and not line.startswith("%"):
            break
    return header


def open_mtx(path: Path, cell_type_key: str | None = None, scratch: Path | None = None) -> CellStream:
    """Open a MatrixMarket table with its lists of genes and barcodes, as Cell Ranger 2 and 3 write them, or MTX + cluster CSV.

    The lists are recognised by their file names (genes/features, barcodes/cells, cluster/cell type/label). Their lengths show
    whether the table is genes x cells or cells x genes.

    Parameters
    ----------
    path
        The table, or a folder with one table.

    Raises
    ------
    ValueError
        If a list is missing or does not fit the table.
    """
    folder = path if path.is_dir() else path.parent
    files = sorted(f for f in folder.iterdir() if f.is_file() and not f.name.startswith("."))
    table = MtxTable.of(_only_matrix(folder, files) if path.is_dir() else path)
    lists = [f for f in files if ".mtx" not in f.name.lower()]
    label_files = _named_like(lists, r"cluster|cell.?type|label|annot|partition")
    lists = [f for f in lists if f not in label_files]

    genes = _read_list(_named_like(lists, r"gene|feature"), table.shape, f"gene names of {table.path}")
    is_square = table.shape[0] == table.shape[1]
    is_cell_ranger = bool(_named_like(lists, r"^(genes|features)\.tsv"))  # genes x cells
    genes_in_rows = len(genes) != table.shape[1] or (is_square and is_cell_ranger)
    symbols = genes.iloc[:, min(1, genes.shape[1] - 1)]  # Cell Ranger: gene ID, symbol, type of feature
    obs = _named_and_labelled(table, genes_in_rows, _named_like(lists, r"barcode|cell"), label_files, cell_type_key)
    cells = CellStream(obs, pd.Index(symbols.to_numpy()), table.cells(genes_in_rows, scratch), str(path))
    if genes.shape[1] > 2 and (genes[2] == "Gene Expression").any():  # the list may hold antibodies too
        return cells.select_genes((genes[2] == "Gene Expression").to_numpy())
    return cells


def _only_matrix(folder: Path, files: list[Path]) -> Path:
    matrices = [f for f in files if f.name.lower().endswith((".mtx", ".mtx.gz"))]
    if len(matrices) != 1:
        named = ", ".join(f.name for f in matrices)
        raise ValueError(
            f"{folder} holds {len(matrices)} .mtx files ({named}), expected one; set DATASET to the file itself"
        )
    return matrices[0]


def _named_like(files: list[Path], pattern: str) -> list[Path]:
    return [f for f in files if re.search(pattern, f.name.lower())]


def _named_and_labelled(
    table: MtxTable, genes_in_rows: bool, barcode_files: list[Path], label_files: list[Path], key: str | None
) -> pd.DataFrame:
    """The cells by barcode (from their list, else from the label file, else numbers), with their labels."""
    n_cells = table.shape[1 if genes_in_rows else 0]
    if len(label_files) > 1:
        named = ", ".join(f.name for f in label_files)
        print(
            f"WARNING: {len(label_files)} files look like labels ({named}): none is used; set LABELS_FILE to one of them"
        )
    labels = read_label_table(label_files[0]) if len(label_files) == 1 else None
    numbered = pd.Index([f"cell_{i + 1}" for i in range(n_cells)])
    barcodes = numbered
    if barcode_files:
        barcodes = pd.Index(_read_list(barcode_files, (n_cells,), f"barcodes of {table.path}")[0].to_numpy())
    elif labels is not None and len(labels) == n_cells:
        columns = [c for c in labels if c and c.lower() in BARCODE_COLUMNS and labels[c].is_unique]
        barcodes = pd.Index(labels[columns[0]].to_numpy()) if columns else numbered
    if labels is not None:
        return align_labels(labels, label_files[0], barcodes, key, by_order=barcodes is numbered)
    if key is not None and not label_files:
        raise ValueError(
            f"CELL_TYPE_KEY is {key!r}, but {table.path} has no file of cell types in its folder; set LABELS_FILE"
        )
    return pd.DataFrame(index=barcodes)


def _read_list(found: list[Path], sides: tuple[int, ...], what: str) -> pd.DataFrame:
    """Read a list of genes or cells, one for each row or column of the table; a header line, as R's write.csv adds, is left out."""
    if len(found) != 1:
        raise ValueError(
            f"the {what} are missing or in several files: found {[f.name for f in found]}, expected one file"
        )
    table = pd.DataFrame(read_rows(found[0]), dtype=object)
    if table.empty:
        raise ValueError(f"{found[0]} is empty; expected the {what}")
    is_header = table.iloc[0].str.lower().isin(LIST_HEADERS).any()
    if len(table) - 1 in sides and (is_header or len(table) not in sides):
        table = table.iloc[1:]
    if len(table) not in sides:
        raise ValueError(
            f"{found[0]} has {len(table):,} lines, expected one for each row or column of the table: "
            f"{' or '.join(f'{n:,}' for n in sides)}"
        )
    return table
