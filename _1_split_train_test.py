"""Stage 1: select the good cells, give every cell its type, and split them into train cells and test cells.

reads   data/counts.h5ad
writes  data/train.h5ad, data/test.h5ad: raw counts of the same genes, obs["cell_type"]; fig/umap_reference.png
run     python _1_split_train_test.py
note    Doublets and the clusters use all cells, before the split, as in the original: with LABELS = "leiden" the types are
        clusters of train and test cells. Genes are selected after the split, by the train cells alone (COUNT_TEST_CELLS).
time    10,000 cells: 2 minutes; 700 cells: 20 seconds
memory  1.3 GB for 200,000 cells, and for 1.3 million: the counts are read in blocks
"""

from itertools import chain
from pathlib import Path
from typing import Any, Literal

import anndata as ad
import numpy as np
import pandas as pd
from sklearn.model_selection import StratifiedGroupKFold

from lib import options
from lib.data import blockwise
from lib.data.counts import (
    digest,
    read_counts,
    select_per_type,
    selected_blocks,
    write_blocks,
)
from lib.data.doublets import doublet_scores
from lib.data.embedding import embed, labels_of_neighbours, lazy, leiden, principal_components
from lib.data.markers import MIN_SCORE, cluster_types, read_markers, with_genes_in
from lib.evaluation import plots_cells
from lib.files import folder, print_written, user_path
from lib.ranges import Count, Fraction, Percent, Positive, Seed, Several, Share, Whole

# Preset
PRESET: Literal["ours", "paper"] = "ours"  # paper: the settings of the paper, except constants that you set yourself

# Quality control (the original's thresholds; none switches one off)
MIN_GENES: Count | None = 200  # a cell has at least so many detected genes
MAX_GENES: Count | None = 2500  # and fewer than this
MAX_COUNTS: Count | None = 6000  # a cell has fewer counts than this
MAX_PCT_MT: Percent | None = 15.0  # a cell has less than this percentage of its counts in mitochondrial genes (MT-)
TYPE_IQR: Positive | None = None  # cells outside quartiles -+ this x IQR of their type (Generative genomics: 1.5)
MIN_CELLS: Whole = 3  # a gene is detected in at least so many train cells
COUNT_TEST_CELLS = False  # MIN_CELLS counts test cells as well (paper: True): the test cells then select genes too

# Doublets
REMOVE_DOUBLETS = True  # by Scrublet's method (original)
MAX_CELLS_SCRUBLET: Count = 10_000  # at random, whose doublets are simulated; all cells are compared with these (ours)

# Cell types
LABELS: Literal["auto", "author", "leiden", "markers"] = "auto"  # auto: author's labels if any, else Leiden clusters
MARKERS_FILE: str | None = None  # for markers: a table of cell_type, positive, negative genes, or scType's database
MARKERS_TISSUE: str | None = None  # rows of MARKERS_FILE to use, if it is scType's database, such as "Immune system"
UNLABELLED: Literal["drop", "keep"] = "drop"  # cells without an author's label; keep: as train cells without a type
MIN_TYPE_CELLS: Count = 4  # an author's type with fewer cells cannot be split
SMALL_TYPES: Literal["error", "drop"] = "error"  # what to do with the cells of such a type

# Split (the original's)
TEST_FRACTION: Fraction = 0.25  # of the cells of each type
SPLIT_BY: str | None = None  # a column of obs, such as donor; train and test cells then share none of its values
SEED: Seed = 123  # of everything random in this stage

# Clusters and UMAP (the original's)
N_TOP_GENES: Count = 2000  # highly variable genes
N_PCS: Count = 50  # principal components
N_NEIGHBORS: Several = 15  # neighbours of a cell
LEIDEN_RESOLUTION: Positive = 0.7  # higher: more clusters
LEIDEN_ITERATIONS: Count = 2  # of the Leiden algorithm (scanpy's recommendation; paper: 100)
UMAP_MIN_DIST: Share = 0.5  # smallest distance of cells in the UMAP (scanpy's default; paper: 0.25)
MIN_CLUSTER_CELLS: Count = 30  # smaller types are dropped, if the types are clusters
MAX_CELLS_EMBEDDED: Count = 50_000  # clustered and plotted; if types are clusters, others take their neighbours' (ours)

# Computer
DASK_SCHEDULER: str | None = None  # none: this process; local: all processors; or the address of a dask scheduler

# Where things are
DATA_DIR = "data"  # folder
FIG_DIR = "fig"  # folder


