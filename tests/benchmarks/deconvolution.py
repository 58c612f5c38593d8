"""How well are proportions of bulk with known truth estimated? The regression, scTAPE, NNLS on markers, a constant, the released scTAPE.

run     python tests/benchmarks/deconvolution.py --data data/counts.h5ad --cases a b       (pbmc3k: 5 minutes)
        python tests/benchmarks/deconvolution.py                                           (all cases; 10 minutes)
        python tests/benchmarks/deconvolution.py --only released-sctape                    (half an hour and 8 GB)
needs   tests/benchmarks/requirements.txt for the released scTAPE; in --folder the files of `SOURCES`, for cases (c) and (d)

(a) Mixtures of held-out cells (the split of fidelity.py), 1,200 each, with the compositions of stage 2. (b) The same on a simulated other
platform: log-normal factors of the genes, about a million reads, a twentieth of the genes and of all values lost. (c) Real mixtures of RNA
of three lung adenocarcinoma lines (Tian, L. et al., Nature Methods 16, 479-487 (2019); 8 mixes x 4 amounts of mRNA, CEL-seq2), single
cells of the same lines as the reference; c-pooled sums the four amounts. (d) Nine real PBMC samples with mass cytometry of the same blood
(GSE107572; Finotello, F. et al., Genome Medicine 11, 34 (2019)), with pbmc3k and with FACS-purified cells (Zheng, G. X. Y. et al., Nature
Communications 8, 14049 (2017)) as the reference. Types are summed to groups; truth and estimates are scaled to sum to 1 over the groups
that the reference has. RNA_PER_CELL is auto, except where a row says otherwise. Brackets: 95 % interval over 2,000 bootstrap samples of
the bulk samples. Coverage: share of the truths within the 95 % interval of the estimate.

Proportions are of cells in (a), (b) and (d), of RNA in (c): there, estimates are multiplied by the types' mean counts per cell. The
released scTAPE runs with its defaults except two: its adaptive stage, which cannot load its own checkpoint under torch >= 2.6, is off;
and it gets the 2,000 genes that vary most over the train cells, because all genes take more than 20 GB.
"""

import functools
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
from shared import ROOT, SPLIT_SEED, STAGES, as_cells, codes, load, mean_and_half_range, parser, workplace

from lib.bulk import pseudobulk, sctape
from lib.bulk.deconvolution import ADAPTATION, MODES, deconvolve
from lib.bulk.regression import Reference, nnls_on_markers, reference_profiles
from lib.bulk.rna_content import rna_per_cell, to_cells, to_rna
from lib.data.counts import log_normalize
from lib.evaluation import metrics
from lib.training import load_checkpoint

CASES = ("a", "b", "c", "c-pooled", "d")
N_MIXTURES, CELLS_PER_MIXTURE = 200, 1200
SHARES = {"sparse": 0.25, "rare": 0.25, "near": 0.0}  # of the mixtures of test cells in stage 2
PLATFORM_SD, DEPTH, DEPTH_SD, LOST = 0.5, 1e6, 0.3, 0.05
N_TRAIN_SAMPLES = 5000  # of the networks: the released default
RELEASED_GENES = 2000
N_BOOTSTRAP = 2000  # of the samples of (d)

DATA = ROOT.parent / "shared" / "data"  # default of --folder
LUNG, BLOOD = "github.com/LuyiTian/sc_mixology, data/csv", "github.com/BostonGene/Kassandra, data/validation_datasets"
SOURCES = {  # files that stage 0 cannot download
    "lung_cell_lines.h5ad": f"sc_celseq2.count and .metadata of {LUNG}; cell_type: cell_line_demuxlet, without doublets",
    "lung_rnamix_bulk_counts.csv.gz": f"RNAmix_celseq2.count of {LUNG}; wells summed to samples (<mix>_<pg>) x genes",
    "lung_rnamix_proportions.csv": f"RNAmix_celseq2.metadata of {LUNG}; H2228 and HCC827, swapped there, set right",
    "pbmc3k.h5ad": "10x Genomics' pbmc3k, raw counts; cell_type: Seurat's tutorial (pbmc_meta of github.com/rnabioco/clustifyr)",
    "pbmc_facs.h5ad": "Zheng et al. 2017, raw counts and cell_type (pbmc_facs of github.com/stephenslab/fastTopics)",
    "pbmc_bulk_tpm.csv.gz": f"GSE107572 in TPM, genes x samples ({BLOOD})",
    "pbmc_bulk_cytof.csv": f"mass cytometry of GSE107572, percent of cells, samples x types ({BLOOD})",
}
# Case (d): columns of the truth, and the group of each type; types of no group are not in the truth
CYTOMETRY = {
    "B": "B_cells", "CD4": "CD4_T_cells", "CD8": "CD8_T_cells", "NK": "NK_cells", "Mono": "Monocytes", "DC": "Dendritic_cells",
}  # fmt: skip
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


