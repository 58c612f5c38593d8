"""Counts in the formats that people have, read into AnnData: cells x genes, sparse."""

import csv
import gzip
import re
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import scanpy as sc
import scipy.io
import scipy.sparse as sp

from lib.counts import check_orientation, gene_share, sum_duplicate_genes, to_counts

CSV_ROWS_AT_ONCE = 500  # a table of 18,000 genes x 10,000 cells is 1.5 GB when dense; read in bands it stays under 0.1 GB
TABLE_SUFFIXES = (".csv", ".csv.gz", ".tsv", ".tsv.gz", ".txt", ".txt.gz")
BARCODE_COLUMNS = ("cell.barcode", "barcode", "barcodes", "cell", "cell_id", "cellid", "index", "")
LIST_HEADERS = ("x", "v1", "gene", "genes", "gene_name", "feature", "features", "symbol", "barcode", "barcodes", "cell")
NO_LABEL = ("", "nan", "na", "none", "unknown", "unassigned", "unlabelled", "unlabeled", "1_unicorns and artifacts")


def read_dataset(path: Path, orientation: str = "auto", cell_type_key: str | None = None) -> ad.AnnData:
    """Raw counts from a file or folder, recognised by its name and content.

    Parameters
    ----------
    path
        `.h5ad`, 10x `.h5`, a folder with a MatrixMarket table (10x, or the original's MTX + cluster CSV), an `.mtx(.gz)`
        file, or a table of counts (csv, tsv, optionally gzipped).
    orientation
        Of a table: "genes_in_rows", "cells_in_rows", or "auto" to tell by well-known gene names.
    cell_type_key
        Column with the cell types, in `obs` or in the cluster CSV; None takes the one called like it, if there is one.

    Raises
    ------
    ValueError
        For a format that is none of these, and for values that are not counts.
    """
    name = path.name.lower()
    if path.is_dir():
        adata = read_mtx_folder(path, cell_type_key=cell_type_key)
    elif name.endswith(".h5ad"):
        adata = take_labels(read_h5ad(path), cell_type_key)
    elif name.endswith(".h5"):
        adata = take_labels(sc.read_10x_h5(path), cell_type_key)
    elif name.endswith((".mtx", ".mtx.gz")):
        adata = read_mtx_folder(path.parent, path, cell_type_key)
    elif name.endswith(TABLE_SUFFIXES):
        adata = take_labels(read_count_table(path, orientation), cell_type_key)
    else:
        raise ValueError(f"{path} has a format that is not known; expected .h5ad, 10x .h5, a 10x or MTX folder, or one of {', '.join(TABLE_SUFFIXES)}")
    check_orientation(adata, str(path))
    return tidy(adata, str(path))


def tidy(adata: ad.AnnData, what: str) -> ad.AnnData:
    """Checked CSR counts under unique gene names and unique barcodes; `obs` is kept, all else is left behind."""
    counts = to_counts(adata.X, what)
    counts, gene_names = sum_duplicate_genes(counts, pd.Index(adata.var_names.astype(str)))
    obs = adata.obs.copy()
    obs.index = obs.index.astype(str)
    if not obs.index.is_unique:
        repeated = obs.index[obs.index.duplicated()].unique()
        print(f"{len(repeated):,} barcodes stand more than once (such as {repeated[0]}): -1, -2, ... was added to the later ones")
        obs.index = ad.utils.make_index_unique(obs.index)
    return ad.AnnData(counts, obs=obs, var=pd.DataFrame(index=gene_names))


def read_h5ad(path: Path) -> ad.AnnData:
    """The first of `layers["counts"]`, `raw.X` and `X` that holds counts."""
    adata = ad.read_h5ad(path)
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
            print(f"counts taken from {where}")
        return ad.AnnData(counts, obs=adata.obs.copy(), var=pd.DataFrame(index=var_names))
    raise ValueError("; ".join(refused) or f"{path} holds no matrix; expected raw counts in X, raw.X or layers['counts']")


