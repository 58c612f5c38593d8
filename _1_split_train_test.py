"""Stage 1: select the good cells, give every cell its type, and split them into train cells and test cells.

reads   data/counts.h5ad
writes  data/train.h5ad, data/test.h5ad: raw counts of the same genes, obs["cell_type"]; fig/umap_reference.png
run     python _1_split_train_test.py
note    Doublets and the clusters use all cells, before the split, as in the original: with LABELS = "leiden" the types are
        clusters of train and test cells. Genes are selected after the split, by the train cells alone (COUNT_TEST_CELLS).
time    10,000 cells: 2 minutes; 700 cells: 20 seconds
memory  1.3 GB for any number of cells, but for Scrublet: 2.8 GB for parts of 10,000 cells (MAX_CELLS_SCRUBLET), 2.2 GB for 5,000
"""

from itertools import chain
from pathlib import Path
from typing import Any, Literal

import anndata as ad
import numpy as np
import pandas as pd
import scanpy as sc
from sklearn.model_selection import StratifiedGroupKFold

from lib import options
from lib.data.counts import digest, read_counts, select_cells, select_per_type, selected_blocks, write_blocks
from lib.data.embedding import (
    embed,
    labels_of_neighbours,
    lazy,
    leiden,
    principal_components,
    quality_metrics,
    scheduler,
)
from lib.data.labels import cluster_types, read_markers
from lib.evaluation import plots_cells
from lib.options import Count, Fraction, Percent, Positive, Seed, Several, Share, Whole
from lib.run import folder, print_written, user_path

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
REMOVE_DOUBLETS = True  # by Scrublet (original)
BATCH_KEY: str | None = None  # column of obs: capture, lane or sample, scored one by one; without it random parts are
MAX_CELLS_SCRUBLET: Count = 10_000  # scored together, all in memory; more are divided into random parts (ours)

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
SEED: Seed = 123  # of everything random in this stage but Scrublet, which is used with scanpy's defaults

# Clusters and UMAP (the original's)
N_TOP_GENES: Count = 2000  # highly variable genes
N_PCS: Count = 50  # principal components
N_NEIGHBORS: Several = 15  # neighbours of a cell
LEIDEN_RESOLUTION: Positive = 0.7  # higher: more clusters
LEIDEN_ITERATIONS: Count = 2  # of the Leiden algorithm (scanpy's recommendation; paper: 100)
UMAP_MIN_DIST: Share = 0.5  # smallest distance of cells in the UMAP (scanpy's default; paper: 0.25)
MIN_CLUSTER_CELLS: Count = 30  # smaller types are dropped, if the types are clusters
MAX_CELLS_EMBEDDED: Count = 50_000  # clustered and plotted; if types are clusters, others take their neighbours' (ours)

# Computer and folders
DASK_SCHEDULER: str | None = None  # none: this process; local: all processors; or the address of a dask scheduler
DATA_DIR = "data"  # folder
FIG_DIR = "fig"  # folder


def main() -> None:
    if PRESET == "paper":
        options.apply_preset(globals(), paper_preset())
    data, fig = folder(DATA_DIR), folder(FIG_DIR)
    adata = read_counts(data / "counts.h5ad", "_0_download_data.py")
    print(f"{adata.uns['dataset']}: {adata.n_obs:,} cells x {adata.n_vars:,} genes")
    check_constants(adata.obs)
    with scheduler(DASK_SCHEDULER):
        metrics = quality_metrics(adata)
        rows = good_cells(metrics)
        if REMOVE_DOUBLETS:
            rows = without_doublets(adata, rows)
        obs = label(cluster(adata, rows))
        is_test = split(obs)
        usable = ~is_test | obs["cell_type"].notna().to_numpy()  # with SPLIT_BY some test cells may have no type
        usable &= within_type_ranges(metrics, obs, is_test)
        print(f"test cells without a type, and outliers (TYPE_IQR = {TYPE_IQR}): {np.sum(~usable):,} removed")
        obs, is_test = obs[usable], is_test[usable]
        counted = lazy(adata, obs["row"].to_numpy()[~is_test | COUNT_TEST_CELLS])
        genes, _ = sc.pp.filter_genes(counted, min_cells=MIN_CELLS, inplace=False)
        has_counts, _ = sc.pp.filter_cells(lazy(adata, obs["row"].to_numpy())[:, genes], min_genes=1, inplace=False)
    print(f"genes detected in fewer than {MIN_CELLS} cells: {np.sum(~genes):,} removed, {genes.sum():,} left")
    print(f"cells without any count in these genes: {np.sum(~has_counts):,} removed")
    obs, is_test = obs[has_counts], is_test[has_counts]
    print_types(obs["cell_type"][~is_test], obs["cell_type"][is_test])
    embedded = obs["umap_1"].notna().to_numpy()
    umap, figure = obs.loc[embedded, ["umap_1", "umap_2"]].to_numpy(), fig / "umap_reference.png"
    plots_cells.umap_reference(umap, obs["cell_type"][embedded], is_test[embedded], figure)
    written = write_split(adata, obs, is_test, genes, data)
    print_written("stage 1", [*written, figure], f"python _2_make_pseudobulk.py{options.preset_option(PRESET)}")


