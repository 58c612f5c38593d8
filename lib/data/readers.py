"""Read counts of many formats into AnnData: cells x genes, sparse, checked."""

import re
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import scanpy as sc
import scipy.io
import scipy.sparse as sp

from lib.data.counts import check_orientation, count_known_genes, sum_duplicate_genes, to_counts
from lib.data.hdf5 import check_foreign
from lib.data.hdf5 import read_h5ad as read_anndata
from lib.data.labels import BARCODE_COLUMNS, align_labels, read_label_table, take_labels
from lib.data.tables import EXPECTED, open_text, read_header, read_rows, read_table, separator
from lib.files import Unusable, check_unpacked, reading

CSV_BLOCK_ROWS = 500  # of a csv in memory at a time: 18,000 genes x 10,000 cells are 1.5 GB when dense, a block 0.04 GB
TABLE_SUFFIXES = (".csv", ".csv.gz", ".tsv", ".tsv.gz", ".txt", ".txt.gz")
LIST_HEADERS = ("x", "v1", "gene", "genes", "gene_name", "feature", "features", "symbol", "barcode", "barcodes", "cell")


def read_dataset(path: Path, orientation: str = "auto", cell_type_key: str | None = None) -> ad.AnnData:
    """Read raw counts from a file or folder; the format is recognised by its name and content.

    Parameters
    ----------
    path
        `.h5ad`, 10x `.h5`, a folder with a MatrixMarket table (10x, or the original's MTX + cluster CSV), an `.mtx(.gz)`
        file, or a table of counts (csv, tsv, optionally gzipped).
    orientation
        Of a table: "genes_in_rows", "cells_in_rows", or "auto" to recognise it by common gene names.
    cell_type_key
        Column with the cell types, in `obs` or in the cluster CSV; None takes a column named like cell_type, if there is one.

    Raises
    ------
    ValueError
        For any other format, and for values that are not counts.
    """
    name = path.name.lower()
    if path.is_dir():
        adata = read_mtx_folder(path, cell_type_key=cell_type_key)
    elif name.endswith(".h5ad"):
        adata = take_labels(read_h5ad(path), cell_type_key)
    elif name.endswith(".h5"):
        adata = take_labels(read_10x(path), cell_type_key)
    elif name.endswith((".mtx", ".mtx.gz")):
        adata = read_mtx_folder(path.parent, path, cell_type_key)
    elif name.endswith(TABLE_SUFFIXES):
        adata = take_labels(read_count_table(path, orientation), cell_type_key)
    else:
        raise ValueError(
            f"{path} has an unknown format; expected .h5ad, 10x .h5, a 10x or MTX folder, or one of {', '.join(TABLE_SUFFIXES)}"
        )
    check_orientation(adata, str(path))
    return tidy(adata, str(path))


def tidy(adata: ad.AnnData, what: str) -> ad.AnnData:
    """Check the counts (see `to_counts`) and make gene names and barcodes unique; of the rest, only `obs` is kept."""
    counts = to_counts(adata.X, what)
    counts, gene_names = sum_duplicate_genes(counts, pd.Index(adata.var_names.astype(str)))
    obs = adata.obs.copy()
    obs.index = obs.index.astype(str)
    if not obs.index.is_unique:
        repeated = obs.index[obs.index.duplicated()].unique()
        print(
            f"{len(repeated):,} duplicate barcodes (such as {repeated[0]}): -1, -2, ... is added to the second, third, ... cell"
        )
        obs.index = ad.utils.make_index_unique(obs.index)
    return ad.AnnData(counts, obs=obs, var=pd.DataFrame(index=gene_names))


def read_h5ad(path: Path) -> ad.AnnData:
    """Read the first of `layers["counts"]`, `raw.X` and `X` that holds counts.

    Raises
    ------
    ValueError
        If none does; the message says what is wrong with each.
    """
    check_foreign(path, ("obs", "var"))
    adata = read_anndata(path)
    candidates = {"X": (adata.X, adata.var_names)}
    if adata.raw is not None:
        candidates = {"raw.X": (adata.raw.X, adata.raw.var_names)} | candidates
    if "counts" in adata.layers:
        candidates = {"layers['counts']": (adata.layers["counts"], adata.var_names)} | candidates
    refused = []
    for where, (matrix, var_names) in candidates.items():
        if matrix is None:
            continue
        try:
            counts = to_counts(matrix, f"{where} of {path}")
        except ValueError as error:
            refused.append(str(error))
            continue
        if where != "X":
            print(f"counts are taken from {where}")
        return ad.AnnData(counts, obs=adata.obs.copy(), var=pd.DataFrame(index=var_names))
    raise ValueError(
        "; ".join(refused) or f"{path} holds no matrix; expected raw counts in X, raw.X or layers['counts']"
    )