def take_labels(adata: ad.AnnData, key: str | None) -> ad.AnnData:
    """The column of `obs` that holds the cell types, if there is one, as obs["cell_type"].

    Raises
    ------
    ValueError
        If `key` is no column.
    """
    if key is None:
        named_alike = [c for c in adata.obs if re.fullmatch(r"cell[ _.]?types?", str(c).lower())]
        key = named_alike[0] if named_alike else None
    if key is not None:
        if key not in adata.obs:
            raise ValueError(f"obs has no column {key!r}; it has {', '.join(adata.obs.columns) or 'none'}: set CELL_TYPE_KEY to one of them, or LABELS_FILE")
        adata.obs["cell_type"] = clean_labels(adata.obs[key])
    return adata


def read_mtx_folder(folder: Path, matrix_file: Path | None = None, cell_type_key: str | None = None) -> ad.AnnData:
    """A MatrixMarket table with its gene and barcode lists, as Cell Ranger 2 and 3 write them, or MTX + cluster CSV.

    The lists are told apart by their names (genes/features, barcodes/cells, cluster/cell type/label) and must fit the
    table's two sides; which side holds the genes follows from their lengths.
    """
    files = sorted(f for f in folder.iterdir() if f.is_file() and not f.name.startswith("."))
    if matrix_file is None:
        matrices = [f for f in files if f.name.lower().endswith((".mtx", ".mtx.gz"))]
        if len(matrices) != 1:
            raise ValueError(f"{folder} holds {len(matrices)} .mtx files ({', '.join(f.name for f in matrices)}), expected one; name the file itself")
        matrix_file = matrices[0]
    matrix = sp.csr_matrix(scipy.io.mmread(matrix_file))
    lists = [f for f in files if ".mtx" not in f.name.lower()]
    clusters = [f for f in lists if re.search(r"cluster|cell.?type|label|annot|partition", f.name.lower())]
    lists = [f for f in lists if f not in clusters]
    genes = _read_list([f for f in lists if re.search(r"gene|feature", f.name.lower())], matrix.shape, f"gene names of {matrix_file}")
    if len(genes) != matrix.shape[1] or (matrix.shape[0] == matrix.shape[1] and any(f.name.lower().startswith(("genes.tsv", "features.tsv")) for f in lists)):
        matrix = matrix.T.tocsr()  # a square table: Cell Ranger's own names mean genes x cells
    n_cells = matrix.shape[0]
    barcode_files = [f for f in lists if re.search(r"barcode|cell", f.name.lower())]
    cells = _read_list(barcode_files, (n_cells,), f"barcodes of {matrix_file}").iloc[:, 0] if barcode_files else None
    labels = _read_cells_table(clusters[0]) if len(clusters) == 1 else None
    if len(clusters) > 1:
        print(f"{len(clusters)} files look like labels ({', '.join(f.name for f in clusters)}): none was used; set LABELS_FILE to one of them")
    by_order = cells is None
    if by_order:  # the cluster CSV may name the cells
        named = [] if labels is None else [c for c in labels if c.lower() in BARCODE_COLUMNS and c and labels[c].is_unique and len(labels) == n_cells]
        cells = labels[named[0]] if named else pd.Series([f"cell_{i + 1}" for i in range(n_cells)])
        by_order = not named
    if len(genes) != matrix.shape[1]:
        raise ValueError(f"{matrix_file} is {n_cells:,} x {matrix.shape[1]:,}, but there are {len(genes):,} genes")
    adata = ad.AnnData(matrix, obs=pd.DataFrame(index=pd.Index(cells.to_numpy())), var=pd.DataFrame(index=pd.Index(genes.iloc[:, min(1, genes.shape[1] - 1)].to_numpy())))
    if labels is not None:
        adata.obs = align_labels(labels, clusters[0], adata.obs_names, cell_type_key, by_order)
    elif cell_type_key is not None and not clusters:
        raise ValueError(f"CELL_TYPE_KEY is {cell_type_key!r}, but {folder} has no file of cell types; set LABELS_FILE")
    if genes.shape[1] > 2 and (genes[2] == "Gene Expression").any():  # Cell Ranger lists antibodies and the like besides
        adata = adata[:, (genes[2] == "Gene Expression").to_numpy()].copy()
    return adata


