"""How close estimates are to the truth, and how close cells are to real ones.

The second part takes two sets of cells, `real` and `other`, as AnnData: raw counts, the same genes, obs["cell_type"], about
as many cells of each type in both. Principal components are always those of both sets together (median normalisation, log1p,
2,000 variable genes of both, 50 components): fitted on one side, they would hide what the other side does elsewhere.
"""

import anndata as ad
import numpy as np
import pandas as pd
import scanpy as sc
import scipy.sparse as sp
from scipy.stats import ks_2samp
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score, roc_auc_score
from sklearn.metrics.pairwise import euclidean_distances
from sklearn.model_selection import StratifiedKFold, cross_val_predict
from sklearn.neighbors import NearestNeighbors
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from lib.data.counts import log_normalize
from lib.data.embedding import principal_components

N_TOP_GENES, N_PCS = 2000, 50  # of the joint principal components
N_LINEAR_GENES = 3000  # that the linear judge sees: the most variable ones of the real cells
N_CORRELATED_GENES = 500  # the most variable ones of the train cells
N_MARKERS = 50  # of each type
MIN_CELLS_PER_TYPE = 20  # in both sets, for a figure of one type


def mae(true: np.ndarray, estimate: np.ndarray) -> float:
    """Mean absolute error over all entries."""
    return float(np.abs(np.asarray(true) - np.asarray(estimate)).mean())


def pearson(true: np.ndarray, estimate: np.ndarray) -> float:
    """Pearson's r over all entries; nan if one side does not vary."""
    x, y = np.ravel(true).astype(float), np.ravel(estimate).astype(float)
    x, y = x - x.mean(), y - y.mean()
    scale = np.sqrt((x @ x) * (y @ y))
    return float(x @ y / scale) if scale > 0 else float("nan")


def ccc(true: np.ndarray, estimate: np.ndarray) -> float:
    """Concordance correlation coefficient over all entries (Lin 1989): 2 cov / (var + var + (difference of the means)^2).

    1 only if the estimates equal the truth; a constant estimate scores 0.
    """
    x, y = np.ravel(true).astype(float), np.ravel(estimate).astype(float)
    spread = x.var() + y.var() + (x.mean() - y.mean()) ** 2
    return float(2 * ((x - x.mean()) * (y - y.mean())).mean() / spread) if spread > 0 else float("nan")


def forest_auc(pcs: np.ndarray, is_other: np.ndarray, seed: int) -> float:
    """How well a random forest tells the two sets apart: area under the ROC curve of 5-fold cross-validation; 0.5 is chance.

    The judge of GRouNdGAN (Zinati et al., Nature Communications 2024): a forest on 50 principal components.
    """
    forest = RandomForestClassifier(300, n_jobs=-1, random_state=seed)
    return _auc(forest, pcs, is_other, seed)


def linear_auc(real: ad.AnnData, other: ad.AnnData, seed: int) -> float:
    """The same of a logistic regression, L2-regularised, on log(1 + counts), library size and number of genes detected.

    It sees single genes, which principal components average away.
    """
    genes = variable_genes(real, N_LINEAR_GENES)
    both = sp.vstack([real.X, other.X], format="csr")
    totals = np.log1p(np.column_stack([np.asarray(both.sum(axis=1)).ravel(), np.diff(both.indptr)]))
    features = np.hstack([np.log1p(both[:, genes].toarray()), totals])
    judge = make_pipeline(StandardScaler(), LogisticRegression(C=1e-3, max_iter=500))
    return _auc(judge, features, np.arange(len(features)) >= real.n_obs, seed)


def _auc(judge, features: np.ndarray, is_other: np.ndarray, seed: int) -> float:
    folds = StratifiedKFold(5, shuffle=True, random_state=seed)
    return float(
        roc_auc_score(is_other, cross_val_predict(judge, features, is_other, cv=folds, method="predict_proba")[:, 1])
    )


def mmd(x: np.ndarray, y: np.ndarray) -> float:
    """Squared maximum mean discrepancy, unbiased (Gretton et al. 2012, eq. 3), Gaussian kernel as wide as the median distance; 0 is best."""
    squared = euclidean_distances(np.vstack([x, y]), squared=True)
    kernel = np.exp(-squared / np.median(squared[np.triu_indices(len(squared), k=1)]))
    n, m = len(x), len(y)
    within_x = (kernel[:n, :n].sum() - n) / (n * (n - 1))
    within_y = (kernel[n:, n:].sum() - m) / (m * (m - 1))
    return float(within_x + within_y - 2 * kernel[:n, n:].mean())


