"""Cell types of cells: from a column of `obs`, from a file of labels by barcode, or from the marker genes of clusters (scType).

    score(cell, type) = sum over positive markers of s_g z_g / sqrt(their number) - the same over negative markers

z_g is the z-score of a gene over all cells; s_g its sensitivity, 1 if it is a positive marker of one type, 0 if of all types. A cluster
gets the type with the largest mean score of its cells (Ianevski, Giri and Aittokallio, Nature Communications 13, 1246, 2022).
"""

import re
from pathlib import Path
from typing import NamedTuple

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp

from lib.data.counts import log_normalize, selected_blocks
from lib.data.tables import read_table

BARCODE_COLUMNS = ("cell.barcode", "barcode", "barcodes", "cell", "cell_id", "cellid", "index", "")
NO_LABEL = ("", "nan", "na", "none", "unknown", "unassigned", "unlabelled", "unlabeled", "1_unicorns and artifacts")
# Of scType's database, and ours
MARKER_COLUMNS = [("cellName", "geneSymbolmore1", "geneSymbolmore2"), ("cell_type", "positive", "negative")]
TISSUE_COLUMN = "tissueType"  # of scType's database
MIN_SCORE = 0.25  # mean score of a cluster's cells; below it the cluster has no type (scType)


def clean_labels(labels: pd.Series) -> pd.Series:
    """Labels as text, missing where the text means that there is none (see `NO_LABEL`)."""
    text = labels.astype("object").where(labels.notna(), "").astype(str).str.strip()
    return text.where(~text.str.lower().isin(NO_LABEL), np.nan)


def take_labels(obs: pd.DataFrame, key: str | None) -> pd.DataFrame:
    """Obs with the column cell_type, taken from the column `key`; None takes a column named like it, if there is one."""
    alike = [column for column in obs if re.fullmatch(r"cell[ _.]?types?", str(column).lower())]
    if key is None and not alike:
        return obs
    column = alike[0] if key is None else key
    if column not in obs:
        columns = ", ".join(obs) or "none"
        raise ValueError(f"obs has no column {key!r}; it has {columns}: set CELL_TYPE_KEY or LABELS_FILE")
    labels = clean_labels(obs[column])
    if labels.notna().any():
        return obs.assign(cell_type=labels)
    if key is not None:
        raise ValueError(f"obs[{key!r}] labels no cell: all values mean no type; set CELL_TYPE_KEY to another column")
    print(f"WARNING: obs[{column!r}] labels no cell, so it is left out: stage 1 will cluster the cells")
    return obs.drop(columns=column)


def read_labels(path: Path, barcodes: pd.Index, key: str | None = None) -> pd.DataFrame:
    """Read a table of cell types (csv, tsv): the column `cell_type`, missing where there is no label, and its other columns.

    Its rows are matched by the column that holds most of the `barcodes`; without barcodes, one row for each cell is taken in the order
    of the counts, with a warning. `key` is the column of types; None takes the only one that is named like cell type, cluster, ...
    """
    table = read_table(path)
    if table.empty:
        raise ValueError(f"{path} is empty: it has no rows; expected one for each cell")
    barcode_column = max(table, key=lambda column: table[column].isin(barcodes).mean())
    if table[barcode_column].isin(barcodes).any():
        table = table.drop_duplicates().set_index(barcode_column)
        repeated = table.index[table.index.duplicated() & table.index.isin(barcodes)]
        if len(repeated):
            raise ValueError(f"{path} has two different rows for {len(repeated):,} cells (such as {repeated[0]})")
        table = table[~table.index.duplicated()]
    elif len(table) == len(barcodes):
        print(f"WARNING: {path.name} has no barcode of the counts: its rows are taken in the order of the cells")
        table = table[[name for name in table if name.lower() not in BARCODE_COLUMNS]].set_axis(barcodes)
    else:
        raise ValueError(
            f"{path} labels other cells: none of its {len(table):,} rows has one of the {len(barcodes):,} barcodes "
            f"(such as {barcodes[0]}; its first row is {', '.join(table.iloc[0])}); "
            "expected a column of barcodes, or one row for each cell in the order of the counts"
        )
    key = key or _label_column(table, path)
    if key not in table:
        raise ValueError(f"{path} has no column {key!r}; it has {', '.join(table)}: set CELL_TYPE_KEY to one of them")
    labels = clean_labels(table[key].reindex(barcodes))
    if labels.isna().all():
        raise ValueError(f"{path} labels no cell: {key!r} names no type; set CELL_TYPE_KEY to another column")
    print(f"{labels.notna().sum():,} of {len(barcodes):,} cells have a label in {path.name}")
    rest = table.reindex(barcodes).drop(columns=[key, "cell_type", ""], errors="ignore")
    return rest.assign(cell_type=labels).rename_axis(None)


