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
import zarr
from anndata.abc import CSRDataset

from lib.data.counts import BLOCK_CELLS, row_blocks
from lib.data.labels import BARCODE_COLUMNS, read_labels, take_labels
from lib.data.tables import EXPECTED, open_text, read_rows, read_table, separator
from lib.run import reading

CSV_BLOCK_ROWS = 500  # of a csv in memory at a time: 18,000 genes x 10,000 cells are 1.5 GB when dense, a block 0.04 GB
TABLE_SUFFIXES = (".csv", ".csv.gz", ".tsv", ".tsv.gz", ".txt", ".txt.gz")
# Of counts in an AnnData, in the order of preference, and of the names of their genes
PLACES = {"layers['counts']": ("layers/counts", "var"), "raw.X": ("raw/X", "raw/var"), "X": ("X", "var")}
MTX_FILES = {  # beside an .mtx, by the first pattern that fits the name
    "counts": r"\.mtx(\.gz)?$",
    "cell types": "cluster|cell.?type|label|annot|partition",
    "genes": "gene|feature",
    "barcodes": "barcode|cell",
}
CHECK_S = 60  # seconds that the check of an HDF5 file may take
SMALL = 1 << 20  # values of an HDF5 array that the check reads
# Nearly every human or mouse table has these genes; they show whether genes are in rows or in columns.
COMMON_GENES = frozenset(
    "ACTB ACTG1 B2M CALM1 CD74 EEF1A1 EEF2 FAU FTH1 FTL GAPDH HSP90AB1 HSPA8 LDHA MALAT1 NEAT1 PABPC1 PTMA TMSB10 TMSB4X "
    "TPT1 TUBA1B UBA52 UBB UBC VIM".split()
)
TRANSCRIPT_COLUMNS = ["Gene name", "Transcript start (bp)", "Transcript end (bp)"]  # of the original's GeneLength.txt


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

        The counts are checked when the blocks are read: ValueError for values that are not counts.
        """
        obs, genes = self.obs.set_axis(self.obs.index.astype(str)), pd.Index(self.gene_names.astype(str))
        if not len(obs) or not len(genes):
            raise ValueError(f"{self.name} is empty: got {len(obs)} cells x {len(genes)} genes, expected one or more")
        repeated = obs.index[obs.index.duplicated()].unique()
        if len(repeated):
            print(f"{len(repeated):,} duplicate barcodes (such as {repeated[0]}): all but the first get -1, -2, ...")
            obs.index = ad.utils.make_index_unique(obs.index)
        merge = None
        if not genes.is_unique:
            repeated = genes[genes.duplicated()].unique()
            print(f"{len(repeated):,} duplicate gene names (such as {repeated[0]}): their counts are summed")
            codes, genes = pd.factorize(genes)
            merge = sp.identity(len(genes), np.float32, "csr")[codes]
        return CellStream(obs, genes, self._checked(merge), self.name)

    def _checked(self, merge: sp.csr_matrix | None) -> Iterator[sp.csr_matrix]:
        """The blocks as float32 CSR of counts, sorted and without zeros; `merge` (genes x unique genes) sums duplicate genes."""
        n_cells, n_counts = 0, 0
        for block in self.blocks:
            counts, start = sp.csr_matrix(block, dtype=np.float32), n_cells + 1
            n_cells += block.shape[0]
            check_values(counts.data, f"{self.name}, cells {start:,} to {n_cells:,},")
            if merge is not None:
                counts = counts @ merge
            counts.sum_duplicates()
            counts.eliminate_zeros()
            n_counts += counts.nnz
            yield counts
        if n_cells != len(self.obs) or not n_counts:
            raise ValueError(
                f"{self.name} has counts of {n_cells:,} cells, {n_counts:,} above 0; expected {len(self.obs):,} cells"
            )


def check_values(values: np.ndarray, what: str) -> None:
    """Refuse values that are not raw counts: NaN, negative, fractional or too large; `what` names the matrix in messages."""
    n_bad = np.sum(~np.isfinite(values))
    if n_bad:
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


def count_known_genes(names: pd.Index) -> int:
    """Number of names that are `COMMON_GENES` or Ensembl gene IDs."""
    upper = pd.Index(names).astype(str).str.upper()
    return int((upper.isin(COMMON_GENES) | upper.str.match(r"ENS[A-Z]*G\d{6,}")).sum())


def open_dataset(path: Path, orientation: str = "auto", cell_type_key: str | None = None) -> CellStream:
    """Open raw counts: `.h5ad`, `.zarr`, 10x `.h5`, an `.mtx(.gz)` or a folder with one, or a table (csv, tsv), as the name says.

    orientation: of a table, "genes_in_rows", "cells_in_rows", or "auto", by common gene names. cell_type_key: column with the cell
    types, in `obs` or in the file of labels beside an `.mtx`; None takes a column named like cell_type. ValueError for other formats,
    damaged files, and values that are not counts, some of them only when the blocks are read.
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
            expected = f".h5ad, 10x .h5, .zarr, a 10x or MTX folder, or one of {', '.join(TABLE_SUFFIXES)}"
            raise ValueError(f"{path} has an unknown format; expected {expected}")
        cells.obs = take_labels(cells.obs, cell_type_key)
    if count_known_genes(cells.obs.index) > count_known_genes(cells.gene_names):
        rows, columns = ", ".join(cells.obs.index[:3]), ", ".join(cells.gene_names[:3])
        names = f"its rows have gene names ({rows}), its columns do not ({columns})"
        raise ValueError(f"{path} looks transposed: {names}; expected cells in rows: save its transpose (adata.T)")
    return cells.tidy()