def paper_preset() -> dict[str, tuple[Any, Any]]:
    """Constants that PRESET changes: default above, value in the paper (its code, where the text does not say)."""
    return {
        "LABELS": ("auto", "leiden"), "COUNT_TEST_CELLS": (False, True), "LEIDEN_ITERATIONS": (2, 100), "UMAP_MIN_DIST": (0.5, 0.25),
    }  # fmt: skip


def check_constants(obs: pd.DataFrame) -> None:
    """Refuse constants that do not fit together or do not fit the data, before any work."""
    if (LABELS == "markers") != (MARKERS_FILE is not None):
        raise ValueError(
            f"LABELS is {LABELS} and MARKERS_FILE is {MARKERS_FILE}; expected LABELS = markers and a file, or neither"
        )
    needed = {f"SPLIT_BY is {SPLIT_BY!r}": SPLIT_BY, f"BATCH_KEY is {BATCH_KEY!r}": BATCH_KEY}
    if LABELS == "author":
        needed["LABELS is author"] = "cell_type"
    for setting, column in needed.items():
        if column is not None and column not in obs:
            columns = ", ".join(obs.columns) or "no columns"
            raise ValueError(f"{setting}, but obs has {columns}; stage 0 adds types with LABELS_FILE or CELL_TYPE_KEY")


def good_cells(metrics: pd.DataFrame) -> np.ndarray:
    """Rows of the cells within the thresholds; each filter prints how many cells it removes."""
    n_counts, n_genes, pct_mt = metrics.to_numpy().T
    keep = n_genes > 0
    print(f"cells without any count: {np.sum(~keep):,} removed, {keep.sum():,} left")
    for name, value, passes in (
        (f"MIN_GENES = {MIN_GENES}", n_genes, MIN_GENES is None or n_genes >= MIN_GENES),
        (f"MAX_GENES = {MAX_GENES}", n_genes, MAX_GENES is None or n_genes < MAX_GENES),
        (f"MAX_COUNTS = {MAX_COUNTS}", n_counts, MAX_COUNTS is None or n_counts < MAX_COUNTS),
        (f"MAX_PCT_MT = {MAX_PCT_MT}", pct_mt, MAX_PCT_MT is None or pct_mt < MAX_PCT_MT),
    ):
        before = keep
        keep = before & passes
        print(f"{name}: {before.sum() - keep.sum():,} cells removed, {keep.sum():,} left")
        if np.mean(passes) < 0.5:
            low, median, high = np.percentile(value, [5, 50, 95])
            print(
                f"WARNING: {name} does not suit these data: {1 - np.mean(passes):.0%} of the cells fail it. Here 90 % of the cells "
                f"lie in {low:,.1f} to {high:,.1f}, median {median:,.1f}; edit the constant, or set it to none"
            )
    if not keep.any():
        raise ValueError(
            "no cell passes the quality thresholds of stage 1; the warnings above say which values suit these data"
        )
    return np.flatnonzero(keep)


