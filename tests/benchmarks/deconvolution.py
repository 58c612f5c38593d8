"""How well are proportions of bulk with known truth estimated? The regression, NNLS on markers, a constant, and the released scTAPE.

run     python tests/benchmarks/deconvolution.py --data data/counts.h5ad --cases a b       (pbmc3k: 5 minutes)
        python tests/benchmarks/deconvolution.py                                           (all cases; 10 minutes)
        python tests/benchmarks/deconvolution.py --only sctape                             (half an hour and 8 GB)
needs   tests/benchmarks/requirements.txt for scTAPE; in --folder the files of cases (c) and (d), whose source the error names

(a) Mixtures of held-out cells, 1,200 each, with the compositions of stage 2. (b) The same on a simulated other platform: every
gene times a log-normal factor (standard deviation of the logarithm 0.5), a depth of about a million reads that varies by a
third, a twentieth of the genes never detected and a twentieth of all values lost. (c) Real mixtures of RNA of three lung
adenocarcinoma lines in known proportions (Tian, L. et al., Nature Methods 16, 479-487 (2019); 8 mixes x 4 amounts of mRNA,
CEL-seq2), single cells of the same lines as the reference. (d) Real bulk of blood: nine PBMC samples with mass cytometry of the
same blood (GSE107572; Finotello, F. et al., Genome Medicine 11, 34 (2019)), with pbmc3k and, separately, with FACS-purified
cells (pbmc_facs; Zheng, G. X. Y. et al., Nature Communications 8, 14049 (2017)) as the reference. Types are summed to groups,
T, B, NK, Mono and DC, or with CD4 and CD8 T cells apart; truth and estimates are scaled to sum to 1 over the groups that the
reference has. RNA_PER_CELL is auto, except where a row says otherwise. Brackets: 95 %
interval of 2,000 bootstrap samples of the nine bulk samples. Coverage: truths within two spreads of the estimate.

The cells of (a) and (b) are split as in fidelity.py. The seed samples the mixtures and the distortion of (a) and (b), and trains
the networks. The regression has no randomness: in (c) all seeds give the same. The truth is used for the scores alone. In (a) and
(b) proportions are of cells, in (c) of RNA: there all estimates of cells are multiplied by the types' mean counts per cell.
"replicates pooled" pools the four amounts of each mix in (c).

The released scTAPE runs with its own defaults except two: adaptive is off, because its adaptive stage cannot load its own
checkpoint under torch >= 2.6 (weights_only); and it gets the 2,000 genes that vary most over the train cells, because with all
genes it takes more than 20 GB.
"""

import argparse
import time
from pathlib import Path
from typing import Any, NamedTuple

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp
from shared import ROOT, SPLIT_SEED, add_data_option, load, mean_and_half_range, workplace

from lib.bulk import pseudobulk, sctape
from lib.bulk.deconvolution import deconvolve
from lib.bulk.regression import Reference, nnls_on_markers, reference_profiles
from lib.bulk.rna_content import rna_per_cell, to_cells, to_rna
from lib.data.counts import digest, log_normalize
from lib.evaluation import metrics
from lib.training import load_checkpoint

