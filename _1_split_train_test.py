"""Stage 1: keep the good cells, give every cell its type, and part them into train and test.

reads   data/counts.h5ad
writes  data/train.h5ad, data/test.h5ad: raw counts over the same genes, obs["cell_type"]; fig/umap_reference.png
run     python _1_split_train_test.py
note    Scrublet and the clusters see all cells, before the split, as in the original: with LABELS = "leiden" the types are the
        clusters of all cells. Genes are chosen after the split, by train cells alone.
time    10,000 cells: 2 minutes; 700 cells: 20 seconds
memory  3 GB for 200,000 cells, 2.5 GB for 50,000: the counts are read in blocks
"""

from typing import Literal

import anndata as ad
import numpy as np
import pandas as pd
import scanpy as sc
from sklearn.model_selection import StratifiedGroupKFold

from lib import options
from lib.data.counts import (
    digest,
    read_counts,
    row_blocks,
    select_cells,
    select_per_type,
    selected_blocks,
    write_blocks,
)
from lib.data.embedding import embed, labels_of_neighbours, lazy, principal_components
from lib.data.markers import cluster_types, read_markers
from lib.evaluation import plots_cells
from lib.files import folder, print_written, user_path

# Quality control (the original's thresholds; none switches one off)
MIN_GENES: int | None = 200  # genes detected in a cell, at least
MAX_GENES: int | None = 2500  # genes detected in a cell, below
MAX_COUNTS: int | None = 6000  # counts of a cell, below
MAX_PCT_MT: float | None = 15.0  # percent of a cell's counts from mitochondrial genes (MT-), below
MIN_CELLS = 3  # train cells that must hold a gene (the original counted all cells, test cells too)
REMOVE_DOUBLETS = True  # by Scrublet
MAX_CELLS_SCRUBLET = 6_000  # that Scrublet sees at once, about one capture; of more cells, random parts of equal size (ours; 20,000 at once take 4 GB)

# Clusters (the original's)
N_TOP_GENES = 2000  # highly variable genes
N_PCS = 50  # principal components
N_NEIGHBORS = 15  # neighbours of a cell
LEIDEN_RESOLUTION = 0.7  # higher: more clusters
MIN_CLUSTER_CELLS = 30  # smaller Leiden clusters are dropped
MAX_CELLS_EMBEDDED = (
    50_000  # clustered and drawn; of more cells a random draw, the others go to their neighbours' clusters (ours)
)

# Cell types
LABELS: Literal["auto", "leiden", "author", "markers"] = (
    "auto"  # auto: the author's where the data have them, else Leiden clusters; markers: clusters named by MARKERS_FILE
)
MARKERS_FILE: str | None = (
    None  # csv or tsv, a row a type: cell_type, positive, negative (genes), or scType's own columns
)
UNLABELLED: Literal["drop", "keep"] = (
    "drop"  # cells to which the author gave no type; keep: they go to train, without type
)
MIN_TYPE_CELLS = 4  # cells that an author's type needs to be split
SMALL_TYPES: Literal["error", "drop"] = "error"  # what to do with an author's type of fewer cells

# Split (the original's)
TEST_FRACTION = 0.25  # of the cells of each type
SPLIT_BY: str | None = None  # column of obs, such as donor, of which no value is shared by train and test
SEED = 123  # of everything random in this stage

# Where things are
DATA_DIR = "data"  # folder
FIG_DIR = "fig"  # folder


