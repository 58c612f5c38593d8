"""Open counts of many formats as streams of cells; read tables of counts and of gene lengths."""

import re
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp

from lib.data.anndata_files import open_10x, open_anndata
from lib.data.counts import check_orientation, count_known_genes
from lib.data.labels import take_labels
from lib.data.mtx import open_mtx
from lib.data.streams import CellStream
from lib.data.tables import EXPECTED, open_text, read_header, read_rows, read_table, separator
from lib.files import reading
from lib.records import Unusable

CSV_BLOCK_ROWS = 500  # of a csv in memory at a time: 18,000 genes x 10,000 cells are 1.5 GB when dense, a block 0.04 GB
TABLE_SUFFIXES = (".csv", ".csv.gz", ".tsv", ".tsv.gz", ".txt", ".txt.gz")


def open_dataset(
    path: Path, orientation: str = "auto", cell_type_key: str | None = None, scratch: Path | None = None
) -> CellStream:
    """Open raw counts in a file or folder; the format is recognised by its name and content.

    All formats but tables are read in blocks, when the blocks of the stream are used.

    Parameters
    ----------
    path
        `.h5ad`, `.zarr` of AnnData, 10x `.h5`, a folder with a MatrixMarket table (10x, or the original's MTX + cluster CSV), an
        `.mtx(.gz)` file, or a table of counts (csv, tsv, optionally gzipped).
    orientation
        Of a table: "genes_in_rows", "cells_in_rows", or "auto" to recognise it by common gene names.
    cell_type_key
        Column with the cell types, in `obs` or in the cluster CSV; None takes a column named like cell_type, if there is one.
    scratch
        Folder for temporary files: counts that are stored by gene are sorted by cell there. None: that of the system.

    Raises
    ------
    ValueError
        For any other format, and for values that are not counts, some of them only when the blocks are read.
    """
    name = path.name.lower()
    if name.endswith((".mtx", ".mtx.gz")) or (path.is_dir() and not name.endswith(".zarr")):
        cells = open_mtx(path, cell_type_key, scratch)
    else:
        if name.endswith((".h5ad", ".zarr")):
            cells = open_anndata(path, scratch)
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


def read_count_table(path: Path, orientation: str = "auto") -> ad.AnnData:
    """Read a csv or tsv table of counts, in blocks of rows, so that the whole table is never dense.

    Raises
    ------
    ValueError
        If it is empty, has columns of text, or its orientation cannot be recognised.
    """
    header, delimiter = read_header(path), separator(path)
    blocks, row_names = [], []
    with reading(path, EXPECTED), open_text(path) as file:
        read = pd.read_csv(
            file, sep=delimiter, index_col=0, chunksize=CSV_BLOCK_ROWS, low_memory=False, keep_default_na=False, na_values=[""]
        ) if header else []  # fmt: skip
        for block in read:
            if block.empty:
                continue
            dtypes = block.dtypes.items()
            text = [
                c for c, kind in dtypes if not pd.api.types.is_numeric_dtype(kind) or pd.api.types.is_bool_dtype(kind)
            ]
            if text:
                raise Unusable(
                    f"{path} has columns that are not numbers ({', '.join(map(str, text[:3]))}); "
                    "expected names in the first column and counts in all others"
                )
            blocks.append(sp.csr_matrix(block.to_numpy(dtype=np.float32)))
            row_names += block.index.astype(str).tolist()
    if not blocks:
        raise ValueError(f"{path} is empty: it has no rows; expected a table of counts")
    matrix, rows = sp.vstack(blocks, format="csr"), pd.Index(row_names)
    columns = pd.Index(header[len(header) - matrix.shape[1] :])  # pandas renames duplicate columns
    if orientation == "auto":
        orientation = _guess_orientation(rows, columns, path)
    if orientation == "genes_in_rows":
        matrix, rows, columns = matrix.T.tocsr(), columns, rows
    return ad.AnnData(matrix, obs=pd.DataFrame(index=rows), var=pd.DataFrame(index=columns))


def _guess_orientation(rows: pd.Index, columns: pd.Index, path: Path) -> str:
    in_rows, in_columns = count_known_genes(rows), count_known_genes(columns)
    if in_rows == in_columns:
        raise ValueError(
            f"{path}: cannot tell genes from cells: {in_rows:,} known gene names in rows, {in_columns:,} in columns "
            f"(rows: {', '.join(rows[:3])}; columns: {', '.join(columns[:3])}); set ORIENTATION to genes_in_rows or cells_in_rows"
        )
    return "genes_in_rows" if in_rows > in_columns else "cells_in_rows"


def read_gene_lengths(path: Path) -> pd.Series:
    """Read gene lengths in base pairs, by gene name.

    Either the original's GeneLength.txt (Gene name, Transcript start, Transcript end: the length is end - start, a genomic span with
    introns) or a table of two columns, gene and length (exonic lengths). A duplicate gene gets its largest length.

    Raises
    ------
    ValueError
        If the table is neither.
    """
    table = read_table(path)
    if table.shape[1] == 2 and re.fullmatch(r"[0-9.]+", str(table.columns[1])):  # no header
        table = pd.DataFrame(read_rows(path), dtype=object)
    if {"Gene name", "Transcript start (bp)", "Transcript end (bp)"} <= set(table.columns):
        start, end = (_numbers(table[f"Transcript {side} (bp)"], path) for side in ("start", "end"))
        name, length = table["Gene name"], end - start
    elif table.shape[1] == 2 and len(table):
        name, length = table.iloc[:, 0], _numbers(table.iloc[:, 1], path)
    else:
        raise ValueError(
            f"{path} is not a table of gene lengths: it has the columns {', '.join(map(str, table.columns))}; "
            "expected gene and length, or the columns of GeneLength.txt"
        )
    lengths = pd.Series(length.to_numpy(dtype=float), index=name.astype(str)).groupby(level=0).max()
    return lengths[lengths > 0].rename("gene_length_bp")


def _numbers(column: pd.Series, path: Path) -> pd.Series:
    """Base pairs, NaN where the field is empty or NA.

    Raises
    ------
    ValueError
        For any other text, and for infinity.
    """
    numbers = pd.to_numeric(column, errors="coerce")
    bad = column[~np.isfinite(numbers) & ~column.str.strip().str.lower().isin(("", "na", "nan"))]
    if len(bad):
        raise ValueError(
            f"{path} is not a table of gene lengths: it holds {bad.iloc[0]!r}, expected numbers of base pairs"
        )
    return numbers
