"""Cell types of clusters by marker genes: scType's score (Ianevski, Giri and Aittokallio, Nature Communications 13, 1246, 2022).

A gene's value in a cell is its z-score over cells, times its sensitivity: 1 if it marks one type, 0 if it marks all. A cell's
score for a type is the sum over the type's positive markers divided by the square root of their number, less the same of its
negative markers. A cluster is of the type whose scores, summed over its cells, are largest; if that sum is below a quarter of
the number of cells, it is of none.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import scipy.sparse as sp

from lib.data.counts import log_normalize, selected_blocks
from lib.data.tables import separator

COLUMNS = (
    ("cellName", "geneSymbolmore1", "geneSymbolmore2"),
    ("cell_type", "positive", "negative"),
)  # scType's, and plain ones
LEAST_SCORE = 0.25  # per cell of a cluster (scType)


class Markers(NamedTuple):
    positive: list[str]
    negative: list[str]


def read_markers(path: Path) -> dict[str, Markers]:
    """Marker genes by type, from a csv or tsv of one row a type: scType's columns, or cell_type, positive and negative (which may lack).

    Genes stand in one field, with commas (or, where commas part the columns, semicolons or blanks) between them.

    Raises
    ------
    ValueError
        If the columns are others, or a type stands twice or has no positive marker.
    """
    table = pd.read_csv(path, sep=separator(path), dtype=str, keep_default_na=False)
    table.columns = table.columns.str.strip()
    columns = [names for names in COLUMNS if set(names[:2]) <= set(table.columns)]
    if not columns:
        raise ValueError(
            f"{path} has the columns {', '.join(table.columns)}; expected {' or '.join(', '.join(names) for names in COLUMNS)}"
        )
    name, positive, negative = columns[0]
    markers = {}
    for row in table.to_dict("records"):
        genes = [
            [gene for gene in row.get(column, "").replace(";", " ").replace(",", " ").split() if gene]
            for column in (positive, negative)
        ]
        if row[name].strip() in markers or not genes[0]:
            raise ValueError(
                f"{path}: {row[name]!r} stands twice or has no positive marker; expected one row a type, with positive markers"
            )
        markers[row[name].strip()] = Markers(*genes)
    return markers


def cluster_types(
    adata, rows: np.ndarray, clusters: np.ndarray, markers: dict[str, Markers]
) -> tuple[np.ndarray, pd.DataFrame]:
    """Type of each cell by its cluster, None where no type fits; and the table that says why.

    Parameters
    ----------
    adata
        Counts, in memory or on disk.
    rows, clusters
        Cells (ascending), and the cluster of each.

    Returns
    -------
    (n_cells,) object; clusters x types, mean score of a cell.

    Raises
    ------
    ValueError
        If the data have none of a type's positive markers.
    """
    names = pd.Index(adata.var_names.str.upper())
    wanted = {gene.upper() for marker in markers.values() for gene in (*marker.positive, *marker.negative)}
    genes = np.flatnonzero(names.isin(wanted) & ~names.duplicated())
    without = [name for name, marker in markers.items() if not any(gene.upper() in names for gene in marker.positive)]
    if without:
        raise ValueError(
            f"the data have no positive marker of {', '.join(without)}; expected one at least: leave these types out of MARKERS_FILE, or check the gene names (such as {', '.join(adata.var_names[:3])})"
        )
    values = sp.vstack([log_normalize(block, 1e4)[:, genes] for block, _ in selected_blocks(adata.X, rows)]).toarray()
    scores = pd.DataFrame(cell_scores(values, list(names[genes]), markers), columns=list(markers))
    mean = scores.groupby(clusters).mean()
    best = mean.idxmax(axis=1).where(mean.max(axis=1) >= LEAST_SCORE, None).astype(object)
    return best.reindex(clusters).to_numpy(dtype=object), mean


def cell_scores(values: np.ndarray, genes: list[str], markers: dict[str, Markers]) -> np.ndarray:
    """Cells x types. values: cells x genes, log-normalised; genes: their names in capitals."""
    z = (values - values.mean(axis=0)) / np.maximum(values.std(axis=0, ddof=1), 1e-12)
    n_marked = pd.Series([gene.upper() for marker in markers.values() for gene in set(marker.positive)]).value_counts()
    sensitivity = [(len(markers) - n_marked.get(gene, 1)) / max(1, len(markers) - 1) for gene in genes]
    z = z * np.where(len(markers) > 1, sensitivity, 1.0)
    place = {gene: i for i, gene in enumerate(genes)}
    scores = np.zeros((len(values), len(markers)))
    for k, marker in enumerate(markers.values()):
        for sign, listed in ((1, marker.positive), (-1, marker.negative)):
            found = sorted({place[gene.upper()] for gene in listed if gene.upper() in place})
            if found:
                scores[:, k] += sign * z[:, found].sum(axis=1) / np.sqrt(len(found))
    return scores
