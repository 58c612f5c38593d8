"""Cell types as they come: in a column of `obs`, or in a file of their own, matched to the cells by barcode."""

import re
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd

from lib.data.tables import separator

BARCODE_COLUMNS = ("cell.barcode", "barcode", "barcodes", "cell", "cell_id", "cellid", "index", "")
NO_LABEL = ("", "nan", "na", "none", "unknown", "unassigned", "unlabelled", "unlabeled", "1_unicorns and artifacts")


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
            raise ValueError(
                f"obs has no column {key!r}; it has {', '.join(adata.obs.columns) or 'none'}: set CELL_TYPE_KEY to one of them, or LABELS_FILE"
            )
        adata.obs["cell_type"] = clean_labels(adata.obs[key])
    return adata


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
    return align_labels(read_label_table(path), path, barcodes, key)


def read_label_table(path: Path) -> pd.DataFrame:
    table = pd.read_csv(path, sep=separator(path), dtype=str, keep_default_na=False)
    if not isinstance(table.index, pd.RangeIndex):  # R's write.table names no column for the row names
        table = table.reset_index(names="")
    table.columns = table.columns.str.strip().where(~table.columns.str.startswith("Unnamed"), "")
    if table.empty:
        raise ValueError(f"{path} is empty: it has no rows; expected one for each cell")
    return table


def align_labels(
    table: pd.DataFrame, path: Path, barcodes: pd.Index, key: str | None, by_order: bool = False
) -> pd.DataFrame:
    """See `read_labels`; `by_order` is for cells that have no barcodes of their own."""
    matches = {column: table[column].isin(barcodes).mean() for column in table}
    barcode_column = max(matches, key=matches.get)
    if by_order or matches[barcode_column] == 0:
        if len(table) != len(barcodes):
            raise ValueError(
                f"{path} labels other cells: none of its {len(table):,} rows names one of the {len(barcodes):,} barcodes "
                f"(such as {barcodes[0]}; the file has {', '.join(table.iloc[0].astype(str))})"
            )
        print(
            f"WARNING: {path.name} names no barcode of the counts: its {len(table):,} rows are taken in the order of the cells"
        )
        table = table[[c for c in table if c.lower() not in BARCODE_COLUMNS]].set_axis(barcodes)
    else:
        table = table.drop_duplicates()
        twice = table[barcode_column][table[barcode_column].duplicated() & table[barcode_column].isin(barcodes)]
        if len(twice):
            raise ValueError(
                f"{path} has two rows that differ for {len(twice):,} cells (such as {twice.iloc[0]}); expected one for each cell"
            )
        table = table.drop_duplicates(barcode_column).set_index(barcode_column)
    key = key or _label_column(table, path)
    if key not in table:
        raise ValueError(
            f"{path} has no column {key!r}; it has {', '.join(table.columns)}: set CELL_TYPE_KEY to one of them"
        )
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
    raise ValueError(
        f"{path}: cannot tell which column holds the cell types; it has {', '.join(table.columns)}: set CELL_TYPE_KEY to one of them"
    )
