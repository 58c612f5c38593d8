"""How close estimated proportions are to the true ones, and how close a set of cells is to test cells.

Sets of cells are AnnData: cells x genes, raw counts (csr) in memory, the same genes in all sets, obs["cell_type"].

`fidelity` compares as many cells of each type as there are test cells: generated cells or, as the real reference, train cells; no
generator can be better than these. Its principal components are computed on both sets together (median normalisation, log1p, 2,000
variable genes, 50 components), so that variation in either set counts. `membership` asks whether train cells were copied.
"""

from typing import NamedTuple

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp
from scipy.cluster.hierarchy import linkage
from scipy.spatial.distance import squareform
from scipy.stats import ks_2samp
from sklearn.base import ClassifierMixin
from sklearn.decomposition import PCA
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score, roc_auc_score
from sklearn.model_selection import StratifiedKFold, cross_val_predict
from sklearn.neighbors import NearestNeighbors
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.sparsefuncs import mean_variance_axis
from tqdm import tqdm

from lib.data.counts import log_normalize
from lib.data.embedding import principal_components, variable_genes
from lib.models.profiles import log_fold_changes, top_genes

N_TOP_GENES, N_PCS = 2000, 50  # of the principal components
N_LINEAR_GENES = 3000  # used by the linear classifier: the most variable genes of the test cells
N_CORRELATED_GENES = 500  # whose correlations are compared: the most variable genes of the train cells
N_MARKERS = 50  # of each type
MIN_CELLS_PER_TYPE = 20  # in each set, for the metrics of a single type
MAX_SAMPLES = 20  # of generated cells, whose proportions are compared
FALSE_POSITIVES = 0.01  # of the membership test: share of the test cells that it takes for train cells


class EvaluationCells(NamedTuple):
    """What every generator is compared with."""

    test: ad.AnnData  # test cells, at most as many as the evaluation may use
    real_reference: ad.AnnData  # train cells of the same types and numbers
    members: ad.AnnData  # of the membership test: labelled train cells, all of them or a random part
    non_members: ad.AnnData  # of the membership test: test cells, all of them or a random part
    genes: np.ndarray  # indices of the genes whose correlations are compared, selected by train cells
    seed: int


def mae(true: np.ndarray, estimate: np.ndarray) -> float:
    """Mean absolute error over all entries."""
    return float(np.abs(np.asarray(true) - np.asarray(estimate)).mean())


def pearson(true: np.ndarray, estimate: np.ndarray) -> float:
    """Pearson's r over all entries; NaN if either side does not vary."""
    with np.errstate(invalid="ignore"):
        return float(np.corrcoef(np.ravel(true), np.ravel(estimate))[0, 1])


def ccc(true: np.ndarray, estimate: np.ndarray) -> float:
    """Concordance correlation coefficient over all entries (Lin 1989): 2 cov / (var + var + (difference of the means)^2).

    1 only if the estimates equal the truth; a constant estimate has 0.
    """
    x, y = np.ravel(true).astype(float), np.ravel(estimate).astype(float)
    spread = x.var() + y.var() + (x.mean() - y.mean()) ** 2
    return float(2 * ((x - x.mean()) * (y - y.mean())).mean() / spread) if spread > 0 else float("nan")


def proportion_agreement(true: pd.DataFrame, estimate: pd.DataFrame) -> pd.DataFrame:
    """MAE, CCC and Pearson's r of estimated proportions, samples x cell types: one row per type, then `all types`."""
    pairs = {name: (true[name], estimate[name]) for name in true} | {"all types": (true, estimate)}
    rows = {name: (mae(*pair), ccc(*pair), pearson(*pair)) for name, pair in pairs.items()}
    return pd.DataFrame.from_dict(rows, orient="index", columns=["MAE", "CCC", "r"])


def library_and_genes(cells: ad.AnnData) -> pd.DataFrame:
    """Cells x (library size in counts, number of genes detected)."""
    library_size = np.asarray(cells.X.sum(axis=1)).ravel()
    return pd.DataFrame({"library_size": library_size, "genes_detected": np.diff(cells.X.indptr)}, cells.obs_names)


