"""How close estimated proportions are to the true ones, and how close a set of cells is to test cells.

Sets of cells are AnnData: raw counts (csr) in memory, the same genes, obs["cell_type"], and about as many cells of each type in
both sets. The set compared with `test` is either generated cells or, as the real reference, train cells: no generator can be better.
Principal components are computed on both sets together (median normalisation, log1p, 2,000 variable genes, 50 components), so
that variation in either set counts.
"""

import itertools

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp
from scipy.stats import ks_2samp
from sklearn.base import ClassifierMixin
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score, roc_auc_score
from sklearn.metrics.pairwise import euclidean_distances
from sklearn.model_selection import StratifiedKFold, cross_val_predict
from sklearn.neighbors import NearestNeighbors
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from tqdm import tqdm

from lib.data.embedding import principal_components, variable_genes
from lib.evaluation.cell_statistics import (
    gene_correlation,
    gene_statistics,
    library_and_genes,
    log_fold_changes,
    mean_expression,
)
from lib.models.profiles import top_genes

N_TOP_GENES, N_PCS = 2000, 50  # of the joint principal components
N_LINEAR_GENES = 3000  # used by the linear classifier: the most variable genes of the test cells
N_CORRELATED_GENES = 500  # whose correlations are compared: the most variable genes of the train cells
N_MARKERS = 50  # of each type
MIN_CELLS_PER_TYPE = 20  # in each set, for the metrics of a single type


def mae(true: np.ndarray, estimate: np.ndarray) -> float:
    """Mean absolute error over all entries."""
    return float(np.abs(np.asarray(true) - np.asarray(estimate)).mean())


def pearson(true: np.ndarray, estimate: np.ndarray) -> float:
    """Pearson's r over all entries; NaN if either side does not vary."""
    x, y = np.ravel(true).astype(float), np.ravel(estimate).astype(float)
    x, y = x - x.mean(), y - y.mean()
    scale = np.sqrt((x @ x) * (y @ y))
    return float(x @ y / scale) if scale > 0 else float("nan")


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


def forest_auc(pcs: np.ndarray, is_second: np.ndarray, seed: int) -> float:
    """AUC (area under the ROC curve) of a random forest that classifies cells as first or second set, 5-fold cross-validated.

    0.5: the sets cannot be distinguished. As in GRouNdGAN (Zinati et al., Nature Communications 2024), on 50 principal components.
    """
    forest = RandomForestClassifier(300, n_jobs=-1, random_state=seed)
    return _auc(forest, pcs, is_second, seed)


def linear_auc(test: ad.AnnData, cells: ad.AnnData, seed: int) -> float:
    """AUC of a logistic regression (L2) on log(1 + counts) of single genes, log library size and log number of genes detected.

    It detects deviations of single genes, which principal components average out.
    """
    genes = variable_genes(test, N_LINEAR_GENES)
    both = sp.vstack([test.X, cells.X], format="csr")
    totals = np.log1p(np.column_stack([np.asarray(both.sum(axis=1)).ravel(), np.diff(both.indptr)]))
    features = np.hstack([np.log1p(both[:, genes].toarray()), totals])
    regression = make_pipeline(StandardScaler(), LogisticRegression(C=1e-3, max_iter=500))
    return _auc(regression, features, np.arange(len(features)) >= test.n_obs, seed)


def _auc(classifier: ClassifierMixin, features: np.ndarray, is_second: np.ndarray, seed: int) -> float:
    folds = StratifiedKFold(5, shuffle=True, random_state=seed)
    probability = cross_val_predict(classifier, features, is_second, cv=folds, method="predict_proba")[:, 1]
    return float(roc_auc_score(is_second, probability))