def without_doublets(adata: ad.AnnData, rows: np.ndarray) -> np.ndarray:
    """Rows without the doublets that Scrublet calls in each capture (Wolock, Lopez and Klein, Cell Systems 2019)."""
    captures = np.full(adata.n_obs, "the data") if BATCH_KEY is None else adata.obs[BATCH_KEY].astype(str).to_numpy()
    is_doublet = np.zeros(len(rows), dtype=bool)
    for capture, places in pd.Series(rows).groupby(captures[rows]).indices.items():
        if len(places) < 100:
            print(f"doublets: not looked for in {capture}, {len(places)} cells are too few (at least 100)")
            continue
        runs = np.array_split(places, -(-len(places) // 256))  # of consecutive cells, read faster than single ones
        np.random.default_rng(SEED).shuffle(runs)
        for mixed in np.array_split(np.concatenate(runs), -(-len(places) // MAX_CELLS_SCRUBLET)):
            part = np.sort(mixed)
            cells = select_cells(adata, rows[part])
            try:
                sc.pp.scrublet(cells, verbose=False)
            except ValueError as error:
                raise ValueError(f"Scrublet cannot score {capture} ({error}); set REMOVE_DOUBLETS to False") from error
            is_doublet[part] = cells.obs["predicted_doublet"].eq(True)
            if "threshold" not in cells.uns["scrublet"]:
                print(f"doublets: their scores in {capture} have no threshold; none removed")
    print(f"doublets: {is_doublet.sum():,} cells removed, {np.sum(~is_doublet):,} left")
    return rows[~is_doublet]


def cluster(adata: ad.AnnData, rows: np.ndarray) -> pd.DataFrame:
    """The obs of these cells with row, Leiden cluster and UMAP. Beyond MAX_CELLS_EMBEDDED: no UMAP, the neighbours' cluster if needed."""
    obs = adata.obs.iloc[rows].copy()
    embedded = np.sort(np.random.default_rng(SEED).permutation(len(rows))[:MAX_CELLS_EMBEDDED])
    clustered = embedded if by_author(obs) else np.arange(len(rows))
    pcs = principal_components(lazy(adata, rows[clustered]), N_TOP_GENES, N_PCS)
    places = np.searchsorted(clustered, embedded)
    embedding = embed(pcs[places], N_NEIGHBORS, SEED, UMAP_MIN_DIST)
    of_embedded = leiden(embedding, LEIDEN_RESOLUTION, SEED, LEIDEN_ITERATIONS)
    clusters = np.full(len(rows), None, dtype=object)
    clusters[clustered] = labels_of_neighbours(pcs, places, of_embedded, N_NEIGHBORS)
    obs["leiden"] = pd.Categorical(clusters)
    obs[["umap_1", "umap_2"]] = np.nan
    obs.iloc[embedded, -2:] = embedding.obsm["X_umap"]
    obs["row"] = rows
    if LABELS == "markers":
        assert MARKERS_FILE is not None
        obs["marker_type"] = cluster_types(adata, rows, clusters, read_markers(user_path(MARKERS_FILE), MARKERS_TISSUE))
    return obs


def by_author(obs: pd.DataFrame) -> bool:
    return LABELS == "author" or (LABELS == "auto" and "cell_type" in obs)


def label(obs: pd.DataFrame) -> pd.DataFrame:
    """Set obs["cell_type"] (categorical) as LABELS says; drop cells as UNLABELLED, SMALL_TYPES and MIN_CLUSTER_CELLS say."""
    if by_author(obs):
        origin, cell_type, smallest = "labels of the author", obs["cell_type"].astype(object), MIN_TYPE_CELLS
    elif LABELS == "markers":
        origin, cell_type, smallest = "Leiden clusters by marker genes", obs["marker_type"], MIN_CLUSTER_CELLS
    else:
        clusters = ("cluster " + obs["leiden"].astype(str)).astype(object)
        origin, cell_type, smallest = "Leiden clusters", clusters, MIN_CLUSTER_CELLS
    sizes = cell_type.value_counts()
    small = sizes[sizes < smallest]
    listed = ", ".join(f"{name} ({size})" for name, size in small.items())
    if len(small) and by_author(obs) and SMALL_TYPES == "error":
        raise ValueError(
            f"too few cells to split for {len(small)} of {len(sizes)} types: {listed}; expected at least {smallest} after quality "
            "control. Set SMALL_TYPES to drop to leave these types out, or merge their labels"
        )
    types = sorted(sizes.index.difference(small.index), key=natural)
    if len(types) < 2:
        raise ValueError(
            f"too few cell types are left ({', '.join(types) or 'none'}); expected at least 2: give labels, or raise LEIDEN_RESOLUTION"
        )
    has_label, is_small = cell_type.notna().to_numpy(), cell_type.isin(small.index).to_numpy()
    print(f"cell types: {origin}; too small: {listed or 'none'}, {is_small.sum():,} cells removed")
    if not has_label.all():
        print(f"cells without a label (UNLABELLED = {UNLABELLED}): {np.sum(~has_label):,}")
    keep = ~is_small & (has_label | (UNLABELLED == "keep"))
    if "cell_type" in obs and not by_author(obs):
        obs = obs.rename(columns={"cell_type": "author_cell_type"})
    return obs[keep].assign(cell_type=pd.Categorical(cell_type[keep], categories=types))


def natural(name: str) -> tuple[str, int, str]:
    """Sorts cluster 10 after cluster 9."""
    head, _, tail = name.rpartition(" ")
    return (head, int(tail), "") if tail.isdigit() else (name, -1, tail)


def split(obs: pd.DataFrame) -> np.ndarray:
    """Mask of the test cells: a fraction of each type; with SPLIT_BY whole groups, with proportions of the types as even as possible."""
    cell_type_idx = obs["cell_type"].cat.codes.to_numpy()
    if SPLIT_BY is None:
        return select_per_type(cell_type_idx, TEST_FRACTION, np.random.default_rng(SEED))
    groups = obs[SPLIT_BY].astype(str).to_numpy()
    n_folds, names = max(2, round(1 / TEST_FRACTION)), np.unique(groups)
    if len(names) < n_folds:
        raise ValueError(
            f"SPLIT_BY = {SPLIT_BY!r} has {len(names)} values ({', '.join(names)}), expected at least {n_folds} for a test fraction of "
            f"{TEST_FRACTION}; raise TEST_FRACTION"
        )
    folds = StratifiedGroupKFold(n_folds, shuffle=True, random_state=SEED).split(cell_type_idx, cell_type_idx, groups)
    test_cells = min((fold for _, fold in folds), key=lambda fold: abs(len(fold) / len(groups) - TEST_FRACTION))
    is_test = np.isin(np.arange(len(groups)), test_cells)
    print(
        f"test: {', '.join(np.unique(groups[is_test]))}; train: {', '.join(np.unique(groups[~is_test]))} ({SPLIT_BY})"
    )
    absent = set(obs["cell_type"].cat.categories) - set(obs["cell_type"][~is_test].dropna())
    if absent:
        raise ValueError(
            f"the split by {SPLIT_BY} leaves no train cell of {', '.join(sorted(absent))}; set another SEED, or leave these types out"
        )
    return is_test


def within_type_ranges(metrics: pd.DataFrame, obs: pd.DataFrame, is_test: np.ndarray) -> np.ndarray:
    """Mask without outliers of a type: fewer detected genes than the first quartile of its train cells - TYPE_IQR interquartile
    ranges, or more genes or a larger percentage of mitochondrial counts than the third quartile + TYPE_IQR interquartile ranges.
    """
    keep = np.ones(len(obs), dtype=bool)
    if TYPE_IQR is None:
        return keep
    codes = obs["cell_type"].cat.codes.to_numpy()
    values = metrics.iloc[obs["row"]][["n_genes_by_counts", "pct_counts_mt"]].to_numpy()
    for k in np.unique(codes[codes >= 0]):
        first, third = np.percentile(values[(codes == k) & ~is_test], [25, 75], axis=0)
        margin = TYPE_IQR * (third - first)
        outlying = (values > third + margin).any(axis=1) | (values[:, 0] < (first - margin)[0])
        keep &= ~(outlying & (codes == k))
    return keep


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