def main() -> None:
    if PRESET == "paper":
        options.apply_preset(globals(), paper_preset())
    data, fig = folder(DATA_DIR), folder(FIG_DIR)
    adata = read_counts(data / "counts.h5ad", "_0_download_data.py")
    print(f"{adata.uns['dataset']}: {adata.n_obs:,} cells x {adata.n_vars:,} genes")
    check_constants(adata.obs)
    with blockwise.scheduler(DASK_SCHEDULER):
        obs, is_test, genes = select_cells_and_genes(adata)
    print_types(obs["cell_type"][~is_test], obs["cell_type"][is_test])

    umap = obs[["umap_1", "umap_2"]].to_numpy()
    embedded = ~np.isnan(umap[:, 0])
    plots_cells.umap_reference(
        umap[embedded], obs["cell_type"][embedded], is_test[embedded], fig / "umap_reference.png"
    )
    written = write_split(adata, obs, is_test, genes, data)
    print_written(
        "stage 1",
        [*written, fig / "umap_reference.png"],
        f"python _2_make_pseudobulk.py{options.preset_option(PRESET)}",
    )


def select_cells_and_genes(adata: ad.AnnData) -> tuple[pd.DataFrame, np.ndarray, np.ndarray]:
    """The obs of the cells that are used, with their type and row; masks of the test cells among them, and of the genes that are used."""
    rows = good_cells(adata)
    if REMOVE_DOUBLETS:
        rows = without_doublets(adata, rows)
    obs = label(cluster(adata, rows))

    is_test = split(obs)
    usable = ~is_test | obs["cell_type"].notna().to_numpy()
    if not usable.all():  # with SPLIT_BY: test cells need a type, and train cells must not be of the test donors
        print(f"cells without a type among the test cells' {SPLIT_BY}: {np.sum(~usable):,} removed")
        obs, is_test = obs[usable], is_test[usable]
    if TYPE_IQR is not None:
        typical = within_type_ranges(*quality(adata)[1:], obs, is_test)
        obs, is_test = obs[typical], is_test[typical]
    print(f"test cells: {is_test.sum():,} of {len(is_test):,} ({is_test.mean():.0%})")
    genes = blockwise.n_cells_of_genes(adata, obs["row"].to_numpy()[~is_test | COUNT_TEST_CELLS]) >= MIN_CELLS
    counted = "" if COUNT_TEST_CELLS else "train "
    print(f"genes detected in fewer than {MIN_CELLS} {counted}cells: {np.sum(~genes):,} removed, {genes.sum():,} left")
    has_counts = blockwise.n_genes_of_cells(adata, obs["row"].to_numpy(), genes) > 0
    if not has_counts.all():
        print(f"cells without any count in these genes: {np.sum(~has_counts):,} removed")
        obs, is_test = obs[has_counts], is_test[has_counts]
    return obs, is_test, genes


def paper_preset() -> dict[str, tuple[Any, Any]]:
    """Constants that PRESET changes: default above, value in the paper (its code, where the text does not say)."""
    return {
        "LABELS": ("auto", "leiden"), "COUNT_TEST_CELLS": (False, True), "LEIDEN_ITERATIONS": (2, 100), "UMAP_MIN_DIST": (0.5, 0.25),
    }  # fmt: skip


def check_constants(obs: pd.DataFrame) -> None:
    """Refuse constants that do not fit together or do not fit the data, before any work."""
    if LABELS == "author" and "cell_type" not in obs:
        raise ValueError(
            "LABELS is author, but data/counts.h5ad has no obs['cell_type']; "
            "give stage 0 the labels (LABELS_FILE, CELL_TYPE_KEY) or set LABELS to leiden"
        )
    if (LABELS == "markers") != (MARKERS_FILE is not None):
        raise ValueError(
            f"LABELS is {LABELS} and MARKERS_FILE is {MARKERS_FILE}; expected LABELS = markers and a file, or neither"
        )
    if SPLIT_BY is not None and SPLIT_BY not in obs:
        raise ValueError(
            f"SPLIT_BY is {SPLIT_BY!r}, but obs has {', '.join(obs.columns) or 'no columns'}; set it to one of them or to none"
        )


# --- quality control