def main() -> None:
    data, fig = folder(DATA_DIR), folder(FIG_DIR)
    adata = read_counts(data / "counts.h5ad", "_0_download_data.py")
    print(f"{adata.uns['dataset']}: {adata.n_obs:,} cells x {adata.n_vars:,} genes")
    if LABELS == "author" and "cell_type" not in adata.obs:
        raise ValueError(
            "LABELS is author, but data/counts.h5ad has no obs['cell_type']; "
            "give stage 0 the labels (LABELS_FILE, CELL_TYPE_KEY) or set LABELS to leiden"
        )
    if (LABELS == "markers") != (MARKERS_FILE is not None):
        raise ValueError(
            f"LABELS is {LABELS} and MARKERS_FILE is {MARKERS_FILE}; expected LABELS = markers and a file, or neither"
        )
    if SPLIT_BY is not None and SPLIT_BY not in adata.obs:
        raise ValueError(
            f"SPLIT_BY is {SPLIT_BY!r}, but obs has {', '.join(adata.obs.columns) or 'no columns'}; set it to one of them or to none"
        )

    rows = good_cells(adata)
    if REMOVE_DOUBLETS:
        rows = without_doublets(adata, rows)
    obs = adata.obs.iloc[rows].copy()
    pcs = principal_components(lazy(adata, rows), N_TOP_GENES, N_PCS)
    embedded = np.sort(np.random.default_rng(SEED).permutation(len(rows))[:MAX_CELLS_EMBEDDED])
    embedding = embed(pcs[embedded], N_NEIGHBORS, SEED)
    sc.tl.leiden(
        embedding, resolution=LEIDEN_RESOLUTION, flavor="igraph", n_iterations=2, directed=False, random_state=SEED
    )
    obs["leiden"] = pd.Categorical(
        labels_of_neighbours(pcs, embedded, embedding.obs["leiden"].astype(str).to_numpy(), N_NEIGHBORS)
    )
    obs[["umap_1", "umap_2"]] = np.nan
    obs.iloc[embedded, -2:] = embedding.obsm["X_umap"]
    obs["row"] = rows
    if LABELS == "markers":
        obs["marker_type"] = types_by_markers(adata, rows, obs["leiden"].astype(str).to_numpy())
    obs = label(obs)

    is_test = split(obs)
    usable = ~is_test | obs["cell_type"].notna().to_numpy()
    if (
        not usable.all()
    ):  # with SPLIT_BY: neither test cells, which need a type, nor train cells, whose donors are others
        print(f"cells without a type among the test cells' {SPLIT_BY}: {np.sum(~usable):,} removed")
        obs, is_test = obs[usable], is_test[usable]
    print(f"test cells: {is_test.sum():,} of {len(is_test):,} ({is_test.mean():.0%})")
    in_train = cells_with_gene(adata, obs["row"][~is_test]) >= MIN_CELLS
    print(f"genes seen in fewer than {MIN_CELLS} train cells: {np.sum(~in_train):,} removed, {in_train.sum():,} left")
    filled = genes_in_cell(adata, obs["row"], in_train) > 0
    if not filled.all():
        print(f"cells without any count in these genes: {np.sum(~filled):,} removed")
        obs, is_test = obs[filled], is_test[filled]
    print_types(obs["cell_type"][~is_test], obs["cell_type"][is_test])

    umap = obs[["umap_1", "umap_2"]].to_numpy()
    drawn = ~np.isnan(umap[:, 0])
    plots_cells.umap_reference(umap[drawn], obs["cell_type"][drawn], is_test[drawn], fig / "umap_reference.png")
    uns = {key: adata.uns[key] for key in ("dataset", "source", "counts_id") if key in adata.uns}
    uns["split_id"] = digest(
        [uns["counts_id"], *adata.var_names[in_train], *obs.index, *obs["cell_type"].astype(str), *is_test.astype(str)]
    )
    for part, name in ((obs[~is_test], "train.h5ad"), (obs[is_test], "test.h5ad")):
        cells = ad.AnnData(obs=part.drop(columns=["row", "umap_1", "umap_2"]), var=adata.var[in_train].copy(), uns=uns)
        rows_of_part = part["row"].to_numpy()
        write_blocks(cells, (block[:, in_train] for block, _ in selected_blocks(adata.X, rows_of_part)), data / name)
    print_written(
        "stage 1", [data / "train.h5ad", data / "test.h5ad", fig / "umap_reference.png"], "python _2_make_pseudobulk.py"
    )