@dataclass(eq=False)
class Case:
    """Train cells, and bulk samples of known proportions."""

    train: ad.AnnData  # cells x genes, raw counts, obs["cell_type"]
    bulk: pd.DataFrame  # samples x genes
    truth: pd.DataFrame  # samples x types
    of_rna: bool = False


def reference_of(cells: ad.AnnData) -> Reference:
    return reference_profiles(cells.X, codes(cells), list(cells.var_names), list(cells.obs["cell_type"].cat.categories))


def case_file(folder: Path, name: str) -> Path:
    """A file of case (c) or (d), or a FileNotFoundError with its public source."""
    if not (folder / name).exists():
        raise FileNotFoundError(f"{folder / name} is missing; its source is {SOURCES[name]}. --folder sets its folder")
    return folder / name


def read_cells(folder: Path, name: str) -> ad.AnnData:
    return as_cells(ad.read_h5ad(case_file(folder, f"{name}.h5ad")), name)


def mixtures(data: str, seed: int, distorted: bool) -> Case:
    """Cases (a) and (b)."""
    train, test = load(data)
    rng = np.random.default_rng([SPLIT_SEED, seed])
    types, names = codes(test), list(test.obs["cell_type"].cat.categories)
    composition = np.bincount(types) / len(types)
    cells = pseudobulk.sample_cells_per_type(N_MIXTURES, CELLS_PER_MIXTURE, composition, SHARES, rng)
    mixing = pseudobulk.sample_cells(cells, types, rng)
    values = pseudobulk.mix(mixing, test.X).astype(np.float64)
    if distorted:
        values *= np.exp(rng.normal(0, PLATFORM_SD, values.shape[1]))
        depth = DEPTH * np.exp(rng.normal(0, DEPTH_SD, (len(values), 1)))
        values = rng.poisson(values / values.sum(axis=1, keepdims=True) * depth).astype(np.float64)
        values[:, rng.random(values.shape[1]) < LOST] = 0
        values[rng.random(values.shape) < LOST] = 0
    truth = pd.DataFrame(cells / CELLS_PER_MIXTURE, columns=names)
    return Case(train, pd.DataFrame(values, columns=test.var_names), truth)


def lung(folder: Path, pooled: bool) -> Case:
    """Case (c)."""
    train = read_cells(folder, "lung_cell_lines")
    bulk = pd.read_csv(case_file(folder, "lung_rnamix_bulk_counts.csv.gz"), index_col=0).astype(np.float64)
    truth = pd.read_csv(case_file(folder, "lung_rnamix_proportions.csv"), index_col=0)
    truth = truth.loc[bulk.index, list(train.obs["cell_type"].cat.categories)]
    if pooled:
        mix = bulk.index.str.split("_").str[0]
        bulk, truth = bulk.groupby(mix).sum(), truth.groupby(mix).mean()
    return Case(train, bulk, truth, of_rna=True)


def blood_case(folder: Path, name: str) -> Case:
    """Case (d), with the percentages of mass cytometry as the truth."""
    train = read_cells(folder, name)
    train = train[:, train.X.getnnz(axis=0) >= 3].copy()
    bulk = pd.read_csv(case_file(folder, "pbmc_bulk_tpm.csv.gz"), index_col=0).T
    percent = pd.read_csv(case_file(folder, "pbmc_bulk_cytof.csv"), index_col=0).loc[bulk.index]
    groups = [group for group in CYTOMETRY if group in BLOOD_GROUPS[name].values()]
    return Case(train, bulk, pd.DataFrame({group: percent[CYTOMETRY[group]] for group in groups}))


def regression(case: Case, seed: int, mode: str = "regression") -> pd.DataFrame:
    return deconvolve(reference_of(case.train), case.bulk, mode, seed=seed).proportions


def our_network(case: Case, seed: int, adaptation: sctape.Adaptation = "none", preset: str = "ours") -> pd.DataFrame:
    return sctape.predict(our_checkpoint(case, seed, preset), case.bulk, adaptation).proportions