def mmd(x: np.ndarray, y: np.ndarray) -> float:
    """Squared maximum mean discrepancy, unbiased (Gretton et al. 2012, eq. 3), Gaussian kernel as wide as the median distance.

    0 is best; below 0 by chance. x, y: cells x features.
    """
    squared = euclidean_distances(np.vstack([x, y]), squared=True)
    kernel = np.exp(-squared / np.median(squared[np.triu_indices(len(squared), k=1)]))
    n, m = len(x), len(y)
    within_x = (kernel[:n, :n].sum() - n) / (n * (n - 1))
    within_y = (kernel[n:, n:].sum() - m) / (m * (m - 1))
    return float(within_x + within_y - 2 * kernel[:n, n:].mean())


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
    """Agreement of two sets on the marker genes of the types; means over the types with `MIN_CELLS_PER_TYPE` test cells.

    Returns
    -------
    Share of each type's `N_MARKERS` genes of largest fold change that both sets have in common; Pearson's r of all fold changes.
    NaN if no type has so many test cells.
    """
    in_test, in_cells = log_fold_changes(test), log_fold_changes(cells)
    n_test = test.obs["cell_type"].value_counts()
    types = [name for name in in_test if name in in_cells and n_test[name] >= MIN_CELLS_PER_TYPE]
    if not types:
        return float("nan"), float("nan")
    markers = [top_genes(changes[types].to_numpy().T, N_MARKERS) for changes in (in_test, in_cells)]
    overlap = [len(np.intersect1d(*of_type)) / N_MARKERS for of_type in zip(*markers)]
    return float(np.mean(overlap)), float(np.mean([pearson(in_test[name], in_cells[name]) for name in types]))


def type_correlation(test: ad.AnnData, cells: ad.AnnData, n_markers: int) -> tuple[pd.DataFrame, int]:
    """Pearson's r between the types' mean expression in two sets, over marker genes.

    The mean over the test cells' types is subtracted from both sets first: it is common to all types.

    Parameters
    ----------
    n_markers
        Genes of largest fold change of each type of the test cells.

    Returns
    -------
    Types of `cells` x types of `test`; number of genes.
    """
    genes = np.unique(top_genes(log_fold_changes(test).to_numpy().T, n_markers))
    of_test, of_cells = (mean_expression(part, genes).dropna() for part in (test, cells))
    r = np.corrcoef(of_cells - of_test.mean(), of_test - of_test.mean())[: len(of_cells), len(of_cells) :]
    return pd.DataFrame(r, index=of_cells.index, columns=of_test.index), len(genes)


def transfer_f1(
    train_pcs: np.ndarray, train_types: np.ndarray, test_pcs: np.ndarray, test_types: np.ndarray, seed: int
) -> float:
    """Macro-averaged F1 of a random forest that learns the cell types from one set and predicts those of another."""
    forest = RandomForestClassifier(300, n_jobs=-1, random_state=seed).fit(train_pcs, train_types)
    return float(f1_score(test_types, forest.predict(test_pcs), average="macro"))


def memorisation(pcs: np.ndarray, train_pcs: np.ndarray, test_pcs: np.ndarray) -> float:
    """Share of cells whose nearest real cell is a train cell rather than a test cell, for as many train as test cells.

    0.5 is best: copies of train cells have 1.
    """
    to_train, to_test = (
        NearestNeighbors(n_neighbors=1).fit(real).kneighbors(pcs)[0].ravel() for real in (train_pcs, test_pcs)
    )
    is_tied = np.isclose(to_train, to_test)  # such as distances to two copies of one cell, which differ by rounding
    return float(np.where(is_tied, 0.5, to_train < to_test).mean())


def distribution_distances(test: ad.AnnData, cells: ad.AnnData) -> dict[str, float]:
    """Kolmogorov-Smirnov distances of library sizes and of numbers of genes detected."""
    totals, detected = zip(*(library_and_genes(part) for part in (test, cells)))
    return {
        "library size KS": float(ks_2samp(*totals).statistic),
        "genes detected KS": float(ks_2samp(*detected).statistic),
    }


