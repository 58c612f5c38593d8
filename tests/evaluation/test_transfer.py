"""The XGBoost tests of Generative genomics: good and mislabelled synthetic cells have different scores; scores by hand."""

import numpy as np
import pandas as pd
import pytest
from helpers import ROOT, simulated_dataset

pytest.importorskip("xgboost")

from lib.evaluation.transfer import precision_recall_f1, read_classes, train_classifier, transfer_table


def test_mislabelled_cells_score_worse_than_real_ones():
    """F1 of the three tests, for types and for classes, of a generator that swaps two types of the same class."""
    cells = simulated_dataset(n_cells=1200)
    names = ["none", "type 0", "type 1", "type 2"]  # a type without cells, before the others
    cells.obs["cell_type"] = cells.obs["cell_type"].cat.set_categories(names)
    train, test = cells[:0:-2].copy(), cells[::2].copy()
    codes = train.obs["cell_type"].cat.codes.to_numpy()

    def sample(types, seed):
        """Real cells, of another type."""
        rng = np.random.default_rng(seed)
        return train.X[[rng.choice(np.flatnonzero(codes == k)) for k in np.array([0, 2, 1, 3])[types]]]

    table = transfer_table(train, test, sample, 0, ["z", "x", "x", "y"], n_test=40, n_train=80, n_stop=20)
    f1 = table.set_index(["labels", "trained on", "tested on"])["F1 (macro)"]
    types = f1["cell types"]
    assert types[("real", "real")] > 0.9
    assert types[("real", "synthetic")] < 0.5 and types[("synthetic", "real")] < 0.5
    assert (f1["classes"] > 0.9).all()  # a wrong type of the right class counts as right


def test_scores_by_hand():
    """Type 0: 2 of 3 recognised, 2 of 2 right; type 1: 1 of 1 recognised, 1 of 2 right."""
    scores = precision_recall_f1(np.array([0, 0, 0, 1]), np.array([0, 0, 1, 1]))
    macro = [scores[f"{name} (macro)"] for name in ("precision", "recall", "F1")]
    assert macro == pytest.approx([(1 + 1 / 2) / 2, (2 / 3 + 1) / 2, (0.8 + 2 / 3) / 2])
    assert scores["F1 (weighted)"] == pytest.approx(0.75 * 0.8 + 0.25 * 2 / 3)


def test_the_table_of_classes(tmp_path):
    path = tmp_path / "classes.csv"
    path.write_text("cell type,class\nB,lymphoid\nT,lymphoid\nMono,myeloid\n")
    assert read_classes(path, ["T", "Mono"]) == ["lymphoid", "myeloid"]
    with pytest.raises(ValueError, match="names no class for NK"):
        read_classes(path, ["T", "NK"])
    path.write_text("a,b,c\n1,2,3\n")
    with pytest.raises(ValueError, match=r"has the columns a, b, c; expected two"):
        read_classes(path, ["T"])
    shipped = ROOT / "lib" / "evaluation" / "classes_e_annd_5.csv"
    assert read_classes(shipped, ["TREG", "NK"]) == ["T Cells", "Innate Lymphoid Cells"]
    table = pd.read_csv(shipped)
    assert table["cell type"].is_unique and len(table) == 126 and table["class"].nunique() == 24


def test_rare_types_weigh_as_much_as_frequent_ones():
    """Without any information, all types are equally probable, however frequent they are."""
    types = np.repeat([0, 1, 2], [5, 50, 20])
    features = np.zeros((75, 4))
    classifier = train_classifier(features, types, features[::2], types[::2], seed=0)
    np.testing.assert_allclose(classifier.predict_proba(features[:1]), 1 / 3, atol=0.02)
    assert classifier.get_params()["max_depth"] == 6 and classifier.get_params()["learning_rate"] == 0.05
