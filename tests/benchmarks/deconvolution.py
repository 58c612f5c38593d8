"""Deconvolution of bulk with known truth: ours, NNLS on markers, a constant, and the released scTAPE.

run     python tests/benchmarks/deconvolution.py               (ours and the baselines; 10 minutes)
        python tests/benchmarks/deconvolution.py --only sctape (needs tests/benchmarks/requirements.txt; half an hour and 8 GB)

(a) Mixtures of held-out pbmc3k cells, 1,200 each, at the compositions of stage 2. (b) The same as another platform might see
them: every gene times a log-normal factor (standard deviation of the logarithm 0.5), depth a million reads, varied by a
third, a twentieth of the genes never seen and a twentieth of all values lost. (c) Real mixtures of RNA of three lung
adenocarcinoma lines in known proportions (Tian, L. et al., Nature Methods 16, 479-487 (2019); 8 mixes x 4 amounts of mRNA,
CEL-seq2), single cells of the same lines as the reference.

pbmc3k is parted once, 75/25 within the types, seed 123, without quality thresholds. The seed draws the mixtures and the
distortion of (a) and (b), and trains the networks. Our regression has no randomness: in (c) its seeds are one. Truth is used
for the scores alone. In (a) and (b) proportions are of cells, in (c) of RNA: there all estimates of cells are multiplied by
the types' mean counts per cell. "replicates pooled" pools the four amounts of each mix in (c).

The released scTAPE runs with its own defaults but for two: adaptive is off, for its adaptive stage cannot load its own checkpoint
under torch >= 2.6 (weights_only), and it is given the 2,000 genes that vary most over the train cells, for at all genes it
takes more than 20 GB.
"""

import argparse
import importlib
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

from lib.bulk import pseudobulk, sctape  # noqa: E402
from lib.bulk.reference import nnls_on_markers, reference_profiles  # noqa: E402
from lib.bulk.regression import deconvolve, to_rna  # noqa: E402
from lib.data.counts import digest, log_normalize, select_per_type, write_counts  # noqa: E402
from lib.evaluation import metrics  # noqa: E402

DATA = ROOT.parent / "shared" / "data"
SPLIT_SEED = 123
N_MIXTURES, CELLS_PER_MIXTURE = 200, 1200
SHARES = {"sparse": 0.25, "rare": 0.25, "near": 0.0}  # as stage 2 draws the mixtures of test cells
PLATFORM_SD, DEPTH, DEPTH_SD, LOST = 0.5, 1e6, 0.3, 0.05
N_TRAIN_SAMPLES = 5000  # of either network: the released default
PEER_GENES = 2000


class Case(NamedTuple):
    train: ad.AnnData  # cells x genes, raw counts, obs["cell_type"]
    bulk: pd.DataFrame  # samples x genes
    truth: pd.DataFrame  # samples x types
    of_rna: bool
    floor: (
        pd.DataFrame | None
    )  # samples x types: what the true shares of RNA say of the cells, by the train cells' library sizes


def split_pbmc3k() -> tuple[ad.AnnData, ad.AnnData]:
    adata = ad.read_h5ad(DATA / "pbmc3k.h5ad")
    counts = sp.csr_matrix(adata.X, dtype=np.float32)
    cell_type = pd.Categorical(adata.obs["cell_type"].astype(str))
    is_test = select_per_type(cell_type.codes.astype(np.int64), 0.25, np.random.default_rng(SPLIT_SEED))
    genes = counts[~is_test].getnnz(axis=0) >= 3
    return tuple(
        as_cells(counts[rows][:, genes], cell_type[rows], adata.var_names[genes], "pbmc3k")
        for rows in (~is_test, is_test)
    )


def as_cells(counts: sp.csr_matrix, cell_type: pd.Categorical, gene_names: pd.Index, name: str) -> ad.AnnData:
    obs = pd.DataFrame({"cell_type": cell_type}, index=[f"cell_{i}" for i in range(counts.shape[0])])
    return ad.AnnData(
        counts,
        obs=obs,
        var=pd.DataFrame(index=gene_names),
        uns={"dataset": name, "split_id": digest([name, str(SPLIT_SEED)])},
    )