def _read_list(found: list[Path], sides: tuple[int, ...], what: str) -> pd.DataFrame:
    """A list of genes or cells that fits one of the table's sides; a header line, as R's write.csv adds, is left out."""
    if len(found) != 1:
        raise ValueError(f"the {what} are missing or not unique: found {[f.name for f in found]}, expected one file")
    table = pd.read_csv(found[0], sep=separator(found[0]), header=None, dtype=str, keep_default_na=False)
    is_header = table.iloc[0].str.lower().isin(LIST_HEADERS).any()
    if len(table) - 1 in sides and (is_header or len(table) not in sides):
        table = table.iloc[1:]
    if len(table) not in sides:
        raise ValueError(f"{found[0]} has {len(table):,} lines, expected as many as a side of the table: {' or '.join(f'{n:,}' for n in sides)}")
    return table


def read_count_table(path: Path, orientation: str = "auto") -> ad.AnnData:
    """A csv or tsv table of counts, read in bands of rows so that it is never dense as a whole."""
    header = read_header(path)
    bands, row_names = [], []
    read = pd.read_csv(
        path, sep=separator(path), index_col=0, chunksize=CSV_ROWS_AT_ONCE, low_memory=False, keep_default_na=False, na_values=[""]
    ) if header else []  # fmt: skip
    for band in read:
        if band.empty:
            continue
        text = [c for c, kind in band.dtypes.items() if not pd.api.types.is_numeric_dtype(kind)]
        if text:
            raise ValueError(f"{path} has columns that are not numbers ({', '.join(map(str, text[:3]))}); expected names in the first column and counts in all others")
        bands.append(sp.csr_matrix(band.to_numpy(dtype=np.float32)))
        row_names += band.index.astype(str).tolist()
    if not bands:
        raise ValueError(f"{path} is empty: it has no rows; expected a table of counts")
    matrix, rows = sp.vstack(bands, format="csr"), pd.Index(row_names)
    columns = pd.Index(header[len(header) - matrix.shape[1] :])  # not pandas' names: it renames what stands twice
    if orientation == "auto":
        orientation = _guess_orientation(rows, columns, path)
    if orientation == "genes_in_rows":
        matrix, rows, columns = matrix.T.tocsr(), columns, rows
    return ad.AnnData(matrix, obs=pd.DataFrame(index=rows), var=pd.DataFrame(index=columns))


def _guess_orientation(rows: pd.Index, columns: pd.Index, path: Path) -> str:
    in_rows, in_columns = gene_share(rows), gene_share(columns)
    if in_rows == in_columns:
        raise ValueError(
            f"{path}: cannot tell genes from cells: {in_rows:,} well-known gene names in rows, {in_columns:,} in columns "
            f"(rows: {', '.join(rows[:3])}; columns: {', '.join(columns[:3])}); set ORIENTATION to genes_in_rows or cells_in_rows"
        )
    return "genes_in_rows" if in_rows > in_columns else "cells_in_rows"


def read_labels(path: Path, barcodes: pd.Index, key: str | None = None) -> pd.DataFrame:
    """Cell types (and what else the file tells of each cell), one row a cell, in the order of `barcodes`.

    The barcode column is the one whose values are barcodes of the counts. A file without any, but with one row a cell, is
    taken in the order of the counts, and that is said.

    Parameters
    ----------
    path
        csv or tsv, with a header; the original's cluster CSV included.
    barcodes
        Of the counts.
    key
        Name of the column with the cell types; None takes the column that is called like one.

    Returns
    -------
    Table with the column `cell_type` (missing where there is no label) and the file's other columns.

    Raises
    ------
    ValueError
        If the labels are those of other cells, or a cell has two.
    """
    return align_labels(_read_cells_table(path), path, barcodes, key)


def _read_cells_table(path: Path) -> pd.DataFrame:
    table = pd.read_csv(path, sep=separator(path), dtype=str, keep_default_na=False)
    if not isinstance(table.index, pd.RangeIndex):  # R's write.table names no column for the row names
        table = table.reset_index(names="")
    table.columns = table.columns.str.strip().where(~table.columns.str.startswith("Unnamed"), "")
    if table.empty:
        raise ValueError(f"{path} is empty: it has no rows; expected one for each cell")
    return table