def gene_statistics(cells: ad.AnnData) -> pd.DataFrame:
    """Genes x (mean, variance, zeros): of log(1 + counts per 10,000); zeros: share of cells without a count."""
    values = log_normalize(cells.X, 1e4).astype(np.float64)
    mean, variance = mean_variance_axis(values, axis=0)
    zeros = 1 - values.getnnz(axis=0) / cells.n_obs
    return pd.DataFrame({"mean": mean, "variance": variance, "zeros": zeros}, index=cells.var_names)


def gene_correlation(cells: ad.AnnData, genes: np.ndarray) -> np.ndarray:
    """Pearson's r between genes, over cells, of log(1 + counts per 10,000): genes x genes; 0 where a gene does not vary."""
    values = log_normalize(cells.X, 1e4)[:, genes].toarray()
    with np.errstate(invalid="ignore"):
        return np.nan_to_num(np.corrcoef(values, rowvar=False))


def cluster_tree(correlation: np.ndarray) -> np.ndarray:
    """Linkage (scipy) of the genes that puts correlated genes next to each other: average linkage on 1 - r."""
    distance = np.clip(1 - correlation, 0, 2)
    np.fill_diagonal(distance, 0)
    return linkage(squareform(distance, checks=False), method="average", optimal_ordering=True)


def mean_by_type(values: sp.csr_matrix, cell_type: pd.Series) -> pd.DataFrame:
    """Types x columns: mean of each type's rows; NaN for a type without rows."""
    of_type = pd.get_dummies(cell_type, dtype=np.float64)
    sums = pd.DataFrame(of_type.to_numpy().T @ values, index=list(of_type.columns))
    return sums.div(of_type.sum(), axis=0)


def mean_expression(cells: ad.AnnData, genes: np.ndarray) -> pd.DataFrame:
    """Types x genes: mean log(1 + counts per 10,000); NaN for a type without cells."""
    return mean_by_type(log_normalize(cells.X, 1e4)[:, genes], cells.obs["cell_type"])


def type_fold_changes(cells: ad.AnnData) -> pd.DataFrame:
    """Genes x types: log2 of the mean counts per 10,000 in the type over the mean in all other cells (+ 0.1 on both sides).

    Types without cells are left out; no columns if a single type has cells.
    """
    scale = 1e4 / library_and_genes(cells)["library_size"].clip(lower=1).to_numpy()
    means = mean_by_type(sp.csr_matrix(sp.diags_array(scale) @ cells.X), cells.obs["cell_type"]).dropna()
    if len(means) < 2:
        return pd.DataFrame(index=cells.var_names)
    n_cells = cells.obs["cell_type"].value_counts()[means.index].to_numpy()
    return pd.DataFrame(log_fold_changes(means.to_numpy(), n_cells).T, cells.var_names, means.index)


def type_proportions(sets: dict[str, pd.DataFrame]) -> pd.DataFrame:
    """Proportions of the cell types, sets of cells x types; a set of several samples has a row for each of the first `MAX_SAMPLES`.

    sets: name -> table of cells (obs) with `cell_type`, and `sample` if there are samples.
    """
    rows = {}
    for name, obs in sets.items():
        parts = {name: obs}
        if "sample" in obs and obs["sample"].nunique() > 1:
            samples = obs["sample"].unique()[:MAX_SAMPLES]
            parts = {f"{name}, {sample}": obs[obs["sample"] == sample] for sample in samples}
        for label, part in parts.items():
            rows[label] = part["cell_type"].value_counts(normalize=True, sort=False)
    return pd.DataFrame(rows).T


def forest_auc(pcs: np.ndarray, is_second: np.ndarray, seed: int) -> float:
    """AUC (area under the ROC curve) of a random forest that classifies cells as first or second set, 5-fold cross-validated.

    0.5: the sets cannot be distinguished. As in GRouNdGAN (Zinati et al., Nature Communications 2024), on 50 principal components.
    """
    return _auc(RandomForestClassifier(300, n_jobs=-1, random_state=seed), pcs, is_second, seed)