def mixtures(seed: int, distorted: bool) -> Case:
    """Cases (a) and (b)."""
    train, test = split_pbmc3k()
    rng = np.random.default_rng([SPLIT_SEED, seed])
    codes = test.obs["cell_type"].cat.codes.to_numpy()
    types = list(test.obs["cell_type"].cat.categories)
    composition = np.bincount(codes) / len(codes)
    cells = pseudobulk.largest_remainder(
        pseudobulk.sample_proportions(N_MIXTURES, composition, SHARES, rng), CELLS_PER_MIXTURE
    )
    mixing = pseudobulk.sample_cells(cells, codes, rng)
    values = pseudobulk.mix(mixing, test.X).astype(np.float64)
    library = np.asarray(test.X.sum(axis=1)).ravel()
    rna = np.stack([mixing[:, codes == k] @ library[codes == k] for k in range(len(types))], axis=1)
    by_train_libraries = rna / mean_library(train)
    if distorted:
        values *= np.exp(rng.normal(0, PLATFORM_SD, values.shape[1]))
        depth = DEPTH * np.exp(rng.normal(0, DEPTH_SD, (len(values), 1)))
        values = rng.poisson(values / values.sum(axis=1, keepdims=True) * depth).astype(np.float64)
        values[:, rng.random(values.shape[1]) < LOST] = 0
        values[rng.random(values.shape) < LOST] = 0
    truth = pd.DataFrame(cells / CELLS_PER_MIXTURE, columns=types)
    floor = pd.DataFrame(by_train_libraries / by_train_libraries.sum(axis=1, keepdims=True), columns=types)
    return Case(train, pd.DataFrame(values, columns=test.var_names), truth, False, floor)


def lung(pooled: bool) -> Case:
    """Case (c)."""
    adata = ad.read_h5ad(DATA / "lung_cell_lines.h5ad")
    train = as_cells(
        sp.csr_matrix(adata.X, dtype=np.float32),
        pd.Categorical(adata.obs["cell_type"].astype(str)),
        adata.var_names,
        "lung",
    )
    bulk = pd.read_csv(DATA / "lung_rnamix_bulk_counts.csv.gz", index_col=0).astype(np.float64)
    truth = pd.read_csv(DATA / "lung_rnamix_proportions.csv", index_col=0).loc[
        bulk.index, list(train.obs["cell_type"].cat.categories)
    ]
    if pooled:
        mix = bulk.index.str.split("_").str[0]
        bulk, truth = bulk.groupby(mix).sum(), truth.groupby(mix).mean()
    return Case(train, bulk, truth, True, None)


def mean_library(train: ad.AnnData) -> np.ndarray:
    library = np.asarray(train.X.sum(axis=1)).ravel()
    codes = train.obs["cell_type"].cat.codes.to_numpy()
    return np.bincount(codes, weights=library) / np.bincount(codes)


def reference_of(train: ad.AnnData):
    types = train.obs["cell_type"].cat
    return reference_profiles(train.X, types.codes.to_numpy(), list(train.var_names), list(types.categories))


def ours(case: Case, seed: int, mode: str) -> pd.DataFrame:
    return deconvolve(reference_of(case.train), case.bulk, mode, seed=seed).proportions


def our_network(case: Case, seed: int) -> pd.DataFrame:
    """Stages 2 and 4 as they are, on as many mixtures as the released scTAPE makes."""
    genes = case.train.var_names.isin(case.bulk.columns)
    train = case.train[:, genes].copy()
    with tempfile.TemporaryDirectory() as folder:
        for name in ("train", "test"):  # stage 2 makes test mixtures besides, of which nothing is used
            write_counts(train, Path(folder) / f"{name}.h5ad")
        for name, constants in {
            "_2_make_pseudobulk": {"N_TRAIN_SAMPLES": N_TRAIN_SAMPLES, "N_TEST_DIRICHLET": 1},
            "_4_train_sctape": {},
        }.items():
            stage = importlib.reload(importlib.import_module(name))
            folders = {k: folder for k in ("DATA_DIR", "MODELS_DIR", "FIG_DIR") if hasattr(stage, k)}
            for key, value in (folders | constants | {"SEED": seed}).items():
                setattr(stage, key, value)
            stage.main()
        checkpoint = torch.load(Path(folder) / "sctape.pt", weights_only=True)
    return sctape.predict(checkpoint, case.bulk)


def nnls(case: Case, seed: int) -> pd.DataFrame:
    return nnls_on_markers(case.bulk, reference_of(case.train))


def constant(case: Case, seed: int) -> pd.DataFrame:
    frequencies = case.train.obs["cell_type"].value_counts(normalize=True)[case.truth.columns]
    return pd.DataFrame(np.tile(frequencies, (len(case.truth), 1)), case.bulk.index, case.truth.columns)


