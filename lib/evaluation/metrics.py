"""How close estimates are to the truth, and how close cells are to real ones.

The second part takes two sets of cells, `real` and `other`, as AnnData: raw counts, the same genes, obs["cell_type"], about
as many cells of each type in both. Principal components are always those of both sets together (median normalisation, log1p,
2,000 variable genes of both, 50 components): fitted on one side, they would hide what the other side does elsewhere.
"""

from typing import NamedTuple

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp
from scipy.cluster.hierarchy import leaves_list, linkage
from scipy.spatial.distance import squareform
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
from lib.data.embedding import principal_components, variable_genes
from lib.models import profiles

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


def proportion_agreement(true: pd.DataFrame, estimate: pd.DataFrame) -> pd.DataFrame:
    """MAE, CCC and Pearson's r (columns) of estimated proportions, samples x cell types: one row per type, and `all types`."""
    pairs = {name: (true[name], estimate[name]) for name in true} | {"all types": (true, estimate)}
    rows = {name: (mae(*pair), ccc(*pair), pearson(*pair)) for name, pair in pairs.items()}
    return pd.DataFrame.from_dict(rows, orient="index", columns=["MAE", "CCC", "r"])


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
    """Genes x types: log2 of a gene's mean counts per 10,000 in the type over its mean in all other cells (+ 0.1 on both sides).

    Types without cells are left out.
    """
    per_10k = sp.diags_array(1e4 / np.maximum(np.asarray(cells.X.sum(axis=1)).ravel(), 1)) @ cells.X
    n_cells = cells.obs["cell_type"].value_counts()[cells.obs["cell_type"].cat.categories]
    n_cells = n_cells[n_cells > 0]
    if len(n_cells) < 2:
        return pd.DataFrame(index=cells.var_names)
    means = [
        np.asarray(per_10k[(cells.obs["cell_type"] == name).to_numpy()].mean(axis=0)).ravel() for name in n_cells.index
    ]
    changes = profiles.log_fold_changes(np.array(means, dtype=np.float64), n_cells.to_numpy())
    return pd.DataFrame(changes.T, index=cells.var_names, columns=list(n_cells.index))


def marker_recovery(real: ad.AnnData, other: ad.AnnData) -> tuple[float, float]:
    """Agreement of two sets of cells on the marker genes of the types, means over types with `MIN_CELLS_PER_TYPE` real cells.

    Returns
    -------
    Share of each type's `N_MARKERS` genes of largest fold change that are the same in both sets; Pearson's r of all fold changes.
    """
    changes, other_changes = log_fold_changes(real), log_fold_changes(other)
    large = real.obs["cell_type"].value_counts() >= MIN_CELLS_PER_TYPE
    types = [name for name in changes if name in other_changes and large[name]]
    markers, other_markers = (
        profiles.top_genes(table[types].to_numpy().T, N_MARKERS) for table in (changes, other_changes)
    )
    overlap = [len(np.intersect1d(*pair)) / N_MARKERS for pair in zip(markers, other_markers)]
    return float(np.mean(overlap)), float(np.mean([pearson(changes[name], other_changes[name]) for name in types]))


def mean_expression(cells: ad.AnnData, genes: np.ndarray) -> pd.DataFrame:
    """Types x genes: mean log(1 + counts per 10,000); NaN for a type without cells."""
    values = log_normalize(cells.X, 1e4)[:, genes]
    names = list(cells.obs["cell_type"].cat.categories)
    masks = [(cells.obs["cell_type"] == name).to_numpy() for name in names]
    rows = [
        np.asarray(values[mask].mean(axis=0)).ravel() if mask.any() else np.full(values.shape[1], np.nan)
        for mask in masks
    ]
    return pd.DataFrame(rows, index=names)


def type_correlation(real: ad.AnnData, generated: ad.AnnData, n_markers: int) -> tuple[pd.DataFrame, int]:
    """Pearson's r between the mean expression of generated and real types, less the mean of the real types, over marker genes.

    Parameters
    ----------
    n_markers
        Genes of largest fold change of each real type.

    Returns
    -------
    Generated types x real types; number of genes.
    """
    genes = np.unique(profiles.top_genes(log_fold_changes(real).to_numpy().T, n_markers))
    of_real, of_generated = (mean_expression(cells, genes).dropna() for cells in (real, generated))
    r = np.corrcoef(of_generated - of_real.mean(), of_real - of_real.mean())[: len(of_generated), len(of_generated) :]
    return pd.DataFrame(r, index=of_generated.index, columns=of_real.index), len(genes)


def cluster_order(correlation: np.ndarray) -> np.ndarray:
    """Order of the genes that puts correlated genes next to each other: average linkage on 1 - r."""
    distance = np.clip(1 - correlation, 0, 2)
    np.fill_diagonal(distance, 0)
    return leaves_list(linkage(squareform(distance, checks=False), method="average", optimal_ordering=True))


class CellStatistics(NamedTuple):
    """What `plots_cells.fidelity` shows of one set of cells."""

    library_size: np.ndarray  # (n_cells,) counts
    n_genes: np.ndarray  # (n_cells,) genes detected
    genes: pd.DataFrame  # genes x (mean, variance, zeros), from `gene_statistics`
    fold_changes: pd.DataFrame  # genes x types, log2, from `log_fold_changes`


def cell_statistics(cells: ad.AnnData) -> CellStatistics:
    """Distributions over cells, and what single genes do."""
    return CellStatistics(*library_and_genes(cells), gene_statistics(cells), log_fold_changes(cells))


def type_proportions(sets: dict[str, pd.DataFrame], max_samples: int = 20) -> pd.DataFrame:
    """Proportions of the cell types: one row per set of cells, or one per sample of a set that has several.

    Parameters
    ----------
    sets
        Name -> table of cells (obs) with `cell_type`, and `sample` if there are samples.
    max_samples
        Of each set: the first ones.
    """
    types = next(iter(sets.values()))["cell_type"].cat.categories
    rows = {}
    for name, obs in sets.items():
        sample = obs["sample"].astype(str) if "sample" in obs else pd.Series("", index=obs.index)
        for one in pd.unique(sample)[:max_samples]:
            row = obs["cell_type"][sample == one].value_counts(normalize=True)[types]
            rows[name if sample.nunique() == 1 else f"{name}, {one}"] = row.to_numpy()
    return pd.DataFrame(rows, index=types).T


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