def good_cells(adata: ad.AnnData) -> np.ndarray:
    """Rows of the cells within the thresholds; each filter prints how many cells it removes.

    Raises
    ------
    ValueError
        If no cell is left.
    """
    n_counts, n_genes, pct_mt = quality(adata)
    keep = np.ones(adata.n_obs, dtype=bool)
    for name, value, at_least, below in (
        ("cells without any count", n_genes, 1, None),
        (f"MIN_GENES = {MIN_GENES}", n_genes, MIN_GENES, None),
        (f"MAX_GENES = {MAX_GENES}", n_genes, None, MAX_GENES),
        (f"MAX_COUNTS = {MAX_COUNTS}", n_counts, None, MAX_COUNTS),
        (f"MAX_PCT_MT = {MAX_PCT_MT}", pct_mt, None, MAX_PCT_MT),
    ):
        passes = np.ones_like(keep)
        if at_least is not None:
            passes = value >= at_least
        elif below is not None:
            passes = value < below
        removed = keep & ~passes
        if removed.any() or "=" in name:
            print(f"{name}: {removed.sum():,} cells removed, {(keep & passes).sum():,} left")
        if np.mean(~passes) > 0.5:
            low, median, high = np.percentile(value, [5, 50, 95])
            print(
                f"WARNING: {name} does not suit these data: {np.mean(~passes):.0%} of the cells fail it. Here 90 % of the cells "
                f"lie in {low:,.1f} to {high:,.1f}, median {median:,.1f}; edit the constant, or set it to none"
            )
        keep &= passes
    if not keep.any():
        raise ValueError(
            f"no cell passes the quality thresholds of stage 1: all {adata.n_obs:,} are removed; "
            "see the warnings above for values that suit these data"
        )
    return np.flatnonzero(keep)


def quality(adata: ad.AnnData) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Counts, detected genes and percentage of mitochondrial counts of each cell."""
    mitochondrial = adata.var_names.str.upper().str.startswith("MT-")
    if MAX_PCT_MT is not None and not mitochondrial.any():
        print("no gene is called MT-...: cells are not filtered by their mitochondrial counts")
    return blockwise.quality(adata, mitochondrial)


def within_type_ranges(n_genes: np.ndarray, pct_mt: np.ndarray, obs: pd.DataFrame, is_test: np.ndarray) -> np.ndarray:
    """Mask of the cells that are no outliers of their type; cells without a type stay.

    An outlier has fewer detected genes than the first quartile - TYPE_IQR interquartile ranges, or more genes or a larger percentage
    of mitochondrial counts than the third quartile + TYPE_IQR interquartile ranges. Quartiles are those of the type's train cells.

    Parameters
    ----------
    n_genes, pct_mt
        Of all cells of the data set (`quality`); `obs["row"]` says which of them each cell is.
    """
    assert TYPE_IQR is not None
    keep = np.ones(len(obs), dtype=bool)
    codes = obs["cell_type"].cat.codes.to_numpy()
    for values, has_lower_limit in ((n_genes[obs["row"]], True), (pct_mt[obs["row"]], False)):
        for k in np.unique(codes[codes >= 0]):
            first, third = np.percentile(values[(codes == k) & ~is_test], [25, 75])
            margin = TYPE_IQR * (third - first)
            outlying = (values > third + margin) | (has_lower_limit & (values < first - margin))
            keep &= ~(outlying & (codes == k))
    print(f"TYPE_IQR = {TYPE_IQR}: {np.sum(~keep):,} cells removed, {keep.sum():,} left")
    return keep


def without_doublets(adata: ad.AnnData, rows: np.ndarray) -> np.ndarray:
    """Rows without the doublets that Scrublet's method calls (`lib.data.doublets`)."""
    if len(rows) < 100:
        print(f"doublets: not looked for, {len(rows)} cells are too few (at least 100)")
        return rows
    scores, threshold = doublet_scores(adata, rows, MAX_CELLS_SCRUBLET, SEED)
    if threshold is None:
        print("doublets: their scores have no threshold between doublets and single cells; none removed")
        return rows
    is_doublet = scores > threshold
    print(f"doublets: {is_doublet.sum():,} cells removed, {(~is_doublet).sum():,} left")
    return rows[~is_doublet]


# --- cell types


