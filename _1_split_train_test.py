"""Stage 1: keep the good cells, give every cell its type, and part them into train and test.

reads   data/counts.h5ad
writes  data/train.h5ad, data/test.h5ad: raw counts over the same genes, obs["cell_type"]; fig/umap_reference.png
run     python _1_split_train_test.py
note    Scrublet and the clusters see all cells, before the split, as in the original: with LABELS = "leiden" the types are the
        clusters of all cells. Genes are chosen after the split, by train cells alone.
time    10,000 cells: 2 minutes; 700 cells: 20 seconds
"""

from typing import Literal

import anndata as ad
import numpy as np
import pandas as pd
import scanpy as sc
from sklearn.model_selection import StratifiedGroupKFold

from lib import options, plots
from lib.counts import draw_of_each_type, fingerprint, read_counts, write_counts
from lib.embedding import embed
from lib.files import folder, report

# Quality control (the original's thresholds; none switches one off)
MIN_GENES: int | None = 200  # genes detected in a cell, at least
MAX_GENES: int | None = 2500  # genes detected in a cell, below
MAX_COUNTS: int | None = 6000  # counts of a cell, below
MAX_PCT_MT: float | None = 15.0  # percent of a cell's counts from mitochondrial genes (MT-), below
MIN_CELLS = 3  # train cells that must hold a gene (the original counted all cells, test cells too)
REMOVE_DOUBLETS = True  # by Scrublet

# Clusters (the original's)
N_TOP_GENES = 2000  # highly variable genes
N_PCS = 50  # principal components
N_NEIGHBORS = 15  # neighbours of a cell
LEIDEN_RESOLUTION = 0.7  # higher: more clusters
MIN_CLUSTER_CELLS = 30  # smaller Leiden clusters are dropped

# Cell types
LABELS: Literal["auto", "leiden", "author"] = "auto"  # auto: the author's labels where the data have them, else Leiden clusters
UNLABELLED: Literal["drop", "keep"] = "drop"  # cells to which the author gave no type; keep: they go to train, without type
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
    if SPLIT_BY is not None and SPLIT_BY not in adata.obs:
        raise ValueError(f"SPLIT_BY is {SPLIT_BY!r}, but obs has {', '.join(adata.obs.columns) or 'no columns'}; set it to one of them or to none")

    adata = filter_cells(adata)
    if REMOVE_DOUBLETS:
        adata = remove_doublets(adata)
    embedding = embed(adata, N_TOP_GENES, N_PCS, N_NEIGHBORS, SEED)
    sc.tl.leiden(embedding, resolution=LEIDEN_RESOLUTION, flavor="igraph", n_iterations=2, directed=False, random_state=SEED)
    adata.obs["leiden"] = embedding.obs["leiden"]
    adata.obsm["X_umap"] = embedding.obsm["X_umap"]
    adata = label(adata)

    is_test = split(adata.obs)
    usable = ~is_test | adata.obs["cell_type"].notna().to_numpy()
    if not usable.all():  # with SPLIT_BY: neither test cells, which need a type, nor train cells, whose donors are others
        print(f"cells without a type among the test cells' {SPLIT_BY}: {np.sum(~usable):,} removed")
        adata, is_test = adata[usable].copy(), is_test[usable]
    print(f"test cells: {is_test.sum():,} of {len(is_test):,} ({is_test.mean():.0%})")
    train, test = adata[~is_test].copy(), adata[is_test].copy()
    in_train = np.asarray((train.X > 0).sum(axis=0)).ravel() >= MIN_CELLS
    print(f"genes seen in fewer than {MIN_CELLS} train cells: {np.sum(~in_train):,} removed, {in_train.sum():,} left")
    train, test = (drop_empty_cells(part[:, in_train], adata.obs["cell_type"].cat.categories) for part in (train, test))
    split_id = fingerprint(train)[:6] + fingerprint(test)[:6]
    for part in (train, test):
        part.uns["split_id"] = split_id
    print_types(train.obs["cell_type"], test.obs["cell_type"])

    write_counts(train, data / "train.h5ad")
    write_counts(test, data / "test.h5ad")
    plots.umap_reference(adata.obsm["X_umap"], adata.obs["cell_type"], is_test, fig / "umap_reference.png")
    report("stage 1", [data / "train.h5ad", data / "test.h5ad", fig / "umap_reference.png"], "python _2_make_pseudobulk.py")


def filter_cells(adata: ad.AnnData) -> ad.AnnData:
    """Cells within the thresholds; every filter says how many it removed."""
    mitochondrial = adata.var_names.str.upper().str.startswith("MT-")
    if MAX_PCT_MT is not None and not mitochondrial.any():
        print("no gene is called MT-...: cells are not filtered by their mitochondrial counts")
    counts_per_cell = np.asarray(adata.X.sum(axis=1)).ravel()
    genes_per_cell = np.diff(adata.X.indptr)
    pct_mt = 100 * np.asarray(adata.X[:, mitochondrial].sum(axis=1)).ravel() / np.maximum(counts_per_cell, 1)
    filters = [
        ("cells without any count", genes_per_cell, 1, None),
        (f"MIN_GENES = {MIN_GENES}", genes_per_cell, MIN_GENES, None),
        (f"MAX_GENES = {MAX_GENES}", genes_per_cell, None, MAX_GENES),
        (f"MAX_COUNTS = {MAX_COUNTS}", counts_per_cell, None, MAX_COUNTS),
        (f"MAX_PCT_MT = {MAX_PCT_MT}", pct_mt, None, MAX_PCT_MT),
    ]
    keep = np.ones(adata.n_obs, dtype=bool)
    for name, value, at_least, below in filters:
        passes = value >= at_least if at_least is not None else value < below if below is not None else np.ones_like(keep)
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
    return adata[keep].copy()