N_MIXTURES, CELLS_PER_MIXTURE = 200, 1200
CELLS = "data/counts.h5ad"  # of cases (a) and (b); set by --data
DATA = ROOT.parent / "shared" / "data"  # files of cases (c) and (d); set by --folder
SOURCES = {  # files that stage 0 cannot download
    "lung_cell_lines.h5ad": "X and obs['cell_type'] of sc_celseq2.count.csv.gz and sc_celseq2.metadata.csv.gz "
    "(cell_line_demuxlet; without doublets) of github.com/LuyiTian/sc_mixology, data/csv",
    "lung_rnamix_bulk_counts.csv.gz": "RNAmix_celseq2.count.csv.gz of github.com/LuyiTian/sc_mixology, data/csv; "
    "the wells of each mix and amount of mRNA summed, samples (<mix>_<pg>) x genes",
    "pbmc3k.h5ad": "10x Genomics' pbmc3k, raw counts, obs['cell_type'] of Seurat's tutorial (pbmc_meta of "
    "github.com/rnabioco/clustifyr)",
    "pbmc_facs.h5ad": "FACS-purified blood cells of Zheng et al. 2017, raw counts and obs['cell_type'] "
    "(pbmc_facs of github.com/stephenslab/fastTopics)",
    "pbmc_bulk_tpm.csv.gz": "GSE107572 in TPM, genes x samples (github.com/BostonGene/Kassandra, data/validation_datasets)",
    "pbmc_bulk_cytof.csv": "mass cytometry of GSE107572, percent of cells, samples x types (the same folder)",
    "lung_rnamix_proportions.csv": "RNAmix_celseq2.metadata.csv.gz of github.com/LuyiTian/sc_mixology, data/csv: "
    "samples (<mix>_<pg>) x lines, with its columns of H2228 and HCC827, which are swapped there, set right",
}
SHARES = {"sparse": 0.25, "rare": 0.25, "near": 0.0}  # of the mixtures of test cells in stage 2
PLATFORM_SD, DEPTH, DEPTH_SD, LOST = 0.5, 1e6, 0.3, 0.05
N_TRAIN_SAMPLES = 5000  # of either network: the released default
PEER_GENES = 2000
MAX_PER_SAMPLE = 40  # bulk samples that the network is adapted to one by one: half a minute each on a busy core
TRAINED: dict[str, Any] = {}  # the last network, and what it was trained for
N_BOOTSTRAP = 2000  # of the samples of (d)

# Case (d): columns of the truth, and the group of each type; types of no group are not in the truth
CYTOMETRY = {
    "B": "B_cells",
    "CD4": "CD4_T_cells",
    "CD8": "CD8_T_cells",
    "NK": "NK_cells",
    "Mono": "Monocytes",
    "DC": "Dendritic_cells",
}
BLOOD_GROUPS = {
    "pbmc3k": {
        "B": "B", "Naive CD4 T": "CD4", "Memory CD4 T": "CD4", "CD8 T": "CD8", "NK": "NK", "CD14+ Mono": "Mono", "FCGR3A+ Mono": "Mono",
        "DC": "DC",
    },
    "pbmc_facs": {
        "CD19+ B": "B", "CD4+ T Helper2": "CD4", "CD4+/CD25 T Reg": "CD4", "CD4+/CD45RA+/CD25- Naive T": "CD4",
        "CD4+/CD45RO+ Memory": "CD4", "CD8+ Cytotoxic T": "CD8", "CD8+/CD45RA+ Naive Cytotoxic": "CD8", "CD56+ NK": "NK",
        "CD14+ Monocyte": "Mono",
    },
}  # fmt: skip
# Of the same nine samples, B, CD4, CD8, Mono and NK: RMSE, CCC, mean r per type; computed from the tables of BostonGene/Kassandra
PUBLISHED = {
    "Kassandra": (0.057, 0.894, 0.79), "Scaden (PBMC model)": (0.054, 0.895, 0.74), "CIBERSORTx LM22": (0.076, 0.818, 0.70),
    "ABIS": (0.112, 0.704, 0.65), "quanTIseq": (0.107, 0.723, 0.77),
}  # fmt: skip


class Case(NamedTuple):
    dataset: str  # of the train cells, with the genes of the bulk
    train: ad.AnnData  # cells x genes, raw counts, obs["cell_type"]
    bulk: pd.DataFrame  # samples x genes
    truth: pd.DataFrame  # samples x types
    of_rna: bool
    by_library_size: pd.DataFrame | None  # samples x types: true RNA divided by the train cells' library sizes


def case_file(name: str) -> Path:
    """A file of case (c).

    Raises
    ------
    FileNotFoundError
        If it is missing, with its public source.
    """
    if not (DATA / name).exists():
        raise FileNotFoundError(
            f"{DATA / name} is missing; its source is {SOURCES[name]}. Its folder is set by --folder"
        )
    return DATA / name


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
    train, test = load(CELLS)
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
    by_library_size = pd.DataFrame(by_train_libraries / by_train_libraries.sum(axis=1, keepdims=True), columns=types)
    return Case("a and b", train, pd.DataFrame(values, columns=test.var_names), truth, False, by_library_size)


