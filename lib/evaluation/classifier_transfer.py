"""Cell types predicted by XGBoost, trained on real or on synthetic cells and tested on the other: the test of Generative genomics.

    real -> real            trained on train cells, tested on test cells
    real -> synthetic       the same classifier, tested on generated cells: is the predicted type the requested one?
    synthetic -> real       trained on generated cells, tested on test cells

Early stopping uses further cells of the same kind, real or synthetic. Precision, recall and F1 are means over types (macro) and over
cells (weighted): for the types and, if a table maps types to coarse classes, for the classes.

Source: the Generative genomics project (RodMcN/generative-genomics: README, configuration, sources). From there: the numbers of
synthetic cells per type (1,000 to test on, 2,000 to train on, 100 for early stopping), the classifier's settings, cells weighted
such that all types weigh the same, principal components of standardised genes as features, and classes_e_annd_5.csv, which maps the
126 cell types of E-ANND-5 to coarse classes (25 in the source's README, 24 in its table).
"""

from collections.abc import Callable
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp
from sklearn.metrics import precision_recall_fscore_support
from sklearn.utils.class_weight import compute_sample_weight

from lib.data.components import fit_components, n_components
from lib.data.counts import hold_out, row_blocks
from lib.data.tables import read_table

N_COMPONENTS = 2500  # principal components of the train cells, at most
SETTINGS = {
    "objective": "multi:softprob", "eval_metric": "mlogloss", "tree_method": "hist", "max_depth": 6, "learning_rate": 0.05,
    "subsample": 0.9, "colsample_bytree": 0.9, "reg_alpha": 1.0, "reg_lambda": 1.0,
}  # fmt: skip
ROUNDS, PATIENCE = 500, 10  # of boosting: at most, with a tree per type in each; without a lower error
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
    table = read_table(path)
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
    features: np.ndarray, types: np.ndarray, stop_features: np.ndarray, stop_types: np.ndarray, n_types: int, seed: int
):  # fmt: skip
    """XGBoost on features of cells; the second set of cells is for early stopping. Returns xgboost.Booster."""
    import xgboost

    matrix, stop_matrix = (
        xgboost.DMatrix(x, label=y, weight=compute_sample_weight("balanced", y))
        for x, y in ((features, types), (stop_features, stop_types))
    )
    settings = SETTINGS | {"num_class": n_types, "seed": seed}
    return xgboost.train(
        settings, matrix, ROUNDS, evals=[(stop_matrix, "stop")], early_stopping_rounds=PATIENCE, verbose_eval=False
    )


def predict_types(classifier, features: np.ndarray) -> np.ndarray:
    """Most probable type of each cell, by the classifier's best round: (n_cells,) integers."""
    import xgboost

    rounds = (0, classifier.best_iteration + 1)
    return classifier.predict(xgboost.DMatrix(features), iteration_range=rounds).argmax(axis=1)


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
    n_types = len(train.obs["cell_type"].cat.categories)
    real, real_test = (cells.obs["cell_type"].cat.codes.to_numpy(dtype=np.int64) for cells in (train, test))
    stops = hold_out(real, STOPPING_FRACTION, np.random.default_rng(seed))
    fit = train.X[~stops]
    pca = fit_components(
        lambda: (block for _, block in row_blocks(fit)), n_components(N_COMPONENTS, fit.shape[0], fit.shape[1])
    )
    known = np.flatnonzero(np.bincount(real, minlength=n_types))  # types that have train cells
    types = {name: np.repeat(known, n) for name, n in (("test", n_test), ("train", n_train), ("stop", n_stop))}
    synthetic = {name: pca.of(sample(y, seed + i)) for i, (name, y) in enumerate(types.items())}
    by_real = train_classifier(pca.of(fit), real[~stops], pca.of(train.X[stops]), real[stops], n_types, seed)
    by_synthetic = train_classifier(synthetic["train"], types["train"], synthetic["stop"], types["stop"], n_types, seed)
    test_features = pca.of(test.X)
    predictions = {
        ("real", "real"): (real_test, predict_types(by_real, test_features)),
        ("real", "synthetic"): (types["test"], predict_types(by_real, synthetic["test"])),
        ("synthetic", "real"): (real_test, predict_types(by_synthetic, test_features)),
    }
    labels = {"cell types": np.arange(n_types)} | ({} if classes is None else {"classes": np.asarray(classes)})
    rows = [
        {"labels": name, "trained on": trained, "tested on": tested} | precision_recall_f1(of[true], of[predicted])
        for name, of in labels.items()
        for (trained, tested), (true, predicted) in predictions.items()
    ]
    return pd.DataFrame(rows)