def linear_auc(test: ad.AnnData, cells: ad.AnnData, seed: int) -> float:
    """AUC of a logistic regression (L2) on log(1 + counts) of single genes, log library size and log number of genes detected."""
    genes = variable_genes(test, N_LINEAR_GENES)
    both = ad.AnnData(sp.vstack([test.X, cells.X], format="csr"))
    totals = np.log1p(library_and_genes(both).to_numpy())
    features = np.hstack([np.log1p(both.X[:, genes].toarray()), totals])
    regression = make_pipeline(StandardScaler(), LogisticRegression(C=1e-3, max_iter=500))
    return _auc(regression, features, np.arange(len(features)) >= test.n_obs, seed)


def _auc(classifier: ClassifierMixin, features: np.ndarray, is_second: np.ndarray, seed: int) -> float:
    folds = StratifiedKFold(5, shuffle=True, random_state=seed)
    probability = cross_val_predict(classifier, features, is_second, cv=folds, method="predict_proba")[:, 1]
    return float(roc_auc_score(is_second, probability))


def ilisi(pcs: np.ndarray, is_second: np.ndarray, perplexity: float = 30.0) -> float:
    """Integration LISI (Korsunsky et al., Nature Methods 2019): number of sets in a cell's neighbourhood, mean over cells; 1 to 2.

    The inverse Simpson index of a cell's 3 x perplexity nearest neighbours, weighted by a Gaussian of that perplexity.
    """
    n_neighbors = min(int(3 * perplexity), len(pcs) - 1)
    distance, index = NearestNeighbors(n_neighbors=n_neighbors).fit(pcs).kneighbors()
    low, high = np.full((len(pcs), 1), 1e-12), np.full((len(pcs), 1), 1e12)
    for _ in range(60):  # the width of each Gaussian, by bisection
        precision = np.sqrt(low * high)
        weights = np.exp(-precision * (distance - distance[:, :1]))
        weights /= weights.sum(axis=1, keepdims=True)
        too_wide = -(weights * np.log(np.maximum(weights, 1e-300))).sum(axis=1, keepdims=True) > np.log(perplexity)
        low, high = np.where(too_wide, precision, low), np.where(too_wide, high, precision)
    share = (weights * is_second[index]).sum(axis=1)
    return float(np.mean(1 / (share**2 + (1 - share) ** 2)))


def correlation_agreement(a: np.ndarray, b: np.ndarray) -> tuple[float, float]:
    """Pearson's r and mean absolute difference of two correlation matrices, over all pairs of genes."""
    pairs = np.triu_indices(len(a), k=1)
    return pearson(a[pairs], b[pairs]), mae(a[pairs], b[pairs])


def marker_recovery(test: ad.AnnData, cells: ad.AnnData) -> tuple[float, float]:
    """Share of each type's `N_MARKERS` genes of largest fold change that both sets have in common, and Pearson's r of all fold changes.

    Means over the types with `MIN_CELLS_PER_TYPE` test cells, or NaN.
    """
    changes = type_fold_changes(test), type_fold_changes(cells)
    n_test = test.obs["cell_type"].value_counts()
    types = [name for name in changes[0] if name in changes[1] and n_test[name] >= MIN_CELLS_PER_TYPE]
    if not types:
        return float("nan"), float("nan")
    markers = [top_genes(table[types].to_numpy().T, N_MARKERS) for table in changes]
    overlap = [len(np.intersect1d(*pair)) / N_MARKERS for pair in zip(*markers)]
    return float(np.mean(overlap)), float(np.mean([pearson(changes[0][name], changes[1][name]) for name in types]))