def remove_doublets(adata: ad.AnnData) -> ad.AnnData:
    """Without the doublets that Scrublet calls (Wolock, Lopez and Klein, Cell Systems 2019)."""
    if adata.n_obs < 100:
        print(f"doublets: not looked for, {adata.n_obs} cells are too few")
        return adata
    n_comps = min(30, adata.n_obs // 2, adata.n_vars - 1)
    adata.obs = adata.obs.drop(columns=["predicted_doublet", "doublet_score"], errors="ignore")
    sc.pp.scrublet(adata, n_prin_comps=n_comps, random_state=SEED, verbose=False)
    if "predicted_doublet" not in adata.obs:
        print("doublets: Scrublet found no threshold that parts them from single cells; none removed")
        return adata
    doublet = adata.obs["predicted_doublet"].to_numpy(dtype=bool)
    print(f"doublets: {doublet.sum():,} cells removed, {(~doublet).sum():,} left")
    kept = adata[~doublet].copy()
    kept.obs = kept.obs.drop(columns=["predicted_doublet", "doublet_score"])
    del kept.uns["scrublet"]
    return kept


def label(adata: ad.AnnData) -> ad.AnnData:
    """Cells with their type in obs["cell_type"], categorical; small clusters and unlabelled cells dropped as the constants say."""
    by_author = LABELS == "author" or (LABELS == "auto" and "cell_type" in adata.obs)
    cell_type = (adata.obs["cell_type"] if by_author else "cluster " + adata.obs["leiden"].astype(str)).astype("object")
    print(f"cell types: {'labels of the author' if by_author else 'Leiden clusters'}")
    unlabelled = cell_type.isna().to_numpy()
    keep = np.ones(adata.n_obs, dtype=bool)
    if unlabelled.any():
        keep = ~unlabelled if UNLABELLED == "drop" else keep
        print(f"cells without a label: {unlabelled.sum():,} {'removed' if UNLABELLED == 'drop' else 'kept for training'}, {keep.sum():,} left")
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
        print(f"{'types' if by_author else 'clusters'} that are too small: {named}; {small.sum():,} cells removed, {keep.sum():,} left")
    if len(sizes) - len(small) < 2:
        left = ", ".join(sizes.index.difference(small.index)) or "none"
        raise ValueError(f"too few cell types are left ({left}); expected at least 2: give labels, or raise LEIDEN_RESOLUTION")
    labelled = adata[keep].copy()
    if not by_author and "cell_type" in labelled.obs:
        labelled.obs["author_cell_type"] = labelled.obs["cell_type"]
    types = sorted(sizes.index.difference(small.index), key=_natural)
    labelled.obs["cell_type"] = pd.Categorical(cell_type[keep], categories=types)
    return labelled


def _natural(name: str) -> tuple:
    """Sorts cluster 10 after cluster 9."""
    head, _, tail = name.rpartition(" ")
    return (head, int(tail), "") if tail.isdigit() else (name, -1, tail)


def split(obs: pd.DataFrame) -> np.ndarray:
    """Which cells are test cells: drawn within each type, or whole groups of SPLIT_BY with types spread as evenly as can be."""
    codes = obs["cell_type"].cat.codes.to_numpy()
    if SPLIT_BY is None:
        return draw_of_each_type(codes, TEST_FRACTION, np.random.default_rng(SEED))
    is_test = np.zeros(len(obs), dtype=bool)
    groups = obs[SPLIT_BY].astype(str).to_numpy()
    n_folds = max(2, round(1 / TEST_FRACTION))
    if len(np.unique(groups)) < n_folds:
        raise ValueError(
            f"SPLIT_BY = {SPLIT_BY!r} has {len(np.unique(groups))} values ({', '.join(np.unique(groups))}), "
            f"expected at least {n_folds} for a test fraction of {TEST_FRACTION}; raise TEST_FRACTION"
        )
    folds = [fold for _, fold in StratifiedGroupKFold(n_folds, shuffle=True, random_state=SEED).split(codes, codes, groups)]
    is_test[min(folds, key=lambda fold: abs(len(fold) / len(codes) - TEST_FRACTION))] = True
    print(f"test: {', '.join(sorted(set(groups[is_test])))}; train: {', '.join(sorted(set(groups[~is_test])))} ({SPLIT_BY})")
    absent = set(obs["cell_type"].cat.categories) - set(obs["cell_type"][~is_test].dropna())
    if absent:
        raise ValueError(f"the split by {SPLIT_BY} leaves no train cell of {', '.join(sorted(absent))}; set another SEED, or leave these types out")
    return is_test


def drop_empty_cells(part: ad.AnnData, cell_types: pd.Index) -> ad.AnnData:
    """The cells that still hold a count when the genes were filtered; both parts know the same types, present or not."""
    filled = np.diff(part.X.indptr) > 0
    if not filled.all():
        print(f"cells without any count in these genes: {np.sum(~filled):,} removed")
    part = part[filled].copy()
    del part.obsm["X_umap"]
    part.obs["cell_type"] = part.obs["cell_type"].cat.set_categories(cell_types)
    return part


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