def cluster(adata: ad.AnnData, rows: np.ndarray) -> pd.DataFrame:
    """The obs of these cells with their Leiden cluster, their UMAP and their row.

    UMAP is missing above MAX_CELLS_EMBEDDED cells. So is the cluster where the types are the author's; otherwise the other cells take
    that of their neighbours.
    """
    obs = adata.obs.iloc[rows].copy()
    embedded = np.sort(np.random.default_rng(SEED).permutation(len(rows))[:MAX_CELLS_EMBEDDED])
    clustered = embedded if by_author(obs) else np.arange(len(rows))
    pcs = principal_components(lazy(adata, rows[clustered]), N_TOP_GENES, N_PCS)
    places = np.searchsorted(clustered, embedded)
    embedding = embed(pcs[places], N_NEIGHBORS, SEED, UMAP_MIN_DIST)
    found = leiden(embedding, LEIDEN_RESOLUTION, SEED, LEIDEN_ITERATIONS)
    clusters = np.full(len(rows), None, dtype=object)
    clusters[clustered] = labels_of_neighbours(pcs, places, found, N_NEIGHBORS)
    obs["leiden"] = pd.Categorical(clusters)
    obs[["umap_1", "umap_2"]] = np.nan
    obs.iloc[embedded, -2:] = embedding.obsm["X_umap"]
    obs["row"] = rows
    if LABELS == "markers":
        obs["marker_type"] = types_by_markers(adata, rows, clusters)
    return obs


def by_author(obs: pd.DataFrame) -> bool:
    return LABELS == "author" or (LABELS == "auto" and "cell_type" in obs)


def types_by_markers(adata: ad.AnnData, rows: np.ndarray, clusters: np.ndarray) -> np.ndarray:
    """Type of each cell by its cluster's scType score; None if no type fits.

    Raises
    ------
    ValueError
        If no cluster fits any type.
    """
    assert MARKERS_FILE is not None
    markers = read_markers(user_path(MARKERS_FILE), MARKERS_TISSUE)
    if MARKERS_TISSUE is not None:  # a database, not the user's own choice of types
        markers = with_genes_in(markers, adata.var_names)
    types, scores = cluster_types(adata, rows, clusters, markers)
    scores.insert(0, "type", pd.Series(types, clusters).groupby(level=0).first().reindex(scores.index).fillna("none"))
    print(
        "clusters by marker genes (mean score of a cell):\n"
        + scores.rename_axis("cluster").to_string(float_format="{:.2f}".format)
    )
    if pd.isna(types).all():
        raise ValueError(
            f"no cluster fits a type of {MARKERS_FILE}: all scores are below {MIN_SCORE}; expected markers of these cells' types"
        )
    return types


def label(obs: pd.DataFrame) -> pd.DataFrame:
    """Set obs["cell_type"] (categorical) as LABELS says; drop cells as UNLABELLED, SMALL_TYPES and MIN_CLUSTER_CELLS say.

    Raises
    ------
    ValueError
        If a type is too small, or fewer than two are left.
    """
    cell_type = choose_types(obs)
    keep = np.ones(len(obs), dtype=bool)
    is_unlabelled = cell_type.isna().to_numpy()
    if is_unlabelled.any():
        keep = ~is_unlabelled if UNLABELLED == "drop" else keep
        done = "removed" if UNLABELLED == "drop" else "kept for training"
        print(f"cells without a label: {is_unlabelled.sum():,} {done}, {keep.sum():,} left")
    small = small_types(cell_type, by_author(obs))
    if len(small):
        keep &= ~cell_type.isin(small.index).to_numpy()
        print(
            f"{'types' if by_author(obs) else 'clusters'} that are too small: {sizes_as_text(small)}; "
            f"{small.sum():,} cells removed, {keep.sum():,} left"
        )
    types = pd.Index(cell_type.dropna().unique()).difference(small.index)
    if len(types) < 2:
        raise ValueError(
            f"too few cell types are left ({', '.join(types) or 'none'}); expected at least 2: give labels, or raise LEIDEN_RESOLUTION"
        )
    labelled = obs[keep].copy()
    if not by_author(obs) and "cell_type" in labelled:
        labelled["author_cell_type"] = labelled["cell_type"]
    labelled["cell_type"] = pd.Categorical(cell_type[keep], categories=sorted(types, key=_natural))
    return labelled


def choose_types(obs: pd.DataFrame) -> pd.Series:
    """Type of each cell as text, missing where there is none: the author's, by marker genes, or the Leiden cluster."""
    if by_author(obs):
        print("cell types: labels of the author")
        cell_type = obs["cell_type"]
    elif LABELS == "markers":
        print("cell types: Leiden clusters by marker genes")
        cell_type = obs["marker_type"]
    else:
        print("cell types: Leiden clusters")
        cell_type = "cluster " + obs["leiden"].astype(str)
    return cell_type.astype("object")