def open_anndata(path: Path) -> CellStream:
    """Open the first of `layers["counts"]`, `raw.X` and `X` whose first cells hold counts, in an .h5ad file or a .zarr folder."""
    refused = []
    with reading(path, "an AnnData in h5ad or zarr format, with counts in X, raw.X or layers['counts']"):
        file = _open_group(path)
        obs = ad.io.read_elem(file["obs"])
        for where, (key, var) in PLACES.items():
            if key not in file:
                continue
            counts, genes = _by_cell(file[key]), ad.io.read_elem(file[var]).index
            name, expected = f"{where} of {path}", (len(obs), len(genes))
            if counts.shape != expected:
                raise ValueError(f"{name} is damaged: it has the shape {counts.shape}, expected {expected}")
            _, first = next(row_blocks(counts), (None, sp.csr_matrix(expected)))
            try:
                check_values(first.data.astype(np.float32), name)
            except ValueError as error:
                refused.append(str(error))
                continue
            if where != "X":
                print(f"counts are taken from {where}")
            return CellStream(obs, genes, (block for _, block in row_blocks(counts)), name)
        raise ValueError("; ".join(refused) or "it holds no matrix")


def _open_group(path: Path) -> h5py.Group | zarr.Group:
    """The open file; one that anndata wrote before 0.7 as a copy in memory, in today's form."""
    if path.suffix.lower() == ".zarr":
        return zarr.open_group(path, mode="r")
    check_foreign(path, ("obs", "var"), indices=False)
    file = h5py.File(path)
    if isinstance(file["obs"], h5py.Dataset):
        file = h5py.File.in_memory()
        ad.io.write_elem(file, "/", ad.read_h5ad(path))
    return file


def _by_cell(stored: Any) -> sp.csr_matrix | CSRDataset:
    """A valid CSR matrix: on disk if it is stored like that in an .h5ad file, otherwise in memory."""
    if isinstance(stored, (h5py.Dataset, zarr.Array)):
        starts = range(0, max(1, stored.shape[0]), BLOCK_CELLS)
        return sp.vstack([sp.csr_matrix(stored[start : start + BLOCK_CELLS]) for start in starts], format="csr")
    matrix = ad.io.sparse_dataset(stored)
    if isinstance(matrix, CSRDataset) and isinstance(stored, h5py.Group):
        return matrix
    in_memory = matrix.to_memory()
    in_memory.check_format(full_check=True)
    return sp.csr_matrix(in_memory)


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
    with reading(path, "an HDF5 file with valid matrices"), h5py.File(path) as file:
        if missing := [name for name in needs if name not in file]:
            raise ValueError(f"it lacks {' and '.join(missing)}")
        items: list[h5py.Group | h5py.Dataset] = []
        file.visititems(lambda _, item: items.append(item))  # returns None, so that the visit goes on
        for item in items:
            if isinstance(item, h5py.Group) and "indptr" in item:
                if (item["indptr"][0], item["indptr"][-1]) != (0, len(item["data"])):  # scipy would leave values out
                    raise ValueError(f"the index pointers of {item.name} do not fit")
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
    """Open an MTX table of genes x cells, or a folder with one; the files beside it are told by their names (`MTX_FILES`).

    These are the files of Cell Ranger 2 and 3, of the paper's code and of stage 5. ValueError if one is missing or does not fit; cells
    without barcodes are numbered; with two or more files of cell types, none is used.
    """
    files: dict[str, list[Path]] = {part: [] for part in MTX_FILES}
    for file in sorted((path if path.is_dir() else path.parent).glob("[!.]*")):
        parts = [part for part, pattern in MTX_FILES.items() if re.search(pattern, file.name.lower())]
        if parts and file.is_file():
            files[parts[0]].append(file)
    if path.is_file():
        files["counts"] = [path]
    for part in ("counts", "genes", "barcodes"):
        if len(files[part]) > 1 or (part != "barcodes" and not files[part]):
            names = ", ".join(file.name for file in files[part]) or "no file"
            raise ValueError(f"{path} holds {names} of {part}, expected one; DATASET may be the .mtx file itself")

    (table,), (gene_file,), label_files = files["counts"], files["genes"], files["cell types"]
    with reading(table, "a complete MatrixMarket file"):
        counts = sp.csr_matrix(scipy.io.mmread(table).T)
    n_cells, n_genes = counts.shape
    genes, barcodes = _read_list(gene_file, n_genes), [f"cell_{i + 1}" for i in range(n_cells)]
    if files["barcodes"]:
        barcodes = list(_read_list(files["barcodes"][0], n_cells)[0])
    elif len(label_files) == 1:
        table_of_cells = read_table(label_files[0])
        columns = [key for key in table_of_cells if key.lower() in BARCODE_COLUMNS and table_of_cells[key].is_unique]
        barcodes = list(table_of_cells[columns[0]]) if columns else barcodes
    if len(label_files) == 1:
        obs = read_labels(label_files[0], pd.Index(barcodes), cell_type_key)
    else:
        obs = take_labels(pd.DataFrame(index=barcodes), cell_type_key)
    if len(label_files) > 1:
        print(f"WARNING: {len(label_files)} files in {path} look like cell types, expected one: set LABELS_FILE")
    if counts.shape != (len(obs), len(genes)):
        named = f"the files beside it name {len(genes):,} genes and {len(obs):,} cells"
        raise ValueError(f"{table} has {n_genes:,} rows and {n_cells:,} columns, but {named}; expected genes x cells")
    symbols = genes.iloc[:, min(1, genes.shape[1] - 1)]  # Cell Ranger: gene ID, symbol, type of feature
    adata = ad.AnnData(counts, obs=obs, var=pd.DataFrame(index=symbols.to_numpy()))
    if genes.shape[1] > 2 and (genes[2] == "Gene Expression").any():  # the list may hold antibodies too
        adata = adata[:, (genes[2] == "Gene Expression").to_numpy()]
    return CellStream.of(adata, str(path))