def lung(pooled: bool) -> Case:
    """Case (c)."""
    adata = ad.read_h5ad(case_file("lung_cell_lines.h5ad"))
    train = as_cells(
        sp.csr_matrix(adata.X, dtype=np.float32),
        pd.Categorical(adata.obs["cell_type"].astype(str)),
        adata.var_names,
        "lung",
    )
    bulk = pd.read_csv(case_file("lung_rnamix_bulk_counts.csv.gz"), index_col=0).astype(np.float64)
    truth = pd.read_csv(case_file("lung_rnamix_proportions.csv"), index_col=0).loc[
        bulk.index, list(train.obs["cell_type"].cat.categories)
    ]
    if pooled:
        mix = bulk.index.str.split("_").str[0]
        bulk, truth = bulk.groupby(mix).sum(), truth.groupby(mix).mean()
    return Case("c", train, bulk, truth, True, None)


def mean_library(train: ad.AnnData) -> np.ndarray:
    library = np.asarray(train.X.sum(axis=1)).ravel()
    codes = train.obs["cell_type"].cat.codes.to_numpy()
    return np.bincount(codes, weights=library) / np.bincount(codes)


def reference_of(train: ad.AnnData) -> Reference:
    types = train.obs["cell_type"].cat
    return reference_profiles(train.X, types.codes.to_numpy(), list(train.var_names), list(types.categories))


def regression(case: Case, seed: int, mode: str) -> pd.DataFrame:
    return deconvolve(reference_of(case.train), case.bulk, mode, seed=seed).proportions


def our_network(case: Case, seed: int, adaptation: sctape.Adaptation = "none") -> pd.DataFrame | None:
    """Stages 2 and 4 as they are, on as many mixtures as the released scTAPE makes."""
    if adaptation == "per-sample" and len(case.bulk) > MAX_PER_SAMPLE:
        return None
    return sctape.predict(our_checkpoint(case, seed), case.bulk, adaptation).proportions


def our_checkpoint(case: Case, seed: int) -> dict[str, Any]:
    """The network of a case, trained once for all methods that use it."""
    if TRAINED.get("of") != (case.dataset, seed):
        genes = case.train.var_names.isin(case.bulk.columns)
        train = case.train[:, genes].copy()
        with workplace(train, train) as place:  # stage 2 also mixes test cells; these mixtures are not used
            place.main("_2_make_pseudobulk.py", SEED=seed, N_TRAIN_SAMPLES=N_TRAIN_SAMPLES, N_TEST_DIRICHLET=1)
            place.main("_4_train_sctape.py", SEED=seed)
            checkpoint = load_checkpoint(place.models / "sctape.pt", "_4_train_sctape.py")
        TRAINED.update(of=(case.dataset, seed), checkpoint=checkpoint)
    return TRAINED["checkpoint"]


def mean_of_both(case: Case, seed: int) -> pd.DataFrame:
    return (regression(case, seed, "regression") + our_network(case, seed)) / 2


def nnls(case: Case, seed: int) -> pd.DataFrame:
    return nnls_on_markers(case.bulk, reference_of(case.train))


def constant(case: Case, seed: int) -> pd.DataFrame:
    frequencies = case.train.obs["cell_type"].value_counts(normalize=True).sort_index()
    return pd.DataFrame(np.tile(frequencies, (len(case.bulk), 1)), case.bulk.index, frequencies.index.astype(str))


def released_sctape(case: Case, seed: int) -> pd.DataFrame:
    from TAPE import Deconvolution

    shared = np.flatnonzero(case.train.var_names.isin(case.bulk.columns))
    logs = log_normalize(case.train.X, 1e4)[:, shared].astype(np.float64)
    variance = np.asarray(logs.power(2).mean(axis=0) - np.square(logs.mean(axis=0))).ravel()
    genes = np.sort(shared[np.argsort(-variance)[:PEER_GENES]])
    names = case.train.var_names[genes]
    cells = pd.DataFrame(case.train.X[:, genes].toarray(), case.train.obs["cell_type"].astype(str).to_numpy(), names)
    np.random.seed(seed)  # noqa: NPY002  (the global generator that scTAPE uses)
    _, predicted = Deconvolution(
        cells, case.bulk[names], sep="\t", datatype="counts", mode="overall", adaptive=False, seed=seed
    )
    return predicted[case.truth.columns]