def type_correlation(test: ad.AnnData, cells: ad.AnnData, n_markers: int) -> tuple[pd.DataFrame, int]:
    """Pearson's r between the types' mean expression, types of `cells` x types of `test`, over marker genes, and the number of these.

    The mean over the test cells' types is subtracted from both sets first. n_markers: genes of largest fold change of each type.
    """
    genes = np.unique(top_genes(type_fold_changes(test).to_numpy().T, n_markers))
    test_means, cell_means = (mean_expression(part, genes).dropna() for part in (test, cells))
    centre = test_means.mean()
    r = np.corrcoef(cell_means - centre, test_means - centre)[: len(cell_means), len(cell_means) :]
    return pd.DataFrame(r, index=cell_means.index, columns=test_means.index), len(genes)


def transfer_f1(
    train_pcs: np.ndarray, train_types: np.ndarray, test_pcs: np.ndarray, test_types: np.ndarray, seed: int
) -> float:
    """Macro-averaged F1 of a random forest that learns the cell types from one set and predicts those of another."""
    forest = RandomForestClassifier(300, n_jobs=-1, random_state=seed).fit(train_pcs, train_types)
    return float(f1_score(test_types, forest.predict(test_pcs), average="macro"))


def distribution_distances(test: ad.AnnData, cells: ad.AnnData) -> dict[str, float]:
    """Kolmogorov-Smirnov distances of library sizes and of numbers of genes detected."""
    distance = ks_2samp(library_and_genes(test), library_and_genes(cells)).statistic
    return {"library size KS": float(distance[0]), "genes detected KS": float(distance[1])}


def membership(generated: ad.AnnData, members: ad.AnnData, non_members: ad.AnnData) -> pd.DataFrame:
    """Membership test: are train cells (members) nearer to generated cells than test cells (non-members) are?

    A cell's distance is that to the nearest of all generated cells, on principal components that are fitted on the generated cells
    alone (log(1 + counts per 10,000) of their variable genes). It takes about as many generated cells as members to see copies.

    One row for all cells and for each type with `MIN_CELLS_PER_TYPE` cells in both sets; columns: "membership AUC" of -distance
    (private: 0.5), "membership TPR at 1 % FPR", the share of the members nearer than all but 1 % of the non-members (private: 0.01;
    NaN with fewer than 99 non-members), n_cells (non-members).
    """
    genes = variable_genes(generated, N_TOP_GENES)
    both = ad.concat([members, non_members], index_unique="-")
    x, x_both = (log_normalize(cells.X, 1e4)[:, genes].astype(np.float64) for cells in (generated, both))
    pca = PCA(min(N_PCS, generated.n_obs - 1, len(genes) - 1), svd_solver="covariance_eigh").fit(x)
    nearest = NearestNeighbors(n_neighbors=1).fit(pca.transform(x))
    table = pd.DataFrame({"distance": nearest.kneighbors(pca.transform(x_both))[0].ravel()})
    table["cell_type"] = both.obs["cell_type"].astype(str).to_numpy()
    table["is_member"] = table.index < members.n_obs
    rows = {}
    for name, part in [("all", table), *table.groupby("cell_type")]:
        inside, outside = (part["distance"][part["is_member"] == is_member] for is_member in (True, False))
        if name == "all" or min(len(inside), len(outside)) >= MIN_CELLS_PER_TYPE:
            # "weibull": an unbiased quantile of the population, where numpy's default is too high for a small sample
            threshold = np.quantile(outside, FALSE_POSITIVES, method="weibull")
            tpr = (inside < threshold).mean() if len(outside) + 1 >= 1 / FALSE_POSITIVES else np.nan
            rows[name] = [roc_auc_score(part["is_member"], -part["distance"]), tpr, len(outside)]
    columns = ["membership AUC", "membership TPR at 1 % FPR", "n_cells"]
    return pd.DataFrame.from_dict(rows, orient="index", columns=columns)