def good_cells(adata: ad.AnnData) -> np.ndarray:
    """Rows of the cells within the thresholds; every filter says how many it removed."""
    mitochondrial = adata.var_names.str.upper().str.startswith("MT-")
    if MAX_PCT_MT is not None and not mitochondrial.any():
        print("no gene is called MT-...: cells are not filtered by their mitochondrial counts")
    counts_per_cell, genes_per_cell, pct_mt = (np.empty(adata.n_obs) for _ in range(3))
    for rows, counts in row_blocks(adata.X):
        counts_per_cell[rows] = counts.sum(axis=1).ravel()
        genes_per_cell[rows] = np.diff(counts.indptr)
        pct_mt[rows] = 100 * (counts @ mitochondrial.astype(np.float32)) / np.maximum(counts_per_cell[rows], 1)
    filters = [
        ("cells without any count", genes_per_cell, 1, None),
        (f"MIN_GENES = {MIN_GENES}", genes_per_cell, MIN_GENES, None),
        (f"MAX_GENES = {MAX_GENES}", genes_per_cell, None, MAX_GENES),
        (f"MAX_COUNTS = {MAX_COUNTS}", counts_per_cell, None, MAX_COUNTS),
        (f"MAX_PCT_MT = {MAX_PCT_MT}", pct_mt, None, MAX_PCT_MT),
    ]
    keep = np.ones(adata.n_obs, dtype=bool)
    for name, value, at_least, below in filters:
        passes = (
            value >= at_least if at_least is not None else value < below if below is not None else np.ones_like(keep)
        )
        removed = keep & ~passes
        if removed.any() or name[0] == "M":
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
            f"no cell passes the quality thresholds of stage 1: all {adata.n_obs:,} were removed; "
            "see the warnings above for values that suit these data"
        )
    return np.flatnonzero(keep)