def small_types(cell_type: pd.Series, are_the_authors: bool) -> pd.Series:
    """Sizes of the types with too few cells.

    Raises
    ------
    ValueError
        If there are any, SMALL_TYPES is error and the types are the author's.
    """
    sizes = cell_type.value_counts()
    small = sizes[sizes < (MIN_TYPE_CELLS if are_the_authors else MIN_CLUSTER_CELLS)]
    if len(small) and are_the_authors and SMALL_TYPES == "error":
        raise ValueError(
            f"too few cells to split for {len(small)} of {len(sizes)} types: {sizes_as_text(small)}; "
            f"expected at least {MIN_TYPE_CELLS} after quality control. "
            "Set SMALL_TYPES to drop to leave these types out, or merge their labels"
        )
    return small


def sizes_as_text(sizes: pd.Series) -> str:
    return ", ".join(f"{name} ({size})" for name, size in sizes.items())


def _natural(name: str) -> tuple[str, int, str]:
    """Sorts cluster 10 after cluster 9."""
    head, _, tail = name.rpartition(" ")
    return (head, int(tail), "") if tail.isdigit() else (name, -1, tail)


# --- split


def split(obs: pd.DataFrame) -> np.ndarray:
    """Mask of the test cells: a fraction of each type, or all cells of some values of SPLIT_BY."""
    cell_type_idx = obs["cell_type"].cat.codes.to_numpy()
    if SPLIT_BY is None:
        return select_per_type(cell_type_idx, TEST_FRACTION, np.random.default_rng(SEED))
    return split_by_group(obs["cell_type"], obs[SPLIT_BY].astype(str).to_numpy())


def split_by_group(cell_type: pd.Series, groups: np.ndarray) -> np.ndarray:
    """Mask of the test cells: whole groups, with proportions of the types as even as possible.

    Raises
    ------
    ValueError
        If there are too few groups, or a type has no train cell.
    """
    cell_type_idx = cell_type.cat.codes.to_numpy()
    n_folds = max(2, round(1 / TEST_FRACTION))
    if len(np.unique(groups)) < n_folds:
        raise ValueError(
            f"SPLIT_BY = {SPLIT_BY!r} has {len(np.unique(groups))} values ({', '.join(np.unique(groups))}), "
            f"expected at least {n_folds} for a test fraction of {TEST_FRACTION}; raise TEST_FRACTION"
        )
    folds = StratifiedGroupKFold(n_folds, shuffle=True, random_state=SEED).split(cell_type_idx, cell_type_idx, groups)
    test_cells = min((fold for _, fold in folds), key=lambda fold: abs(len(fold) / len(groups) - TEST_FRACTION))
    is_test = np.zeros(len(groups), dtype=bool)
    is_test[test_cells] = True
    in_test, in_train = (", ".join(sorted(set(groups[mask]))) for mask in (is_test, ~is_test))
    print(f"test: {in_test}; train: {in_train} ({SPLIT_BY})")
    absent = set(cell_type.cat.categories) - set(cell_type[~is_test].dropna())
    if absent:
        raise ValueError(
            f"the split by {SPLIT_BY} leaves no train cell of {', '.join(sorted(absent))}; set another SEED, or leave these types out"
        )
    return is_test


def print_types(train: pd.Series, test: pd.Series) -> None:
    """Print the number of train and test cells of each type."""
    table = pd.DataFrame({"train": train.value_counts(sort=False), "test": test.value_counts(sort=False)})
    if (table["test"] == 0).any():
        print(f"WARNING: no test cell of {', '.join(table.index[table['test'] == 0])}")
    if train.isna().any():
        table.loc["without a type"] = [train.isna().sum(), 0]
    table.loc["all"] = table.sum()
    print(table.rename_axis("cells").to_string())


def write_split(adata: ad.AnnData, obs: pd.DataFrame, is_test: np.ndarray, genes: np.ndarray, data: Path) -> list[Path]:
    """Write train.h5ad and test.h5ad, block by block, with the fingerprint of this split in uns["split_id"]."""
    uns = {key: adata.uns[key] for key in ("dataset", "source", "counts_id") if key in adata.uns}
    names = chain([uns["counts_id"]], adata.var_names[genes], obs.index, map(str, obs["cell_type"]))
    uns["split_id"] = digest(names, is_test)
    paths = [data / "train.h5ad", data / "test.h5ad"]
    for path, part in zip(paths, (obs[~is_test], obs[is_test])):
        cells = ad.AnnData(obs=part.drop(columns=["row", "umap_1", "umap_2"]), var=adata.var[genes].copy(), uns=uns)
        blocks = (block[:, genes] for block, _ in selected_blocks(adata.X, part["row"].to_numpy()))
        write_blocks(cells, blocks, path)
    return paths


if __name__ == "__main__":
    options.run(globals())
