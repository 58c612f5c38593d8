"""Name clusters by marker genes: scType's score (Ianevski, Giri and Aittokallio, Nature Communications 13, 1246, 2022).

    score(cell, type) = sum over positive markers of s_g z_g / sqrt(their number) - the same over negative markers

z_g is the z-score of a gene over all cells. s_g is its sensitivity: 1 if it is a positive marker of one type, 0 if of all
types. A cluster gets the type with the largest mean score of its cells, or none if that score is below 0.25.
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

TISSUE_COLUMN = "tissueType"  # of scType's database
SCTYPE_COLUMNS = ("cellName", "geneSymbolmore1", "geneSymbolmore2")
COLUMNS = ("cell_type", "positive", "negative")
MIN_SCORE = 0.25  # mean score of a cluster's cells (scType)


class Markers(NamedTuple):
    positive: list[str]
    negative: list[str]


def read_markers(path: Path, tissue: str | None = None) -> dict[str, Markers]:
    """Read the marker genes of each type from a csv, tsv or xlsx with one row for each type.

    The columns are cell_type, positive and (optional) negative, or those of scType's database (ScTypeDB_full.xlsx). The genes of one
    field are separated by commas, semicolons, slashes or blanks.

    Parameters
    ----------
    tissue
        The rows to use, by the column tissueType; None for a table of one tissue, or without this column.

    Raises
    ------
    ValueError
        If the columns are others, the tissue is not in the table or must be given, or a type has two rows or no positive marker.
    """
    table = read_table(path)
    columns = [names for names in (SCTYPE_COLUMNS, COLUMNS) if set(names[:2]) <= set(table.columns)]
    if not columns:
        raise ValueError(
            f"{path} has the columns {', '.join(table.columns)}; "
            f"expected {', '.join(SCTYPE_COLUMNS)} or {', '.join(COLUMNS)}"
        )
    name, positive, negative = columns[0]
    markers: dict[str, Markers] = {}
    for row in _of_tissue(table, tissue, path).to_dict("records"):
        genes = [
            [gene for gene in re.split(r"[\s,;/]+", row.get(column, "")) if gene and gene != "NA"]
            for column in (positive, negative)
        ]
        if row[name].strip() in markers or not genes[0]:
            raise ValueError(
                f"{path}: {row[name]!r} has two rows or no positive marker; expected one row for each type, with positive markers"
            )
        markers[row[name].strip()] = Markers(*genes)
    return markers


def _of_tissue(table: pd.DataFrame, tissue: str | None, path: Path) -> pd.DataFrame:
    """The rows of a tissue, without empty ones."""
    table = table[(table != "").any(axis=1)]
    listed = table[TISSUE_COLUMN].str.strip() if TISSUE_COLUMN in table else pd.Series("", table.index)
    tissues = ", ".join(sorted(set(listed))) or "none"
    if tissue is None and listed.nunique() > 1:
        raise ValueError(f"{path} has the markers of several tissues; set MARKERS_TISSUE to one of {tissues}")
    if tissue is not None and not (listed == tissue).any():
        raise ValueError(
            f"{path} has no markers of the tissue {tissue!r}; expected MARKERS_TISSUE to be one of its tissues: {tissues}"
        )
    return table if tissue is None else table[listed == tissue]


def with_genes_in(markers: dict[str, Markers], gene_names: pd.Index) -> dict[str, Markers]:
    """The types that have a positive marker among these genes; a message names the others."""
    known = set(gene_names.str.upper())
    found = {name: marker for name, marker in markers.items() if known & {gene.upper() for gene in marker.positive}}
    without = [name for name in markers if name not in found]
    if without:
        print(f"types without a positive marker among the genes of the data, left out: {', '.join(without)}")
    return found


def cluster_types(
    adata: ad.AnnData, rows: np.ndarray, clusters: np.ndarray, markers: dict[str, Markers]
) -> tuple[np.ndarray, pd.DataFrame]:
    """Type of each cell by its cluster's score, None if no type fits; and the table of scores.

    Parameters
    ----------
    adata
        Counts, in memory or on disk.
    rows, clusters
        Cells (ascending), and the cluster of each.

    Returns
    -------
    (n_cells,) object; clusters x types, mean score of the cells.

    Raises
    ------
    ValueError
        If the data have none of the positive markers of a type.
    """
    names = pd.Index(adata.var_names.str.upper())
    wanted = {gene.upper() for marker in markers.values() for gene in (*marker.positive, *marker.negative)}
    genes = np.flatnonzero(names.isin(wanted) & ~names.duplicated())
    without = [name for name, marker in markers.items() if not any(gene.upper() in names for gene in marker.positive)]
    if without:
        raise ValueError(
            f"the data have no positive marker of {', '.join(without)}; expected at least one: leave these types out of MARKERS_FILE, "
            f"or check the gene names (such as {', '.join(adata.var_names[:3])})"
        )
    values = sp.vstack([log_normalize(block, 1e4)[:, genes] for block, _ in selected_blocks(adata.X, rows)]).toarray()
    scores = pd.DataFrame(cell_scores(values, list(names[genes]), markers), columns=list(markers))
    mean = scores.groupby(clusters).mean()
    best = mean.idxmax(axis=1).where(mean.max(axis=1) >= MIN_SCORE, None).astype(object)
    return best.reindex(clusters).to_numpy(dtype=object), mean


def cell_scores(values: np.ndarray, genes: list[str], markers: dict[str, Markers]) -> np.ndarray:
    """Scores, cells x types, from log-normalised counts (cells x genes); `genes`: their names in capitals."""
    z = (values - values.mean(axis=0)) / np.maximum(values.std(axis=0, ddof=1), 1e-12)
    n_marked = pd.Series([gene.upper() for marker in markers.values() for gene in set(marker.positive)]).value_counts()
    sensitivity = [(len(markers) - n_marked.get(gene, 1)) / max(1, len(markers) - 1) for gene in genes]
    z = z * np.where(len(markers) > 1, sensitivity, 1.0)
    column = {gene: i for i, gene in enumerate(genes)}
    scores = np.zeros((len(values), len(markers)))
    for k, marker in enumerate(markers.values()):
        for sign, listed in ((1, marker.positive), (-1, marker.negative)):
            found = sorted({column[gene.upper()] for gene in listed if gene.upper() in column})
            if found:
                scores[:, k] += sign * z[:, found].sum(axis=1) / np.sqrt(len(found))
    return scores