METHODS = {
    "regression": ("regression", lambda case, seed: regression(case, seed, "regression")),
    "per-sample": ("regression-per-sample", lambda case, seed: regression(case, seed, "regression-per-sample")),
    "unadapted": ("regression-unadapted", lambda case, seed: regression(case, seed, "regression-unadapted")),
    "network": ("scTAPE, stage 4", our_network),
    "network-adapted": ("scTAPE, adapted to all", lambda case, seed: our_network(case, seed, "overall")),
    "network-per-sample": ("scTAPE, adapted to each", lambda case, seed: our_network(case, seed, "per-sample")),
    "mean": ("mean of regression and scTAPE", mean_of_both),
    "nnls": ("NNLS on markers", nnls),
    "constant": ("constant", constant),
    "true-rna": ("true RNA, train libraries", lambda case, seed: case.by_library_size),
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


def estimated(case: Case, key: str, method: str, seed: int) -> pd.DataFrame | None:
    """Scores of one method on one case, printed; None where the case has no such estimate."""
    started = time.perf_counter()
    estimate = METHODS[method][1](case, seed)
    seconds = time.perf_counter() - started
    if estimate is None:
        return None
    if case.of_rna and method != "constant":
        rna = to_rna(estimate.to_numpy(), mean_library(case.train))
        estimate = pd.DataFrame(rna, estimate.index, estimate.columns)
    names = {"case": CASES[key][0], "method": METHODS[method][0], "seed": seed}
    table = scored(case, estimate).assign(seconds=seconds, **names)
    mae, ccc, r = table.loc["all", ["MAE", "CCC", "r"]]
    print(
        f"{names['case']}, {names['method']}, seed {seed}: MAE {mae:.4f}, CCC {ccc:.4f}, r {r:.4f}, {seconds:.1f} s",
        flush=True,
    )
    return table.rename_axis("cells").reset_index()


def blood_case(name: str) -> Case:
    """Case (d), with the percentages of mass cytometry as the truth."""
    adata = ad.read_h5ad(case_file(f"{name}.h5ad"))
    counts = sp.csr_matrix(adata.X, dtype=np.float32)
    genes = counts.getnnz(axis=0) >= 3
    cell_type = pd.Categorical(adata.obs["cell_type"].astype(str))
    train = as_cells(counts[:, genes], cell_type, adata.var_names[genes], name)
    bulk = pd.read_csv(case_file("pbmc_bulk_tpm.csv.gz"), index_col=0).T
    percent = pd.read_csv(case_file("pbmc_bulk_cytof.csv"), index_col=0)
    have = set(BLOOD_GROUPS[name].values())
    truth = pd.DataFrame({group: percent[column] for group, column in CYTOMETRY.items() if group in have})
    return Case(f"d, {name}", train, bulk, truth.loc[bulk.index], False, None)


def blood_estimates(case: Case, methods: list[str]) -> tuple[dict[str, pd.DataFrame], pd.DataFrame]:
    """Case (d): proportions of cells by each method, and the spread of the regression; samples x types of the reference."""
    reference = reference_of(case.train)
    content = rna_per_cell("auto", reference)
    by_counts = reference.mean.sum(axis=1)
    estimates = {}
    for method in methods:
        cells = METHODS[method][1](case, 0)
        estimates[METHODS[method][0]] = cells
        if method != "constant":
            by_content = to_cells(
                to_rna(cells[reference.cell_types].to_numpy(), by_counts), content["rna_per_cell"].to_numpy()
            )
            estimates[METHODS[method][0]] = pd.DataFrame(by_content, cells.index, reference.cell_types)
        if method == "regression":
            estimates["regression, reference's counts per cell"] = cells
    return estimates, deconvolve(reference, case.bulk, content=content).spread


def grouped(table: pd.DataFrame, groups: dict[str, str], level: str) -> pd.DataFrame:
    """Samples x groups, summed over types; level: "T" or "CD4 / CD8"."""
    if level == "T":
        groups = {name: "T" if group in ("CD4", "CD8") else group for name, group in groups.items()}
    return table[list(groups)].T.groupby(groups).sum().T


def blood_figures(true: np.ndarray, estimate: np.ndarray) -> list[float]:
    return [metrics.mae(true, estimate), np.sqrt(np.square(true - estimate).mean()), metrics.ccc(true, estimate)]


def blood(name: str, methods: list[str]) -> pd.DataFrame:
    """Case (d): one row per level and method."""
    case = blood_case(name)
    estimates, spread = blood_estimates(case, methods)
    truth, groups = case.truth, BLOOD_GROUPS[name]
    rng = np.random.default_rng(SPLIT_SEED)
    samples = rng.integers(0, len(truth), (N_BOOTSTRAP, len(truth)))
    rows = []
    for level in ("T", "CD4 / CD8"):
        true = grouped(truth, {group: group for group in truth}, level)
        true = true.div(true.sum(axis=1), axis=0)
        for method, table in estimates.items():
            table = grouped(table, groups, level).loc[true.index, true.columns]
            total = table.sum(axis=1)
            table = table.div(total, axis=0)
            a, b = true.to_numpy(), table.to_numpy()
            figures = dict(zip(("MAE", "RMSE", "CCC"), blood_figures(a, b)))
            intervals = np.quantile([blood_figures(a[i], b[i]) for i in samples], [0.025, 0.975], axis=0).T
            row = {"reference": name, "level": level, "method": method}
            row |= {
                figure: f"{value:.3f} [{low:.3f}, {high:.3f}]"
                for (figure, value), (low, high) in zip(figures.items(), intervals)
            }
            for k, group in enumerate(true):
                row |= {
                    f"{group} r": metrics.pearson(a[:, k], b[:, k]) if np.ptp(b[:, k]) > 1e-9 else np.nan,
                    f"{group} ratio": b[:, k].mean() / a[:, k].mean(),
                }
            if method == "regression":
                deviation = np.sqrt(grouped(spread**2, groups, level).loc[true.index, true.columns]).div(total, axis=0)
                row["coverage"] = (np.abs(a - b) <= 2 * deviation.to_numpy()).mean()
            if level != "T" and method == "regression":
                print(five_types(name, true, table))
            rows.append(row)
    return pd.DataFrame(rows)


def five_types(name: str, true: pd.DataFrame, table: pd.DataFrame) -> str:
    """Ours beside the published figures, for the five types that those have."""
    kept = ["B", "CD4", "CD8", "Mono", "NK"]
    a, b = (t[kept].div(t[kept].sum(axis=1), axis=0).to_numpy() for t in (true, table))
    r = np.mean([metrics.pearson(a[:, k], b[:, k]) for k in range(len(kept))])
    ours_here = {f"ours, {name}": (*blood_figures(a, b)[1:], r)}
    return (
        pd.DataFrame(ours_here | PUBLISHED, ["RMSE", "CCC", "mean r"])
        .T.rename_axis("five types of (d)")
        .to_string(float_format="{:.3f}".format)
    )


def main() -> None:
    global CELLS, DATA
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_data_option(options)
    options.add_argument(
        "--folder", type=Path, default=DATA, help="of the files of cases (c) and (d); default: ../shared/data"
    )
    options.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    options.add_argument("--cases", nargs="+", choices=[*CASES, "d"], default=[*CASES, "d"])
    options.add_argument("--only", nargs="+", choices=METHODS, default=[name for name in METHODS if name != "sctape"])
    options.add_argument("--save", help="csv for all figures, by type and seed")
    arguments = options.parse_args()
    CELLS, DATA = arguments.data, arguments.folder
    if "d" in arguments.cases:
        methods = [method for method in arguments.only if method not in ("true-rna", "sctape")]
        table = pd.concat([blood(name, methods) for name in BLOOD_GROUPS])
        for _, part in table.groupby(["level", "reference"], sort=False):
            shown = part.dropna(axis=1, how="all")
            print("\n(d)", shown.to_string(index=False, float_format="{:.2f}".format, na_rep=""), flush=True)
    rows = []
    for key in [key for key in arguments.cases if key != "d"]:
        for seed in arguments.seeds:
            case = CASES[key][1](seed)
            for method in arguments.only:
                table = estimated(case, key, method, seed)
                if table is not None:
                    rows.append(table)
                if arguments.save:
                    pd.concat(rows).to_csv(arguments.save, index=False)
    if not rows:
        return
    everything = pd.concat(rows)
    figures = ["MAE", "CCC", "r", "seconds"]
    pooled = everything[everything["cells"] == "all"].groupby(["case", "method"], sort=False)[figures]
    print(
        "\nall types together; mean of the seeds +- half their range\n"
        + mean_and_half_range(pooled, "{:.4f}").to_string()
    )
    by_type = (
        everything[everything["cells"] != "all"].groupby(["case", "cells", "method"], sort=False)[figures[:3]].mean()
    )
    print("\nby type\n" + by_type.unstack("method").map("{:.3f}".format).to_string())


if __name__ == "__main__":
    main()
