"""Cell types predicted by XGBoost, trained on real or on synthetic cells and tested on the other: the test of Generative genomics.

    real -> real            trained on train cells, tested on test cells
    real -> synthetic       the same classifier, tested on generated cells: is the predicted type the requested one?
    synthetic -> real       trained on generated cells, tested on test cells

Early stopping uses further cells, real or synthetic like those that are trained on. Precision, recall and F1 are means over types
(macro) and over cells (weighted): for the types and, if a table maps types to coarse classes, for the classes.

Source: the Generative genomics project (RodMcN/generative-genomics: README, configuration, sources): the numbers of synthetic cells,
the classifier's settings and weights (all types weigh the same), principal components of standardised genes as features, and
classes_e_annd_5.csv, which maps the 126 cell types of E-ANND-5 to coarse classes (25 in the source's README, 24 in its table).
"""

from collections.abc import Callable
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp
from sklearn.metrics import classification_report
from sklearn.utils.class_weight import compute_sample_weight

from lib.baselines.pca_cvae import fit_components
from lib.data.counts import hold_out, row_blocks
from lib.data.tables import read_table

N_COMPONENTS = 2500  # principal components of the train cells, at most
SETTINGS = {
    "tree_method": "hist", "max_depth": 6, "learning_rate": 0.05,
    "subsample": 0.9, "colsample_bytree": 0.9, "reg_alpha": 1.0, "reg_lambda": 1.0,
}  # fmt: skip
ROUNDS, PATIENCE = 500, 10  # of boosting: at most, with a tree per type in each; without a lower error
STOPPING_FRACTION = 0.125  # of the train cells of each type: 70/20/10 with 20 % test cells, as in the source


def read_classes(path: Path, cell_types: list[str]) -> list[str]:
    """The coarse class of each cell type, from a csv or tsv with a header and two columns, cell type and class.

    ValueError if there are other columns, or a type has no class.
    """
    table = read_table(path)
    if table.shape[1] != 2:
        raise ValueError(f"{path} has the columns {', '.join(table.columns)}; expected two, cell type and class")
    classes = dict(zip(table.iloc[:, 0].str.strip(), table.iloc[:, 1].str.strip()))
    missing = [name for name in cell_types if name not in classes]
    if missing:
        raise ValueError(f"{path} names no class for {', '.join(missing)}; expected a row for each cell type")
    return [classes[name] for name in cell_types]


def train_classifier(x: np.ndarray, y: np.ndarray, stop_x: np.ndarray, stop_y: np.ndarray, seed: int):
    """XGBoost on features x of cells of types y = 0, 1, ...; the second set of cells is for early stopping."""
    import xgboost

    more = {"n_estimators": ROUNDS, "early_stopping_rounds": PATIENCE, "random_state": seed}
    weight, stop_weight = (compute_sample_weight("balanced", types) for types in (y, stop_y))
    stop = {"eval_set": [(stop_x, stop_y)], "sample_weight_eval_set": [stop_weight]}
    return xgboost.XGBClassifier(**SETTINGS, **more).fit(x, y, sample_weight=weight, verbose=False, **stop)


def precision_recall_f1(true: np.ndarray, predicted: np.ndarray) -> dict[str, float]:
    """Precision, recall and F1, macro and weighted, over the types that occur in either."""
    report = classification_report(true, predicted, output_dict=True, zero_division=0)
    names = {"precision": "precision", "recall": "recall", "F1": "f1-score"}
    means = ("macro", "weighted")
    return {f"{name} ({mean})": report[f"{mean} avg"][key] for mean in means for name, key in names.items()}


def transfer_table(
    train: ad.AnnData, test: ad.AnnData, sample: Callable[[np.ndarray, int], sp.csr_matrix], seed: int,
    classes: list[str] | None = None, n_test: int = 1000, n_train: int = 2000, n_stop: int = 100,
) -> pd.DataFrame:  # fmt: skip
    """Precision, recall and F1 of the three tests: one row per test, for types and then for classes.

    train, test: real cells in memory, all with a type; sample: types (n_cells,) and a seed -> counts of as many synthetic cells;
    classes: of each type; n_test, n_train, n_stop: synthetic cells per type to test, train and stop on.
    """
    real, real_test = (cells.obs["cell_type"].cat.codes.to_numpy(dtype=np.int64) for cells in (train, test))
    known, real = np.unique(real, return_inverse=True)  # types that have train cells, and their numbers from 0
    is_stop = hold_out(real, STOPPING_FRACTION, np.random.default_rng(seed))
    fit = train.X[~is_stop]
    pca = fit_components(lambda: (block for _, block in row_blocks(fit)), N_COMPONENTS)
    types = [np.repeat(known, n) for n in (n_test, n_train, n_stop)]
    features = [pca.transform(sample(y, seed + i)) for i, y in enumerate(types)]
    by_real = train_classifier(pca.transform(fit), real[~is_stop], pca.transform(train.X[is_stop]), real[is_stop], seed)
    numbers = [np.searchsorted(known, y) for y in types[1:]]
    by_synthetic = train_classifier(features[1], numbers[0], features[2], numbers[1], seed)
    test_features = pca.transform(test.X)
    predictions = {
        ("real", "real"): (real_test, known[by_real.predict(test_features)]),
        ("real", "synthetic"): (types[0], known[by_real.predict(features[0])]),
        ("synthetic", "real"): (real_test, known[by_synthetic.predict(test_features)]),
    }
    labels = {"cell types": test.obs["cell_type"].cat.categories.to_numpy()}
    labels |= {} if classes is None else {"classes": np.asarray(classes)}
    rows = []
    for name, label in labels.items():
        for (trained, tested), (true, predicted) in predictions.items():
            row = {"labels": name, "trained on": trained, "tested on": tested}
            rows.append(row | precision_recall_f1(label[true], label[predicted]))
    return pd.DataFrame(rows)