def _read_list(path: Path, length: int) -> pd.DataFrame:
    """Read a list of genes or cells, without a header such as that of R's write.csv."""
    rows = read_rows(path)
    return pd.DataFrame(rows[1:] if len(rows) == length + 1 else rows, dtype=object)


def read_count_table(path: Path, orientation: str = "auto") -> ad.AnnData:
    """Read a csv or tsv of counts, never all of it dense; ValueError for columns of text, or where genes and cells look alike."""
    blocks, row_names, delimiter = [], [], separator(path)
    with reading(path, f"{EXPECTED}, with names in its first row and column"), open_text(path) as file:
        header = next(csv.reader(file, delimiter=delimiter), [])  # pandas would rename duplicate columns
        file.seek(0)
        options = dict(sep=delimiter, index_col=0, low_memory=False, keep_default_na=False, na_values=[""])
        for block in pd.read_csv(file, chunksize=CSV_BLOCK_ROWS, **options):
            text = block.select_dtypes(exclude="number").columns
            if len(block) and len(text):
                raise ValueError(f"column {text[0]!r} does not hold numbers alone")
            blocks.append(sp.csr_matrix(block.to_numpy(dtype=np.float32)))
            row_names += block.index.astype(str).tolist()
        matrix = sp.vstack(blocks, format="csr")
        if not row_names or len(header) < matrix.shape[1]:
            raise ValueError("it has no rows, or no header")
        if any("\n" in name for name in (*header, *row_names)):
            raise ValueError("a name holds a line break: is a quotation mark not closed?")
    rows, columns = pd.Index(row_names), pd.Index(header[len(header) - matrix.shape[1] :])
    if orientation == "auto":
        in_rows, in_columns = count_known_genes(rows), count_known_genes(columns)
        if in_rows == in_columns:
            some = f"rows: {', '.join(rows[:3])}; columns: {', '.join(columns[:3])}"
            known = f"{in_rows:,} known gene names in rows, {in_columns:,} in columns ({some})"
            raise ValueError(f"{path}: cannot tell genes from cells: {known}; set ORIENTATION")
        orientation = "genes_in_rows" if in_rows > in_columns else "cells_in_rows"
    if orientation == "genes_in_rows":
        matrix, rows, columns = matrix.T.tocsr(), columns, rows
    return ad.AnnData(matrix, obs=pd.DataFrame(index=rows), var=pd.DataFrame(index=columns))


def read_gene_lengths(path: Path) -> pd.Series:
    """Read gene lengths in base pairs, by gene name; ValueError if the file is no such table.

    Either the original's GeneLength.txt (`TRANSCRIPT_COLUMNS`: the length is end - start, a genomic span with introns) or a table of
    two columns, gene and length (exonic lengths). A duplicate gene gets its largest length.
    """
    table = read_table(path)
    if table.shape[1] == 2 and re.fullmatch(r"[0-9.]+", str(table.columns[1])):  # no header
        table = pd.DataFrame(read_rows(path), dtype=object)
    with reading(path, "gene and length in base pairs, NA where there is none, or the columns of GeneLength.txt"):
        if {*TRANSCRIPT_COLUMNS} <= {*table}:
            table = table[TRANSCRIPT_COLUMNS]
        elif table.shape[1] != 2 or table.empty:
            raise ValueError(f"it has the columns {', '.join(map(str, table))}")
        numbers = table.iloc[:, 1:].replace({"": "nan", "NA": "nan"}).astype(float).to_numpy()
    lengths = pd.Series(numbers[:, -1] - (numbers[:, 0] if numbers.shape[1] == 2 else 0), index=table.iloc[:, 0])
    lengths = lengths.groupby(level=0).max()
    return lengths[(lengths > 0) & np.isfinite(lengths)].rename("gene_length_bp")