def without_doublets(adata: ad.AnnData, rows: np.ndarray) -> np.ndarray:
    """Rows without the doublets that Scrublet calls (Wolock, Lopez and Klein, Cell Systems 2019)."""
    if len(rows) < 100:
        print(f"doublets: not looked for, {len(rows)} cells are too few")
        return rows
    shuffled = np.random.default_rng(SEED).permutation(len(rows))
    parts = np.array_split(shuffled, -(-len(rows) // MAX_CELLS_SCRUBLET))
    doublet = np.zeros(len(rows), dtype=bool)
    for part in map(np.sort, parts):
        cells = ad.AnnData(select_cells(adata, rows[part]).X)
        n_comps = min(30, cells.n_obs // 2, cells.n_vars - 1)
        sc.pp.scrublet(cells, n_prin_comps=n_comps, random_state=SEED, verbose=False)
        if "predicted_doublet" in cells.obs:
            doublet[part] = cells.obs["predicted_doublet"].to_numpy(dtype=bool)
        else:
            print(
                f"doublets: Scrublet found no threshold that parts them from single cells; none removed{f' of {len(part):,} cells' * (len(parts) > 1)}"
            )
    if doublet.any():
        print(f"doublets: {doublet.sum():,} cells removed, {(~doublet).sum():,} left")
    return rows[~doublet]


def cells_with_gene(adata: ad.AnnData, rows: pd.Series) -> np.ndarray:
    """In how many of these cells each gene is seen."""
    return sum(
        np.bincount(block.indices, minlength=adata.n_vars) for block, _ in selected_blocks(adata.X, rows.to_numpy())
    )


def genes_in_cell(adata: ad.AnnData, rows: pd.Series, genes: np.ndarray) -> np.ndarray:
    """How many of these genes are seen in each of these cells."""
    return np.concatenate([np.diff(block[:, genes].indptr) for block, _ in selected_blocks(adata.X, rows.to_numpy())])


def types_by_markers(adata: ad.AnnData, rows: np.ndarray, clusters: np.ndarray) -> np.ndarray:
    """The type of each cell, by its cluster's scType score; None where no type fits."""
    found, scores = cluster_types(adata, rows, clusters, read_markers(user_path(MARKERS_FILE)))
    scores.insert(0, "type", pd.Series(found, clusters).groupby(level=0).first().reindex(scores.index).fillna("none"))
    print(
        "clusters by marker genes (mean score of a cell):\n"
        + scores.rename_axis("cluster").to_string(float_format="{:.2f}".format)
    )
    if pd.isna(found).all():
        raise ValueError(
            f"no cluster fits a type of {MARKERS_FILE}: all scores are below 0.25; expected markers of these cells' types"
        )
    return found


def label(obs: pd.DataFrame) -> pd.DataFrame:
    """The table of cells with their type in obs["cell_type"], categorical; small clusters and unlabelled cells dropped as the constants say."""
    by_author = LABELS == "author" or (LABELS == "auto" and "cell_type" in obs)
    by_markers = LABELS == "markers"
    cell_type = (
        obs["cell_type"] if by_author else obs["marker_type"] if by_markers else "cluster " + obs["leiden"].astype(str)
    ).astype("object")
    print(
        f"cell types: {'labels of the author' if by_author else 'Leiden clusters by marker genes' if by_markers else 'Leiden clusters'}"
    )
    unlabelled = cell_type.isna().to_numpy()
    keep = np.ones(len(obs), dtype=bool)
    if unlabelled.any():
        keep = ~unlabelled if UNLABELLED == "drop" else keep
        print(
            f"cells without a label: {unlabelled.sum():,} {'removed' if UNLABELLED == 'drop' else 'kept for training'}, {keep.sum():,} left"
        )
    sizes = cell_type.value_counts()
    small = sizes[sizes < (MIN_TYPE_CELLS if by_author else MIN_CLUSTER_CELLS)]
    if len(small):
        named = ", ".join(f"{name} ({size})" for name, size in small.items())
        if by_author and SMALL_TYPES == "error":
            raise ValueError(
                f"too few cells to split for {len(small)} of {len(sizes)} types: {named}; expected at least {MIN_TYPE_CELLS} after quality control. "
                "Set SMALL_TYPES to drop to leave these types out, or merge their labels"
            )
        keep &= ~cell_type.isin(small.index).to_numpy()
        print(
            f"{'types' if by_author else 'clusters'} that are too small: {named}; {small.sum():,} cells removed, {keep.sum():,} left"
        )
    if len(sizes) - len(small) < 2:
        left = ", ".join(sizes.index.difference(small.index)) or "none"
        raise ValueError(
            f"too few cell types are left ({left}); expected at least 2: give labels, or raise LEIDEN_RESOLUTION"
        )
    labelled = obs[keep].copy()
    if not by_author and "cell_type" in labelled:
        labelled["author_cell_type"] = labelled["cell_type"]
    types = sorted(sizes.index.difference(small.index), key=_natural)
    labelled["cell_type"] = pd.Categorical(cell_type[keep], categories=types)
    return labelled


def _natural(name: str) -> tuple:
    """Sorts cluster 10 after cluster 9."""
    head, _, tail = name.rpartition(" ")
    return (head, int(tail), "") if tail.isdigit() else (name, -1, tail)


def split(obs: pd.DataFrame) -> np.ndarray:
    """Which cells are test cells: drawn within each type, or whole groups of SPLIT_BY with types spread as evenly as can be."""
    codes = obs["cell_type"].cat.codes.to_numpy()
    if SPLIT_BY is None:
        return select_per_type(codes, TEST_FRACTION, np.random.default_rng(SEED))
    is_test = np.zeros(len(obs), dtype=bool)
    groups = obs[SPLIT_BY].astype(str).to_numpy()
    n_folds = max(2, round(1 / TEST_FRACTION))
    if len(np.unique(groups)) < n_folds:
        raise ValueError(
            f"SPLIT_BY = {SPLIT_BY!r} has {len(np.unique(groups))} values ({', '.join(np.unique(groups))}), "
            f"expected at least {n_folds} for a test fraction of {TEST_FRACTION}; raise TEST_FRACTION"
        )
    folds = [
        fold for _, fold in StratifiedGroupKFold(n_folds, shuffle=True, random_state=SEED).split(codes, codes, groups)
    ]
    is_test[min(folds, key=lambda fold: abs(len(fold) / len(codes) - TEST_FRACTION))] = True
    print(
        f"test: {', '.join(sorted(set(groups[is_test])))}; train: {', '.join(sorted(set(groups[~is_test])))} ({SPLIT_BY})"
    )
    absent = set(obs["cell_type"].cat.categories) - set(obs["cell_type"][~is_test].dropna())
    if absent:
        raise ValueError(
            f"the split by {SPLIT_BY} leaves no train cell of {', '.join(sorted(absent))}; set another SEED, or leave these types out"
        )
    return is_test


def print_types(train: pd.Series, test: pd.Series) -> None:
    table = pd.DataFrame({"train": train.value_counts(sort=False), "test": test.value_counts(sort=False)})
    if (table["test"] == 0).any():
        print(f"WARNING: no test cell of {', '.join(table.index[table['test'] == 0])}")
    if train.isna().any():
        table.loc["without a type"] = [train.isna().sum(), 0]
    table.loc["all"] = table.sum()
    print(table.rename_axis("cells").to_string())


if __name__ == "__main__":
    options.run(globals())