def _label_column(table: pd.DataFrame, path: Path) -> str:
    """The column of cell types, by its name."""
    for pattern in (r"cell.?type", r"cluster|louvain|leiden|label|annotation|ident|partition", r""):
        columns = [column for column in table if re.search(pattern, column.lower())]
        if len(columns) == 1:
            return columns[0]
    raise ValueError(
        f"{path}: cannot tell which column holds the cell types; it has {', '.join(table)}: set CELL_TYPE_KEY"
    )


class Markers(NamedTuple):
    positive: list[str]
    negative: list[str]


def read_markers(path: Path, tissue: str | None = None) -> dict[str, Markers]:
    """Read the marker genes of each type from a csv, tsv or xlsx with one row for each type.

    The columns are cell_type, positive and (optional) negative, or those of scType's database (ScTypeDB_full.xlsx), whose rows of one
    `tissue` are used. The genes of one field are separated by commas, semicolons, slashes or blanks.
    """
    table = read_table(path)
    columns = [names for names in MARKER_COLUMNS if {*names[:2]} <= {*table}]
    if not columns:
        expected = " or ".join(", ".join(names) for names in MARKER_COLUMNS)
        raise ValueError(f"{path} has the columns {', '.join(table)}; expected {expected}")
    table = table[(table != "").any(axis=1)]
    listed = table[TISSUE_COLUMN].str.strip() if TISSUE_COLUMN in table else pd.Series("", table.index)
    if tissue not in set(listed) and not (tissue is None and listed.nunique() < 2):
        tissues = ", ".join(sorted(set(listed))) or "no tissue"
        raise ValueError(f"{path} has markers of {tissues}; set MARKERS_TISSUE, now {tissue!r}, to one tissue")
    if tissue is not None:
        table = table[listed == tissue]
    name, *signs = columns[0]
    markers: dict[str, Markers] = {}
    for row in table.to_dict("records"):
        fields = [re.split(r"[\s,;/]+", row.get(column, "")) for column in signs]
        genes = Markers(*([gene for gene in field if gene not in ("", "NA")] for field in fields))
        if row[name].strip() in markers or not genes.positive:
            raise ValueError(f"{path}: {row[name]!r} has two rows or no positive marker; expected one row, with some")
        markers[row[name].strip()] = genes
    return markers


def cluster_types(adata: ad.AnnData, rows: np.ndarray, clusters: np.ndarray, markers: dict[str, Markers]) -> np.ndarray:
    """Type of each cell by its cluster's score, (n_cells,), None if no type fits; the scores are printed.

    rows, clusters: cells of the data (ascending), and the cluster of each. Types without a positive marker in the data are left out.
    """
    names = pd.Index(adata.var_names.str.upper())
    absent = [name for name, marker in markers.items() if not names.isin([g.upper() for g in marker.positive]).any()]
    if absent:
        print(f"WARNING: types without a positive marker among the genes of the data, left out: {', '.join(absent)}")
    markers = {name: marker for name, marker in markers.items() if name not in absent}
    if not markers:
        raise ValueError(f"the data have no positive marker of any type; expected genes such as {', '.join(names[:3])}")
    used = {gene.upper() for marker in markers.values() for gene in (*marker.positive, *marker.negative)}
    columns = np.flatnonzero(names.isin(used) & ~names.duplicated())
    values = sp.vstack([log_normalize(block, 1e4)[:, columns] for block, _ in selected_blocks(adata.X, rows)]).toarray()
    scores = pd.DataFrame(cell_scores(values, list(names[columns]), markers), columns=list(markers))
    mean = scores.groupby(clusters).mean()
    best = mean.idxmax(axis=1).where(mean.max(axis=1) >= MIN_SCORE, None).astype(object)
    table = mean.assign(type=best.fillna("none")).rename_axis("cluster").to_string(float_format="{:.2f}".format)
    print(f"clusters by marker genes (mean score of a cell):\n{table}")
    if best.isna().all():
        raise ValueError(f"no cluster has a score of {MIN_SCORE}; expected markers of these cells' types")
    return best.reindex(clusters).to_numpy(dtype=object)


def cell_scores(values: np.ndarray, genes: list[str], markers: dict[str, Markers]) -> np.ndarray:
    """Scores, cells x types, from log-normalised counts (cells x genes); `genes`: their names in capitals."""
    z = (values - values.mean(axis=0)) / np.maximum(values.std(axis=0, ddof=1), 1e-12)
    n_types = pd.Series([gene.upper() for marker in markers.values() for gene in set(marker.positive)]).value_counts()
    if len(markers) > 1:
        z *= (len(markers) - n_types.reindex(genes, fill_value=1).to_numpy()) / (len(markers) - 1)
    scores = np.zeros((len(values), len(markers)))
    for k, marker in enumerate(markers.values()):
        for sign, listed in ((1, marker.positive), (-1, marker.negative)):
            columns = np.flatnonzero(np.isin(genes, [gene.upper() for gene in listed]))
            if len(columns):
                scores[:, k] += sign * z[:, columns].sum(axis=1) / np.sqrt(len(columns))
    return scores
