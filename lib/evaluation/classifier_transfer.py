"""Generative genomics' judgement of cells: XGBoost names the types, trained on real or on synthetic cells, tested on the other.

    real -> real            train cells, test cells
    real -> synthetic       the same classifier, new cells by the type that was asked for
    synthetic -> real       trained on new cells, tested on the test cells

Each classifier stops early by cells of its own kind that it was not trained on. Precision, recall and F1 are means over types
(macro) and over cells (weighted), for the types and, where a table maps them, for coarse classes: a cell whose predicted type is
of the right class counts as right.

Source: the Generative genomics project (README): 1,000 synthetic cells a type to test on, 2,000 to train on and 100 to stop by.
Ours: the genes, and the classifier's settings, which are XGBoost's own.
"""

from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp
from sklearn.metrics import precision_recall_fscore_support

from lib.data.counts import hold_out, log_normalize
from lib.data.tables import separator
from lib.evaluation.metrics import variable_genes

N_GENES = 1000  # the most variable ones of the train cells
ROUNDS, PATIENCE = 300, 10  # of boosting: at most; without a better error
STOPPING_FRACTION = (
    0.125  # of the train cells of each type, to stop by (with a fifth of all cells as test cells: their 70/20/10)
)


def read_classes(path: Path, cell_types: list[str]) -> list[str]:
    """The coarse class of each type, from a table of two columns, cell type and class, with a header.

    Raises
    ------
    ValueError
        If it names no class for a type.
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
    counts: sp.csr_matrix,
    types: np.ndarray,
    stop_counts: sp.csr_matrix,
    stop_types: np.ndarray,
    n_types: int,
    seed: int,
):
    """XGBoost on log(1 + counts per 10,000), stopped early by the second set."""
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
    import xgboost

    chosen = classifier.predict(
        xgboost.DMatrix(log_normalize(counts, 1e4)), iteration_range=(0, classifier.best_iteration + 1)
    )
    return chosen.argmax(axis=1)


def scores(true: np.ndarray, predicted: np.ndarray) -> dict[str, float]:
    """Precision, recall and F1, over the types that are among the true ones or the predicted."""
    found = {}
    for average in ("macro", "weighted"):
        values = precision_recall_fscore_support(true, predicted, average=average, zero_division=0)
        found |= {f"{name} ({average})": value for name, value in zip(("precision", "recall", "F1"), values)}
    return found


def protocol(
    train: ad.AnnData, test: ad.AnnData, sample, seed: int, classes: list[str] | None = None, n_test: int = 1000, n_train: int = 2000, n_stop: int = 100
) -> pd.DataFrame:  # fmt: skip
    """The three tests.

    Parameters
    ----------
    train, test
        Real cells in memory, of known type.
    sample
        Makes new cells: given (n_cells,) types and a seed, their counts.
    classes
        Coarse class of each type, or None.
    n_test, n_train, n_stop
        Synthetic cells a type.

    Returns
    -------
    One row a test, once for types and once for classes; columns: labels, trained on, tested on, and the scores.
    """
    genes = variable_genes(train, N_GENES)
    n_types = len(train.obs["cell_type"].cat.categories)
    real, real_test = (cells.obs["cell_type"].cat.codes.to_numpy(dtype=np.int64) for cells in (train, test))
    stops = hold_out(real, STOPPING_FRACTION, np.random.default_rng(seed))
    known = np.flatnonzero(np.bincount(real, minlength=n_types))  # types that have train cells
    new = {name: np.repeat(known, n) for name, n in (("test", n_test), ("train", n_train), ("stop", n_stop))}
    made = {name: sample(types, seed + i)[:, genes] for i, (name, types) in enumerate(new.items())}
    of_real = train_classifier(
        train.X[~stops][:, genes], real[~stops], train.X[stops][:, genes], real[stops], n_types, seed
    )
    of_new = train_classifier(made["train"], new["train"], made["stop"], new["stop"], n_types, seed)
    results = {
        ("real", "real"): (real_test, predict_types(of_real, test.X[:, genes])),
        ("real", "synthetic"): (new["test"], predict_types(of_real, made["test"])),
        ("synthetic", "real"): (real_test, predict_types(of_new, test.X[:, genes])),
    }
    rows = [
        {"labels": "cell types", "trained on": a, "tested on": b} | scores(*pair) for (a, b), pair in results.items()
    ]
    if classes is not None:
        names = np.asarray(classes)
        rows += [
            {"labels": "classes", "trained on": a, "tested on": b} | scores(*(names[part] for part in pair))
            for (a, b), pair in results.items()
        ]
    return pd.DataFrame(rows)