def ilisi(pcs: np.ndarray, is_other: np.ndarray, perplexity: float = 30.0) -> float:
    """Integration LISI (Korsunsky et al., Nature Methods 2019): in how many sets a cell's neighbourhood lies, mean over cells; 2 is best.

    Of a cell's 3 x perplexity nearest neighbours, weighted by a Gaussian of that perplexity, the inverse Simpson index.
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
    share = (weights * is_other[index]).sum(axis=1)
    return float(np.mean(1 / (share**2 + (1 - share) ** 2)))


def variable_genes(cells: ad.AnnData, n_genes: int) -> np.ndarray:
    """Places of the genes whose counts vary most beyond chance: variance of Pearson residuals (Lause, Berens and Kobak 2021)."""
    counts = ad.AnnData(cells.X)
    sc.experimental.pp.highly_variable_genes(counts, n_top_genes=min(n_genes, cells.n_vars))
    return np.flatnonzero(counts.var["highly_variable"])


def gene_correlation(cells: ad.AnnData, genes: np.ndarray) -> np.ndarray:
    """Pearson's r between genes over cells, on log(1 + counts per 10,000); 0 where a gene does not vary."""
    values = log_normalize(cells.X, 1e4)[:, genes].toarray()
    values -= values.mean(axis=0)
    norm = np.linalg.norm(values, axis=0)
    values /= np.where(norm > 0, norm, 1)
    return values.T @ values


def correlation_agreement(a: np.ndarray, b: np.ndarray) -> tuple[float, float]:
    """Pearson's r and mean absolute difference of two correlation matrices, over all pairs of genes."""
    pairs = np.triu_indices(len(a), k=1)
    return pearson(a[pairs], b[pairs]), mae(a[pairs], b[pairs])


def gene_statistics(cells: ad.AnnData) -> pd.DataFrame:
    """Mean and variance of log(1 + counts per 10,000), and share of zeros, of every gene."""
    values = log_normalize(cells.X, 1e4).astype(np.float64)
    mean = np.asarray(values.mean(axis=0)).ravel()
    variance = np.asarray(values.power(2).mean(axis=0)).ravel() - mean**2
    return pd.DataFrame(
        {"mean": mean, "variance": variance, "zeros": 1 - values.getnnz(axis=0) / cells.n_obs}, index=cells.var_names
    )


def log_fold_changes(cells: ad.AnnData) -> pd.DataFrame:
    """Genes x types: log2 of a gene's mean counts per 10,000 in the type over its mean in all other cells (+ 0.1 on both sides)."""
    scaled = sp.diags_array(1e4 / np.maximum(np.asarray(cells.X.sum(axis=1)).ravel(), 1)) @ cells.X
    table = {}
    for name in cells.obs["cell_type"].cat.categories:
        mine = (cells.obs["cell_type"] == name).to_numpy()
        if mine.any() and not mine.all():
            inside, outside = (np.asarray(scaled[part].mean(axis=0)).ravel() for part in (mine, ~mine))
            table[name] = np.log2((inside + 0.1) / (outside + 0.1))
    return pd.DataFrame(table, index=cells.var_names)


def marker_recovery(real: ad.AnnData, other: ad.AnnData) -> tuple[float, float]:
    """Share of each type's `N_MARKERS` genes of largest fold change that both sets agree on, and r of all fold changes; means over types."""
    ours, theirs = log_fold_changes(real), log_fold_changes(other)
    types = [name for name in ours if name in theirs and (real.obs["cell_type"] == name).sum() >= MIN_CELLS_PER_TYPE]
    overlap = [
        len(set(ours[t].nlargest(N_MARKERS).index) & set(theirs[t].nlargest(N_MARKERS).index)) / N_MARKERS
        for t in types
    ]
    return float(np.mean(overlap)), float(np.mean([pearson(ours[t], theirs[t]) for t in types]))


def transfer_f1(
    train_pcs: np.ndarray, train_types: np.ndarray, test_pcs: np.ndarray, test_types: np.ndarray, seed: int
) -> float:
    """Macro-averaged F1 of a random forest that learns the types from one set and names those of another."""
    forest = RandomForestClassifier(300, n_jobs=-1, random_state=seed).fit(train_pcs, train_types)
    return float(f1_score(test_types, forest.predict(test_pcs), average="macro"))


def memorisation(pcs: np.ndarray, train_pcs: np.ndarray, test_pcs: np.ndarray) -> float:
    """Share of cells whose nearest real cell is a train cell, with as many train as test cells to choose from; .5 is right, a copy scores 1."""
    to_train, to_test = (
        NearestNeighbors(n_neighbors=1).fit(real).kneighbors(pcs)[0].ravel() for real in (train_pcs, test_pcs)
    )
    return float(np.mean(to_train < to_test) + 0.5 * np.mean(to_train == to_test))