def fidelity(test: ad.AnnData, cells: ad.AnnData, genes: np.ndarray, seed: int, within_type: bool = False) -> pd.Series:
    """All metrics of one set of cells compared with test cells, but for `memorisation`.

    Parameters
    ----------
    genes
        Places of the genes whose correlations are compared.
    within_type
        Leave out the metrics that need several types.
    """
    pcs = principal_components(ad.concat([test, cells], index_unique="-"), N_TOP_GENES, N_PCS)
    is_second = np.arange(len(pcs)) >= test.n_obs
    correlation_r, correlation_mae = correlation_agreement(
        gene_correlation(test, genes), gene_correlation(cells, genes)
    )
    a, b = gene_statistics(test), gene_statistics(cells)
    found = {
        "forest AUC": forest_auc(pcs, is_second, seed),
        "linear AUC": linear_auc(test, cells, seed),
        "MMD": mmd(pcs[~is_second], pcs[is_second]),
        "iLISI": ilisi(pcs, is_second),
        "gene correlation r": correlation_r,
        "gene correlation MAE": correlation_mae,
        **{f"gene {name} MAE": mae(a[name], b[name]) for name in a},
        **distribution_distances(test, cells),
    }
    if not within_type:
        overlap, fold_change_r = marker_recovery(test, cells)
        real = pcs[~is_second], test.obs["cell_type"].astype(str).to_numpy()
        these = pcs[is_second], cells.obs["cell_type"].astype(str).to_numpy()
        found |= {
            "marker overlap": overlap,
            "fold change r": fold_change_r,
            "F1 train on these, test on real": transfer_f1(*these, *real, seed),
            "F1 train on real, test on these": transfer_f1(*real, *these, seed),
        }
    return pd.Series(found)


def select_like(cells: ad.AnnData, cell_type: pd.Series, rng: np.random.Generator) -> np.ndarray:
    """Rows of randomly selected cells, as many of each type as `cell_type` holds (all of a type that has fewer), ascending."""
    rows = []
    for name, n_cells in cell_type.value_counts(sort=False).items():
        of_type = np.flatnonzero(cells.obs["cell_type"] == name)
        rows.append(rng.permutation(of_type)[:n_cells])
    return np.sort(np.concatenate(rows))


def fidelity_table(
    test: ad.AnnData, generated: ad.AnnData, real_reference: ad.AnnData, unseen_train: ad.AnnData, genes: np.ndarray, seed: int
) -> pd.DataFrame:  # fmt: skip
    """All metrics of generated cells and of the real reference, each compared with the same test cells.

    Parameters
    ----------
    generated, real_reference
        As many cells of each type as `test`; the reference are train cells.
    unseen_train
        Train cells that are not in `real_reference`: `memorisation` of real cells. May be empty.
    genes
        Places of the genes whose correlations are compared, chosen on train cells.

    Returns
    -------
    One row per metric, of all cells and of each type with `MIN_CELLS_PER_TYPE` cells; columns: cells, figure (the metric),
    generated, real (the reference).
    """
    sets = {"generated": generated, "real": real_reference}
    pooled = pd.DataFrame({name: fidelity(test, cells, genes, seed) for name, cells in sets.items()})
    parts = [test, real_reference, generated, unseen_train]
    pcs = principal_components(ad.concat(parts, index_unique="-"), N_TOP_GENES, N_PCS)
    ends = np.cumsum([0, *(part.n_obs for part in parts)])
    test_pcs, reference_pcs, generated_pcs, unseen_pcs = (pcs[a:b] for a, b in itertools.pairwise(ends))
    unseen = memorisation(unseen_pcs, reference_pcs, test_pcs) if unseen_train.n_obs else np.nan
    nearest = memorisation(generated_pcs, reference_pcs, test_pcs)
    pooled.loc["nearest real cell is a train cell"] = [nearest, unseen]
    tables = {"all": pooled}
    names = test.obs["cell_type"].cat.categories
    for name in tqdm(names, desc="metrics by cell type", unit="", delay=5, leave=False):
        of_type, *others = (part[(part.obs["cell_type"] == name).to_numpy()].copy() for part in (test, *sets.values()))
        if min(part.n_obs for part in (of_type, *others)) >= MIN_CELLS_PER_TYPE:
            columns = {column: fidelity(of_type, part, genes, seed, True) for column, part in zip(sets, others)}
            tables[name] = pd.DataFrame(columns)
    return pd.concat(tables, names=["cells", "figure"]).reset_index()