@functools.lru_cache(maxsize=1)  # the adaptations share it
def our_checkpoint(case: Case, seed: int, preset: str) -> dict[str, Any]:
    """Stages 2 and 4 as they are, on as many mixtures as the released scTAPE makes."""
    train = case.train[:, case.train.var_names.isin(case.bulk.columns)].copy()
    words = ["--preset", preset, "--seed", str(seed)]
    with workplace(train=train, test=train) as place:  # stage 2 also mixes test cells; these mixtures are not used
        place.run(STAGES[2], *words, "--no-use-gene-lengths", "--n-train-samples", str(N_TRAIN_SAMPLES))
        place.run(STAGES[4], *words)
        return load_checkpoint(place.models / "sctape.pt", STAGES[4])


def constant(case: Case, _: int) -> pd.DataFrame:
    frequencies = case.train.obs["cell_type"].value_counts(normalize=True).sort_index()
    return pd.DataFrame(np.tile(frequencies, (len(case.bulk), 1)), case.bulk.index, frequencies.index.astype(str))


def released_sctape(case: Case, seed: int) -> pd.DataFrame:
    from TAPE import Deconvolution

    shared = np.flatnonzero(case.train.var_names.isin(case.bulk.columns))
    logs = log_normalize(case.train.X, 1e4)[:, shared].astype(np.float64)
    variance = np.asarray(logs.power(2).mean(axis=0) - np.square(logs.mean(axis=0))).ravel()
    genes = np.sort(shared[np.argsort(-variance)[:RELEASED_GENES]])
    names = case.train.var_names[genes]
    cells = pd.DataFrame(case.train.X[:, genes].toarray(), case.train.obs["cell_type"].astype(str).to_numpy(), names)
    np.random.seed(seed)  # noqa: NPY002  (the global generator that scTAPE uses)
    settings = dict(sep="\t", datatype="counts", mode="overall", adaptive=False, seed=seed)
    return Deconvolution(cells, case.bulk[names], **settings)[1][case.truth.columns]


METHODS = {mode: functools.partial(regression, mode=mode) for mode in MODES}
METHODS |= {name: functools.partial(our_network, adaptation=adaptation) for name, adaptation in ADAPTATION.items()}
METHODS |= {
    "sctape-published": functools.partial(our_network, preset="paper"),
    "nnls": lambda case, _: nnls_on_markers(case.bulk, reference_of(case.train)),
    "constant": constant,
    "released-sctape": released_sctape,
}
SLOW = ("sctape-per-sample", "sctape-published", "released-sctape")  # not in the default of --only


def scored(case: Case, method: str, seed: int) -> pd.DataFrame:
    """MAE, CCC and r: rows are the types, and all together."""
    started = time.perf_counter()
    estimate = METHODS[method](case, seed)
    seconds = time.perf_counter() - started
    if case.of_rna and method != "constant":
        estimate = estimate * 0 + to_rna(estimate.to_numpy(), reference_of(case.train).mean.sum(axis=1))
    estimate = estimate[case.truth.columns].astype(np.float64)
    table = metrics.proportion_agreement(case.truth, estimate.div(estimate.sum(axis=1), axis=0))
    return table.assign(seconds=seconds, method=method, seed=seed).rename_axis("cells").reset_index()


def blood(folder: Path, name: str, methods: list[str]) -> list[pd.DataFrame]:
    """Case (d): for T cells together, and CD4 and CD8 T cells apart, one row per method."""
    case, tables = blood_case(folder, name), []
    reference = reference_of(case.train)
    content = rna_per_cell("auto", reference)
    estimates = {}  # samples x types of the reference
    for method in methods:
        estimates[method] = cells = METHODS[method](case, 0)[reference.cell_types]
        if method != "constant":
            rna = to_rna(cells.to_numpy(), reference.mean.sum(axis=1))
            estimates[method] = cells * 0 + to_cells(rna, content["rna_per_cell"].to_numpy())
        if method == "regression":
            estimates["regression, reference's counts per cell"] = cells
    by_regression = deconvolve(reference, case.bulk, content=content)
    for merged in ({"CD4": "T", "CD8": "T"}, {}):
        groups = {of: merged.get(group, group) for of, group in BLOOD_GROUPS[name].items()}
        true = summed(case.truth, {group: merged.get(group, group) for group in case.truth})
        rows = []
        for method, table in estimates.items():
            estimate = summed(table, groups)[true.columns]
            rows.append({"(d) reference": name, "method": method} | blood_row(true, estimate))
            if method == "regression":
                total = table[list(groups)].sum(axis=1)
                spread = np.sqrt(summed(by_regression.spread**2, groups, scaled=False)[true.columns]).div(total, axis=0)
                low, high = by_regression._replace(proportions=estimate, spread=spread).interval()
                rows[-1]["coverage"] = ((low <= true) & (true <= high)).to_numpy().mean()
                if not merged:
                    print(five_types(name, true, estimate))
        tables.append(pd.DataFrame(rows).dropna(axis=1, how="all"))
    return tables