def align_labels(table: pd.DataFrame, path: Path, barcodes: pd.Index, key: str | None, by_order: bool = False) -> pd.DataFrame:
    """See `read_labels`; `by_order` is for cells that have no barcodes of their own."""
    matches = {column: table[column].isin(barcodes).mean() for column in table}
    barcode_column = max(matches, key=matches.get)
    if by_order or matches[barcode_column] == 0:
        if len(table) != len(barcodes):
            raise ValueError(
                f"{path} labels other cells: none of its {len(table):,} rows names one of the {len(barcodes):,} barcodes "
                f"(such as {barcodes[0]}; the file has {', '.join(table.iloc[0].astype(str))})"
            )
        print(f"WARNING: {path.name} names no barcode of the counts: its {len(table):,} rows are taken in the order of the cells")
        table = table[[c for c in table if c.lower() not in BARCODE_COLUMNS]].set_axis(barcodes)
    else:
        table = table.drop_duplicates()
        twice = table[barcode_column][table[barcode_column].duplicated() & table[barcode_column].isin(barcodes)]
        if len(twice):
            raise ValueError(f"{path} has two rows that differ for {len(twice):,} cells (such as {twice.iloc[0]}); expected one for each cell")
        table = table.drop_duplicates(barcode_column).set_index(barcode_column)
    key = key or _label_column(table, path)
    if key not in table:
        raise ValueError(f"{path} has no column {key!r}; it has {', '.join(table.columns)}: set CELL_TYPE_KEY to one of them")
    labels = clean_labels(table[key].reindex(barcodes))
    print(f"{labels.notna().sum():,} of {len(barcodes):,} cells have a label in {path.name}")
    others = table.reindex(barcodes).drop(columns=[c for c in table if c in (key, "cell_type", "")])
    return others.assign(cell_type=labels).rename_axis(None)


def clean_labels(labels: pd.Series) -> pd.Series:
    """Labels as text; missing where the source means that there is none."""
    text = labels.astype("object").where(labels.notna(), "").astype(str).str.strip()
    return text.where(~text.str.lower().isin(NO_LABEL), np.nan)


def _label_column(table: pd.DataFrame, path: Path) -> str:
    for pattern in (r"cell.?type", r"cluster|louvain|leiden|label|annotation|ident|partition"):
        found = [column for column in table if re.search(pattern, column.lower())]
        if len(found) == 1:
            return found[0]
    if table.shape[1] == 1:
        return table.columns[0]
    raise ValueError(f"{path}: cannot tell which column holds the cell types; it has {', '.join(table.columns)}: set CELL_TYPE_KEY to one of them")


def separator(path: Path) -> str:
    """Comma or tab, by what the first line holds more of."""
    with _open(path) as file:
        line = file.readline()
    return "\t" if line.count("\t") > line.count(",") else ","


def read_header(path: Path) -> list[str]:
    """The fields of the first line, as they are; one fewer than the columns in what R's write.table writes."""
    with _open(path) as file:
        return next(csv.reader(file, delimiter=separator(path)), [])


def _open(path: Path):
    return (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8", newline="")


def read_gene_lengths(path: Path) -> pd.Series:
    """Gene lengths in base pairs, by gene name.

    Either the original's table (Gene start, Gene end, Gene name, Transcript start, Transcript end; the longest
    `transcript end - start` of each gene: a genomic span, introns included) or a table of two columns, gene and length
    (exonic lengths). A gene that stands more than once gets its longest.

    Raises
    ------
    ValueError
        If it is neither.
    """
    table = pd.read_csv(path, sep=separator(path))
    if table.shape[1] == 2 and re.fullmatch(r"[0-9.]+", str(table.columns[1])):  # no header
        table = pd.read_csv(path, sep=separator(path), header=None)
    if {"Gene name", "Transcript start (bp)", "Transcript end (bp)"} <= set(table.columns):
        length = table["Transcript end (bp)"] - table["Transcript start (bp)"]
        name = table["Gene name"]
    elif table.shape[1] == 2 and pd.api.types.is_numeric_dtype(table.iloc[:, 1]):
        name, length = table.iloc[:, 0], table.iloc[:, 1]
    else:
        raise ValueError(f"{path} is no table of gene lengths: it has the columns {', '.join(map(str, table.columns))}; expected gene and length, or the columns of GeneLength.txt")
    lengths = pd.Series(length.to_numpy(dtype=float), index=name.astype(str)).groupby(level=0).max()
    return lengths[lengths > 0].rename("gene_length_bp")
