"""Cell types predicted by XGBoost, trained on real or on synthetic cells and tested on the other: the test of Generative genomics.

    real -> real            trained on train cells, tested on test cells
    real -> synthetic       the same classifier, tested on generated cells: is the predicted type the requested one?
    synthetic -> real       trained on generated cells, tested on test cells

Early stopping uses further cells of the same kind, real or synthetic. Precision, recall and F1 are means over types (macro) and over
cells (weighted): for the types and, if a table maps types to coarse classes, for the classes.

Source: the Generative genomics project (README): per type, 1,000 synthetic cells to test on, 2,000 to train on, 100 for early stopping.
Ours: the genes, and XGBoost's default settings.
"""

from collections.abc import Callable
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp
from sklearn.metrics import precision_recall_fscore_support

from lib.data.counts import hold_out, log_normalize
from lib.data.embedding import variable_genes
from lib.data.tables import separator

N_GENES = 1000  # the most variable genes of the train cells
ROUNDS, PATIENCE = 300, 10  # of boosting: at most; without a lower error
STOPPING_FRACTION = (
    0.125  # of the train cells of each type, for early stopping (70/20/10 with 20% test cells, as in the source)
)


def read_classes(path: Path, cell_types: list[str]) -> list[str]:
    """The coarse class of each cell type, from a csv or tsv with a header and two columns, cell type and class.

    Raises
    ------
    ValueError
        If there are other columns, or a type has no class.
    """
    table = pd.read_csv(path, sep=separator(path), dtype=str).dropna(how="all")
    if table.shape[1] != 2:
        raise ValueError(
            f"{path} has {table.shape[1]} columns ({', '.join(table.columns)}); expected two, cell type and class"
        )
    classes = dict(zip(table.iloc[:, 0].str.strip(), table.iloc[:, 1].str.strip()))
    missing = [name for name in cell_types if name not in classes]
    if missing:
        raise ValueError(
            f"{path} names no class for {', '.join(missing)}; expected a row for each of {', '.join(cell_types)}"
        )
    return [classes[name] for name in cell_types]


def train_classifier(
    counts: sp.csr_matrix, types: np.ndarray, stop_counts: sp.csr_matrix, stop_types: np.ndarray, n_types: int, seed: int
):  # fmt: skip
    """XGBoost on log(1 + counts per 10,000); the second set of cells is for early stopping. Returns xgboost.Booster."""
    import xgboost

    features, stop_features = log_normalize(counts, 1e4), log_normalize(stop_counts, 1e4)
    matrix, stop_matrix = (xgboost.DMatrix(x, label=y) for x, y in ((features, types), (stop_features, stop_types)))
    settings = {
        "objective": "multi:softprob",
        "num_class": n_types,
        "tree_method": "hist",
        "seed": seed,
        "eval_metric": "mlogloss",
    }
    return xgboost.train(
        settings, matrix, ROUNDS, evals=[(stop_matrix, "stop")], early_stopping_rounds=PATIENCE, verbose_eval=False
    )


def predict_types(classifier, counts: sp.csr_matrix) -> np.ndarray:
    """Most probable type of each cell, by the classifier's best round: (n_cells,) integers."""
    import xgboost

    features, rounds = xgboost.DMatrix(log_normalize(counts, 1e4)), (0, classifier.best_iteration + 1)
    return classifier.predict(features, iteration_range=rounds).argmax(axis=1)


def precision_recall_f1(true: np.ndarray, predicted: np.ndarray) -> dict[str, float]:
    """Precision, recall and F1, macro and weighted, over the types that occur in either."""
    found: dict[str, float] = {}
    for average in ("macro", "weighted"):
        values = precision_recall_fscore_support(true, predicted, average=average, zero_division=0)
        found |= {f"{name} ({average})": value for name, value in zip(("precision", "recall", "F1"), values)}
    return found


def transfer_table(
    train: ad.AnnData,
    test: ad.AnnData,
    sample: Callable[[np.ndarray, int], sp.csr_matrix],
    seed: int,
    classes: list[str] | None = None,
    n_test: int = 1000,
    n_train: int = 2000,
    n_stop: int = 100,
) -> pd.DataFrame:
    """Precision, recall and F1 of the three tests.

    Parameters
    ----------
    train, test
        Real cells in memory, all with a type.
    sample
        The generator: types (n_cells,) and a seed -> counts of as many synthetic cells.
    classes
        Coarse class of each type, or None.
    n_test, n_train, n_stop
        Synthetic cells per type: to test on, to train on, for early stopping.

    Returns
    -------
    One row per test, for types and then for classes; columns: labels, trained on, tested on, and the scores.
    """
    genes = variable_genes(train, N_GENES)
    n_types = len(train.obs["cell_type"].cat.categories)
    real, real_test = (cells.obs["cell_type"].cat.codes.to_numpy(dtype=np.int64) for cells in (train, test))
    stops = hold_out(real, STOPPING_FRACTION, np.random.default_rng(seed))
    known = np.flatnonzero(np.bincount(real, minlength=n_types))  # types that have train cells
    types = {name: np.repeat(known, n) for name, n in (("test", n_test), ("train", n_train), ("stop", n_stop))}
    synthetic = {name: sample(y, seed + i)[:, genes] for i, (name, y) in enumerate(types.items())}
    by_real = train_classifier(
        train.X[~stops][:, genes], real[~stops], train.X[stops][:, genes], real[stops], n_types, seed
    )
    by_synthetic = train_classifier(synthetic["train"], types["train"], synthetic["stop"], types["stop"], n_types, seed)
    predictions = {
        ("real", "real"): (real_test, predict_types(by_real, test.X[:, genes])),
        ("real", "synthetic"): (types["test"], predict_types(by_real, synthetic["test"])),
        ("synthetic", "real"): (real_test, predict_types(by_synthetic, test.X[:, genes])),
    }
    labels = {"cell types": np.arange(n_types)} | ({} if classes is None else {"classes": np.asarray(classes)})
    rows = [
        {"labels": name, "trained on": trained, "tested on": tested} | precision_recall_f1(of[true], of[predicted])
        for name, of in labels.items()
        for (trained, tested), (true, predicted) in predictions.items()
    ]
    return pd.DataFrame(rows)