def read_10x(path: Path) -> ad.AnnData:
    """Read a 10x .h5 file of Cell Ranger 2 or 3, after a check of its structure."""
    check_foreign(path)
    with reading(path, "a 10x .h5 file of Cell Ranger"):
        return sc.read_10x_h5(path)


def read_mtx(path: Path) -> sp.csr_matrix:
    """Read a MatrixMarket file, after a check of the size that its header declares."""
    with reading(path, "a complete MatrixMarket file"):
        n_rows, n_columns, n_entries, *_ = scipy.io.mminfo(path)
        check_unpacked(path, 8 * (n_rows + n_columns) + 16 * n_entries)
        return sp.csr_matrix(scipy.io.mmread(path))


def read_mtx_folder(folder: Path, matrix_file: Path | None = None, cell_type_key: str | None = None) -> ad.AnnData:
    """Read a MatrixMarket table with its lists of genes and barcodes, as Cell Ranger 2 and 3 write them, or MTX + cluster CSV.

    The lists are recognised by their file names (genes/features, barcodes/cells, cluster/cell type/label). Their lengths show
    whether the table is genes x cells or cells x genes.

    Raises
    ------
    ValueError
        If a list is missing or does not fit the table.
    """
    files = sorted(f for f in folder.iterdir() if f.is_file() and not f.name.startswith("."))
    if matrix_file is None:
        matrices = [f for f in files if f.name.lower().endswith((".mtx", ".mtx.gz"))]
        if len(matrices) != 1:
            named = ", ".join(f.name for f in matrices)
            raise ValueError(
                f"{folder} holds {len(matrices)} .mtx files ({named}), expected one; set DATASET to the file itself"
            )
        matrix_file = matrices[0]
    lists = [f for f in files if ".mtx" not in f.name.lower()]
    label_files = _named_like(lists, r"cluster|cell.?type|label|annot|partition")
    lists = [f for f in lists if f not in label_files]

    matrix = read_mtx(matrix_file)
    genes = _read_list(_named_like(lists, r"gene|feature"), matrix.shape, f"gene names of {matrix_file}")
    is_square = matrix.shape[0] == matrix.shape[1]
    is_cell_ranger = bool(_named_like(lists, r"^(genes|features)\.tsv"))  # genes x cells
    if len(genes) != matrix.shape[1] or (is_square and is_cell_ranger):
        matrix = matrix.T.tocsr()
    symbols = genes.iloc[:, min(1, genes.shape[1] - 1)]  # Cell Ranger: gene ID, symbol, type of feature
    adata = ad.AnnData(matrix, var=pd.DataFrame(index=pd.Index(symbols.to_numpy())))
    _name_and_label_cells(adata, matrix_file, _named_like(lists, r"barcode|cell"), label_files, cell_type_key)
    if genes.shape[1] > 2 and (genes[2] == "Gene Expression").any():  # the list may hold antibodies too
        adata = adata[:, (genes[2] == "Gene Expression").to_numpy()].copy()
    return adata


def _named_like(files: list[Path], pattern: str) -> list[Path]:
    return [f for f in files if re.search(pattern, f.name.lower())]


def _name_and_label_cells(
    adata: ad.AnnData, matrix_file: Path, barcode_files: list[Path], label_files: list[Path], key: str | None
) -> None:
    """Set the barcodes (from their list, else from the label file, else numbers), then the labels."""
    if len(label_files) > 1:
        named = ", ".join(f.name for f in label_files)
        print(
            f"WARNING: {len(label_files)} files look like labels ({named}): none is used; set LABELS_FILE to one of them"
        )
    labels = read_label_table(label_files[0]) if len(label_files) == 1 else None
    numbered = pd.Index([f"cell_{i + 1}" for i in range(adata.n_obs)])
    barcodes = numbered
    if barcode_files:
        barcodes = pd.Index(_read_list(barcode_files, (adata.n_obs,), f"barcodes of {matrix_file}")[0].to_numpy())
    elif labels is not None and len(labels) == adata.n_obs:
        columns = [c for c in labels if c and c.lower() in BARCODE_COLUMNS and labels[c].is_unique]
        barcodes = pd.Index(labels[columns[0]].to_numpy()) if columns else numbered
    adata.obs_names = barcodes
    if labels is not None:
        adata.obs = align_labels(labels, label_files[0], barcodes, key, by_order=barcodes is numbered)
    elif key is not None and not label_files:
        raise ValueError(
            f"CELL_TYPE_KEY is {key!r}, but {matrix_file} has no file of cell types in its folder; set LABELS_FILE"
        )


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
