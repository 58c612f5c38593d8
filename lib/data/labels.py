"""Read the cell types: from a column of `obs`, or from a file of labels, matched to the cells by barcode."""

import re
from pathlib import Path

import numpy as np
import pandas as pd

from lib.data.tables import read_table

BARCODE_COLUMNS = ("cell.barcode", "barcode", "barcodes", "cell", "cell_id", "cellid", "index", "")
NO_LABEL = ("", "nan", "na", "none", "unknown", "unassigned", "unlabelled", "unlabeled", "1_unicorns and artifacts")


def take_labels(obs: pd.DataFrame, key: str | None) -> pd.DataFrame:
    """Obs with the column cell_type, taken from the column `key`; None takes a column named like it, if there is one.

    Raises
    ------
    ValueError
        If there is no column `key`, or it labels no cell.
    """
    given = key is not None
    if key is None:
        alike = [c for c in obs if re.fullmatch(r"cell[ _.]?types?", str(c).lower())]
        key = alike[0] if alike else None
    if key is None:
        return obs
    if key not in obs:
        raise ValueError(
            f"obs has no column {key!r}; it has {', '.join(obs.columns) or 'none'}: "
            "set CELL_TYPE_KEY to one of them, or LABELS_FILE"
        )
    labels = clean_labels(obs[key])
    if labels.notna().any():
        return obs.assign(cell_type=labels)
    if given:
        raise ValueError(
            f"obs[{key!r}] labels no cell: all its values mean no type; set CELL_TYPE_KEY to another column"
        )
    print(f"WARNING: obs[{key!r}] labels no cell, so it is left out: stage 1 will cluster the cells")
    return obs.drop(columns=key)


def read_labels(path: Path, barcodes: pd.Index, key: str | None = None) -> pd.DataFrame:
    """Read a table of cell types, one row for each cell, in the order of `barcodes`.

    The barcode column is the one that holds most barcodes of the counts. A file without barcodes, but with one row for each
    cell, is taken in the order of the counts, with a warning.

    Parameters
    ----------
    path
        csv or tsv with a header, such as the original's cluster CSV.
    barcodes
        Barcodes of the counts.
    key
        Column with the cell types; None takes the only column that is named like cell type, cluster, label, ...

    Returns
    -------
    Table with the column `cell_type` (missing where there is no label) and the file's other columns.

    Raises
    ------
    ValueError
        If the labels belong to other cells, or a cell has two different rows.
    """
    return align_labels(read_label_table(path), path, barcodes, key)


def read_label_table(path: Path) -> pd.DataFrame:
    """Read a file of labels as text, as it is; a column without a name is called ""."""
    table = read_table(path)
    if table.empty:
        raise ValueError(f"{path} is empty: it has no rows; expected one for each cell")
    return table


def align_labels(
    table: pd.DataFrame, path: Path, barcodes: pd.Index, key: str | None, by_order: bool = False
) -> pd.DataFrame:
    """As `read_labels`; `by_order` if the counts have no barcodes."""
    matches = {column: table[column].isin(barcodes).mean() for column in table}
    barcode_column = max(matches, key=lambda column: matches[column])
    if by_order or matches[barcode_column] == 0:
        if len(table) != len(barcodes):
            raise ValueError(
                f"{path} labels other cells: none of its {len(table):,} rows has one of the {len(barcodes):,} barcodes "
                f"(such as {barcodes[0]}; its first row is {', '.join(table.iloc[0].astype(str))}); "
                "expected a column of barcodes, or one row for each cell in the order of the counts"
            )
        print(
            f"WARNING: {path.name} has no barcode of the counts: its {len(table):,} rows are taken in the order of the cells"
        )
        table = table[[c for c in table if c.lower() not in BARCODE_COLUMNS]].set_axis(barcodes)
    else:
        table = table.drop_duplicates()
        listed = table[barcode_column]
        repeated = listed[listed.duplicated() & listed.isin(barcodes)]
        if len(repeated):
            raise ValueError(
                f"{path} has two different rows for {len(repeated):,} cells (such as {repeated.iloc[0]}); expected one for each cell"
            )
        table = table.drop_duplicates(barcode_column).set_index(barcode_column)
    key = key or _label_column(table, path)
    if key not in table:
        raise ValueError(
            f"{path} has no column {key!r}; it has {', '.join(table.columns)}: set CELL_TYPE_KEY to one of them"
        )
    labels = clean_labels(table[key].reindex(barcodes))
    if labels.isna().all():
        raise ValueError(
            f"{path} labels no cell: all values of {key!r} mean no type; set CELL_TYPE_KEY to another column"
        )
    print(f"{labels.notna().sum():,} of {len(barcodes):,} cells have a label in {path.name}")
    rest = table.reindex(barcodes).drop(columns=[c for c in table if c in (key, "cell_type", "")])
    return rest.assign(cell_type=labels).rename_axis(None)


def clean_labels(labels: pd.Series) -> pd.Series:
    """Labels as text, missing where the text means that there is none (see `NO_LABEL`)."""
    text = labels.astype("object").where(labels.notna(), "").astype(str).str.strip()
    return text.where(~text.str.lower().isin(NO_LABEL), np.nan)


def _label_column(table: pd.DataFrame, path: Path) -> str:
    """Find the column of cell types by its name."""
    for pattern in (r"cell.?type", r"cluster|louvain|leiden|label|annotation|ident|partition"):
        found = [column for column in table if re.search(pattern, column.lower())]
        if len(found) == 1:
            return found[0]
    if table.shape[1] == 1:
        return table.columns[0]
    raise ValueError(
        f"{path}: cannot tell which column holds the cell types; it has {', '.join(table.columns)}: "
        "set CELL_TYPE_KEY to one of them"
    )