def summed(table: pd.DataFrame, groups: dict[str, str], scaled: bool = True) -> pd.DataFrame:
    """Samples x groups, summed over the types of each group and, if scaled, to a sum of 1 in each sample."""
    table = table[list(groups)].T.groupby(groups).sum().T
    return table.div(table.sum(axis=1), axis=0) if scaled else table


def blood_figures(true: np.ndarray, estimate: np.ndarray) -> list[float]:
    """MAE, RMSE, CCC."""
    return [metrics.mae(true, estimate), np.sqrt(np.square(true - estimate).mean()), metrics.ccc(true, estimate)]


def blood_row(true: pd.DataFrame, estimate: pd.DataFrame) -> dict[str, Any]:
    """Figures of a method with their bootstrap intervals, and of each group."""
    samples = np.random.default_rng(SPLIT_SEED).integers(0, len(true), (N_BOOTSTRAP, len(true)))
    a, b = true.to_numpy(), estimate.to_numpy()
    ends = np.quantile([blood_figures(a[i], b[i]) for i in samples], [0.025, 0.975], axis=0).T
    figures = zip(("MAE", "RMSE", "CCC"), blood_figures(a, b), ends)
    row: dict[str, Any] = {name: f"{value:.3f} [{low:.3f}, {high:.3f}]" for name, value, (low, high) in figures}
    for group in true:
        r = metrics.pearson(true[group], estimate[group]) if np.ptp(estimate[group]) > 1e-9 else np.nan
        row |= {f"{group} r": r, f"{group} ratio": estimate[group].mean() / true[group].mean()}
    return row


def five_types(name: str, true: pd.DataFrame, table: pd.DataFrame) -> str:
    """Ours beside the published figures, for the five types that those have."""
    a, b = (t.div(t.sum(axis=1), axis=0) for t in (t[["B", "CD4", "CD8", "Mono", "NK"]] for t in (true, table)))
    r = np.mean([metrics.pearson(a[group], b[group]) for group in a])
    ours = {f"ours, {name}": (*blood_figures(a.to_numpy(), b.to_numpy())[1:], r)}
    return pd.DataFrame(ours | PUBLISHED, ["RMSE", "CCC", "mean r"]).T.round(3).to_string()


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--folder", type=Path, default=DATA, help="of (c) and (d); default: ../shared/data")
    options.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    options.add_argument("--cases", nargs="+", choices=CASES, default=CASES)
    options.add_argument("--only", nargs="+", choices=METHODS, default=[name for name in METHODS if name not in SLOW])
    arguments = options.parse_args()
    if "d" in arguments.cases:
        methods = [method for method in arguments.only if method != "released-sctape"]
        for table in (table for name in BLOOD_GROUPS for table in blood(arguments.folder, name, methods)):
            print("\n" + table.to_string(index=False, float_format="{:.2f}".format, na_rep=""), flush=True)
    rows = []
    for key in (key for key in arguments.cases if key != "d"):
        for seed in arguments.seeds:
            is_lung = key.startswith("c")
            case = lung(arguments.folder, key == "c-pooled") if is_lung else mixtures(arguments.data, seed, key == "b")
            for method in arguments.only:
                rows.append(scored(case, method, seed).assign(case=key))
                print(rows[-1].tail(1).round(4).to_string(index=False, header=len(rows) == 1), flush=True)
    if rows:
        table = pd.concat(rows)
        groups = table[table["cells"] == "all types"].groupby(["case", "method"], sort=False)
        shown = mean_and_half_range(groups[["MAE", "CCC", "r", "seconds"]], "{:.4f}")
        print(f"\nall types together; mean of the seeds +- half their range\n{shown.to_string()}")


if __name__ == "__main__":
    main()