def fidelity(test: ad.AnnData, cells: ad.AnnData, genes: np.ndarray, seed: int, within_type: bool = False) -> pd.Series:
    """All metrics of one set of cells compared with test cells, but for `membership`.

    genes: indices of those whose correlations are compared; within_type: leave out the metrics that need several types.
    """
    pcs = principal_components(ad.concat([test, cells], index_unique="-"), N_TOP_GENES, N_PCS)
    is_second = np.arange(len(pcs)) >= test.n_obs
    correlation_r, correlation_mae = correlation_agreement(*(gene_correlation(part, genes) for part in (test, cells)))
    a, b = gene_statistics(test), gene_statistics(cells)
    values = {
        "forest AUC": forest_auc(pcs, is_second, seed),
        "linear AUC": linear_auc(test, cells, seed),
        "iLISI": ilisi(pcs, is_second),
        "gene correlation r": correlation_r,
        "gene correlation MAE": correlation_mae,
        **{f"gene {name} MAE": mae(a[name], b[name]) for name in a},
        **distribution_distances(test, cells),
    }
    if not within_type:
        overlap, fold_change_r = marker_recovery(test, cells)
        types = [part.obs["cell_type"].astype(str).to_numpy() for part in (test, cells)]
        real, these = (pcs[~is_second], types[0]), (pcs[is_second], types[1])
        values |= {
            "marker overlap": overlap,
            "fold change r": fold_change_r,
            "F1 train on these, test on real": transfer_f1(*these, *real, seed),
            "F1 train on real, test on these": transfer_f1(*real, *these, seed),
        }
    return pd.Series(values)


def select_like(cells: ad.AnnData, cell_type: pd.Series, rng: np.random.Generator) -> np.ndarray:
    """Rows of randomly selected cells, as many of each type as `cell_type` holds (all of a type that has fewer), ascending."""
    n_cells = cell_type.value_counts(sort=False)
    rows = [rng.permutation(np.flatnonzero(cells.obs["cell_type"] == name))[:n] for name, n in n_cells.items()]
    return np.sort(np.concatenate(rows))


def fidelity_and_membership(evaluation: EvaluationCells, generated: ad.AnnData, more: ad.AnnData) -> pd.Series:
    """All metrics over all cells.

    generated: as many cells of each type as `evaluation.test`; more: for `membership`, about as many as `evaluation.members`.
    """
    test = membership(more, evaluation.members, evaluation.non_members).drop(columns="n_cells")
    return pd.concat([fidelity(evaluation.test, generated, evaluation.genes, evaluation.seed), test.loc["all"]])


def fidelity_table(evaluation: EvaluationCells, generated: ad.AnnData, more: ad.AnnData) -> pd.DataFrame:
    """All metrics of generated cells and of the real reference, each compared with the same test cells. more: for `membership`.

    One row per metric, of all cells and of each type with `MIN_CELLS_PER_TYPE` cells; columns: cells ("all" or the type), figure
    (the metric), generated, real (the reference; NaN for `membership`), n_cells (test cells that were compared).
    """
    sets = [evaluation.test, generated, evaluation.real_reference]
    tables: dict[str, pd.DataFrame] = {}
    types = evaluation.test.obs["cell_type"].cat.categories
    for name in tqdm(["all", *types], desc="metrics by cell type", unit="", delay=5, leave=False):
        parts = sets if name == "all" else [cells[(cells.obs["cell_type"] == name).to_numpy()].copy() for cells in sets]
        if name == "all" or min(part.n_obs for part in parts) >= MIN_CELLS_PER_TYPE:
            test, *compared = parts
            columns = [fidelity(test, cells, evaluation.genes, evaluation.seed, name != "all") for cells in compared]
            tables[name] = pd.DataFrame(dict(zip(("generated", "real"), columns))).assign(n_cells=test.n_obs)
    for name, row in membership(more, evaluation.members, evaluation.non_members).iterrows():
        rows = pd.DataFrame({"generated": row.drop("n_cells"), "real": np.nan, "n_cells": int(row["n_cells"])})
        tables[str(name)] = pd.concat([tables.get(str(name)), rows])
    return pd.concat(tables, names=["cells", "figure"]).reset_index()