def released_sctape(case: Case, seed: int) -> pd.DataFrame:
    from TAPE import Deconvolution

    shared = np.flatnonzero(case.train.var_names.isin(case.bulk.columns))
    logs = log_normalize(case.train.X, 1e4)[:, shared].astype(np.float64)
    variance = np.asarray(logs.power(2).mean(axis=0) - np.square(logs.mean(axis=0))).ravel()
    genes = np.sort(shared[np.argsort(-variance)[:PEER_GENES]])
    names = case.train.var_names[genes]
    cells = pd.DataFrame(case.train.X[:, genes].toarray(), case.train.obs["cell_type"].astype(str).to_numpy(), names)
    np.random.seed(seed)
    _, predicted = Deconvolution(
        cells, case.bulk[names], sep="\t", datatype="counts", mode="overall", adaptive=False, seed=seed
    )
    return predicted[case.truth.columns]


METHODS = {
    "overall": ("ours (overall)", lambda case, seed: ours(case, seed, "overall")),
    "high": ("ours, high-resolution", lambda case, seed: ours(case, seed, "high-resolution")),
    "none": ("ours, not adaptive", lambda case, seed: ours(case, seed, "none")),
    "network": ("ours, network alone", our_network),
    "nnls": ("NNLS on markers", nnls),
    "constant": ("constant", constant),
    "floor": ("true RNA, train libraries", lambda case, seed: case.floor),
    "sctape": ("released scTAPE 1.1.2", released_sctape),
}
CASES = {
    "a": ("(a) held-out cells", lambda seed: mixtures(seed, False)),
    "b": ("(b) another platform", lambda seed: mixtures(seed, True)),
    "c": ("(c) lung RNA mixtures", lambda seed: lung(False)),
    "c-pooled": ("(c) replicates pooled", lambda seed: lung(True)),
}


def scored(case: Case, estimate: pd.DataFrame) -> pd.DataFrame:
    """MAE, CCC and r: rows are the types, and all together."""
    table = estimate[case.truth.columns].to_numpy(dtype=np.float64)
    table = table / table.sum(axis=1, keepdims=True)
    true = case.truth.to_numpy()
    parts = {"all": slice(None)} | {name: [k] for k, name in enumerate(case.truth.columns)}
    figures = {"MAE": metrics.mae, "CCC": metrics.ccc, "r": metrics.pearson}
    return pd.DataFrame(
        {
            f: {name: figure(true[:, part], table[:, part]) for name, part in parts.items()}
            for f, figure in figures.items()
        }
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--only", nargs="+", choices=METHODS, default=[name for name in METHODS if name != "sctape"])
    parser.add_argument("--save", help="csv for all figures, by type and seed")
    arguments = parser.parse_args()
    rows = []
    for key in arguments.cases:
        for seed in arguments.seeds:
            case = CASES[key][1](seed)
            for name in arguments.only:
                started = time.perf_counter()
                estimate = METHODS[name][1](case, seed)
                seconds = time.perf_counter() - started
                if estimate is None:
                    continue
                if case.of_rna and name != "constant":
                    estimate = pd.DataFrame(
                        to_rna(estimate.to_numpy(), mean_library(case.train)), estimate.index, estimate.columns
                    )
                table = scored(case, estimate).assign(
                    seconds=seconds, case=CASES[key][0], method=METHODS[name][0], seed=seed
                )
                rows.append(table.rename_axis("cells").reset_index())
                print(
                    "{}, {}, seed {}: MAE {:.4f}, CCC {:.4f}, r {:.4f}, {:.1f} s".format(
                        CASES[key][0], METHODS[name][0], seed, *table.loc["all", ["MAE", "CCC", "r", "seconds"]]
                    ),
                    flush=True,
                )
                if arguments.save:
                    pd.concat(rows).to_csv(arguments.save, index=False)
    everything = pd.concat(rows)
    figures = ["MAE", "CCC", "r", "seconds"]
    pooled = everything[everything["cells"] == "all"].groupby(["case", "method"], sort=False)[figures]
    mean, half = pooled.mean(), (pooled.max() - pooled.min()) / 2
    print(
        f"\nall types together; mean of {len(arguments.seeds)} seeds +- half their range\n"
        + (mean.map("{:.4f}".format) + " +- " + half.map("{:.4f}".format)).to_string()
    )
    by_type = (
        everything[everything["cells"] != "all"].groupby(["case", "cells", "method"], sort=False)[figures[:3]].mean()
    )
    print("\nby type\n" + by_type.unstack("method").map("{:.3f}".format).to_string())


if __name__ == "__main__":
    main()