def distribution_distances(real: ad.AnnData, other: ad.AnnData) -> dict[str, float]:
    """Kolmogorov-Smirnov distances of library sizes and of numbers of genes detected."""
    totals, detected = zip(*(library_and_genes(cells) for cells in (real, other)))
    return {
        "library size KS": float(ks_2samp(*totals).statistic),
        "genes detected KS": float(ks_2samp(*detected).statistic),
    }


def library_and_genes(cells: ad.AnnData) -> tuple[np.ndarray, np.ndarray]:
    """Counts, and genes detected, of each cell."""
    return np.asarray(cells.X.sum(axis=1)).ravel(), np.diff(cells.X.indptr)


def fidelity(real: ad.AnnData, other: ad.AnnData, genes: np.ndarray, seed: int, within_type: bool = False) -> pd.Series:
    """All figures of one set of cells against real ones.

    Parameters
    ----------
    genes
        Places of those whose correlations are compared.
    within_type
        Leave out what needs several types.
    """
    pcs = principal_components(ad.concat([real, other], index_unique="-"), N_TOP_GENES, N_PCS)
    is_other = np.arange(len(pcs)) >= real.n_obs
    correlation_r, correlation_mae = correlation_agreement(
        gene_correlation(real, genes), gene_correlation(other, genes)
    )
    a, b = gene_statistics(real), gene_statistics(other)
    found = {
        "forest AUC": forest_auc(pcs, is_other, seed),
        "linear AUC": linear_auc(real, other, seed),
        "MMD": mmd(pcs[~is_other], pcs[is_other]),
        "iLISI": ilisi(pcs, is_other),
        "gene correlation r": correlation_r,
        "gene correlation MAE": correlation_mae,
        **{f"gene {name} MAE": mae(a[name], b[name]) for name in a},
        **distribution_distances(real, other),
    }
    if not within_type:
        overlap, fold_change_r = marker_recovery(real, other)
        types, other_types = (cells.obs["cell_type"].astype(str).to_numpy() for cells in (real, other))
        found |= {
            "marker overlap": overlap,
            "fold change r": fold_change_r,
            "F1 train on these, test on real": transfer_f1(pcs[is_other], other_types, pcs[~is_other], types, seed),
            "F1 train on real, test on these": transfer_f1(pcs[~is_other], types, pcs[is_other], other_types, seed),
        }
    return pd.Series(found)


def select_like(cells: ad.AnnData, wanted: pd.Series, rng: np.random.Generator) -> np.ndarray:
    """Rows of cells of the same types and numbers as `wanted`, drawn without replacement; of a type with fewer cells, all."""
    rows = []
    for name, n_cells in wanted.value_counts(sort=False).items():
        pool = np.flatnonzero(cells.obs["cell_type"] == name)
        rows.append(rng.permutation(pool)[:n_cells])
    return np.sort(np.concatenate(rows))


def fidelity_table(
    test: ad.AnnData, generated: ad.AnnData, floor: ad.AnnData, others: ad.AnnData, genes: np.ndarray, seed: int
) -> pd.DataFrame:
    """Every figure of generated cells against test cells, beside that of real train cells against the same test cells.

    Parameters
    ----------
    generated, floor
        Cells of the same types and numbers as `test`; `floor` are train cells.
    others
        Train cells that are not in `floor`, for the memorisation check of real cells.
    genes
        Places of those whose correlations are compared, chosen by train cells.

    Returns
    -------
    Rows: one a figure, of all cells and of every type that has `MIN_CELLS_PER_TYPE` cells; columns: cells, figure,
    generated, real.
    """
    tables = [
        pd.DataFrame({"generated": fidelity(test, generated, genes, seed), "real": fidelity(test, floor, genes, seed)})
    ]
    names = ["all"]
    both = ad.concat([test, floor, generated, others], index_unique="-")
    ends = np.cumsum([0, test.n_obs, floor.n_obs, generated.n_obs, others.n_obs])
    pcs = principal_components(both, N_TOP_GENES, N_PCS)
    test_pcs, floor_pcs, generated_pcs, other_pcs = (pcs[a:b] for a, b in zip(ends, ends[1:]))
    unseen = memorisation(other_pcs, floor_pcs, test_pcs) if others.n_obs else np.nan
    tables[0].loc["nearest real cell is a train cell"] = [memorisation(generated_pcs, floor_pcs, test_pcs), unseen]
    for name in test.obs["cell_type"].cat.categories:
        parts = [cells[(cells.obs["cell_type"] == name).to_numpy()].copy() for cells in (test, generated, floor)]
        if min(part.n_obs for part in parts) >= MIN_CELLS_PER_TYPE:
            real = parts[0]
            tables.append(
                pd.DataFrame(
                    {c: fidelity(real, part, genes, seed, True) for c, part in zip(("generated", "real"), parts[1:])}
                )
            )
            names.append(name)
    return pd.concat(tables, keys=names, names=["cells", "figure"]).reset_index()
