"""The XGBoost tests of Generative genomics: good and mislabelled synthetic cells have different scores; scores by hand."""

import json

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from helpers import FEW, ROOT, STAGES, simulated_dataset

pytest.importorskip("xgboost")

import xgboost

from lib.evaluation.classifier_transfer import precision_recall_f1, read_classes, train_classifier, transfer_table


@pytest.fixture(scope="module")
def cells():
    adata = simulated_dataset(n_cells=1200)
    return adata[:0:-2].copy(), adata[::2].copy()


def copies_of(train: ad.AnnData):
    """The best possible generator: real cells of the type."""
    codes = train.obs["cell_type"].cat.codes.to_numpy()

    def sample(types, seed):
        rng = np.random.default_rng(seed)
        return train.X[[rng.choice(np.flatnonzero(codes == k)) for k in types]]

    return sample


SIZES = {"n_test": 40, "n_train": 80, "n_stop": 20}


@pytest.fixture(scope="module")
def swapped(cells) -> pd.DataFrame:
    """The table of a generator that swaps two types, which are of the same class."""
    train, test = cells
    good = copies_of(train)
    return transfer_table(
        train, test, lambda types, seed: good(np.array([1, 0, 2])[types], seed), 0, ["x", "x", "y"], **SIZES
    )


def test_good_cells_score_as_real_ones_and_mislabelled_cells_do_not(cells, swapped):
    train, test = cells
    table = transfer_table(train, test, copies_of(train), 0, **SIZES).set_index(["trained on", "tested on"])
    assert (table["F1 (macro)"] > 0.9).all()
    mislabelled = swapped[swapped["labels"] == "cell types"].set_index(["trained on", "tested on"])["F1 (macro)"]
    assert mislabelled[("real", "real")] > 0.9
    assert mislabelled[("real", "synthetic")] < 0.5 and mislabelled[("synthetic", "real")] < 0.5


def test_a_wrong_type_of_the_right_class_counts_as_right(swapped):
    assert (swapped.loc[swapped["labels"] == "classes", "F1 (macro)"] > 0.9).all()


def test_scores_by_hand():
    """Type 0: 2 of 3 found, 2 of 2 right; type 1: 1 of 1 found, 1 of 2 right."""
    found = precision_recall_f1(np.array([0, 0, 0, 1]), np.array([0, 0, 1, 1]))
    assert found["precision (macro)"] == pytest.approx((1 + 1 / 2) / 2) and found["recall (macro)"] == pytest.approx(
        (2 / 3 + 1) / 2
    )
    assert found["F1 (macro)"] == pytest.approx((0.8 + 2 / 3) / 2) and found["F1 (weighted)"] == pytest.approx(
        0.75 * 0.8 + 0.25 * 2 / 3
    )


def test_the_table_of_classes(tmp_path):
    path = tmp_path / "classes.csv"
    path.write_text("cell type,class\nB,lymphoid\nT,lymphoid\nMono,myeloid\n")
    assert read_classes(path, ["T", "Mono"]) == ["lymphoid", "myeloid"]
    with pytest.raises(ValueError, match="names no class for NK"):
        read_classes(path, ["T", "NK"])
    path.write_text("a,b,c\n1,2,3\n")
    with pytest.raises(ValueError, match=r"has 3 columns \(a, b, c\); expected two"):
        read_classes(path, ["T"])


def test_the_classes_of_e_annd_5_are_shipped():
    table = pd.read_csv(ROOT / "lib" / "evaluation" / "classes_e_annd_5.csv")
    assert table["cell type"].is_unique and len(table) == 126 and table["class"].nunique() == 24
    found = read_classes(ROOT / "lib" / "evaluation" / "classes_e_annd_5.csv", ["TREG", "NK", "FIBROBLAST_XVII"])
    assert found == ["T Cells", "Innate Lymphoid Cells", "Fibroblasts"]


def test_rare_types_weigh_as_much_as_frequent_ones(cells, monkeypatch):
    """All cells of a type together have the same weight for each type, in training and in early stopping."""
    weights = []

    class Matrix(xgboost.DMatrix):
        def __init__(self, data, label=None, weight=None):
            super().__init__(data, label=label, weight=weight)
            if label is not None:
                weights.append([weight[label == k].sum() for k in np.unique(label)])

    monkeypatch.setattr(xgboost, "DMatrix", Matrix)
    types = np.repeat([0, 1, 2], [5, 50, 20])
    features = np.random.default_rng(0).normal(size=(75, 4)) + types[:, None]
    classifier = train_classifier(features, types, features[::3], types[::3], 3, seed=0)
    assert len(weights) == 2 and all(np.allclose(found, found[0]) for found in weights)
    settings = json.loads(classifier.save_config())["learner"]["gradient_booster"]["tree_train_param"]
    assert (settings["max_depth"], float(settings["eta"]), float(settings["alpha"])) == ("6", pytest.approx(0.05), 1.0)


@pytest.mark.slow
def test_stage_5_prints_the_tables(pipeline, tmp_path, capsys):
    types = list(ad.read_h5ad(pipeline.data / "test.h5ad").obs["cell_type"].cat.categories)
    pd.DataFrame({"cell type": types, "class": ["T" if "CD4" in t or "CD8" in t else "other" for t in types]}).to_csv(
        tmp_path / "classes.csv", index=False
    )
    constants = {
        **FEW,
        "OUTPUT": str(tmp_path / "cells.h5ad"),
        "FIG_DIR": str(tmp_path),
        "CELL_COUNTS": "test",
    }
    pipeline.main(
        STAGES[5], XGBOOST=True, XGBOOST_CELLS=(20, 30, 10), CLASS_FILE=str(tmp_path / "classes.csv"), **constants
    )
    table = pd.read_csv(tmp_path / "xgboost.csv")
    assert len(table) == 6 and table["F1 (macro)"].between(0, 1).all() and "synthetic" in capsys.readouterr().out
    fine, coarse = (table[table["labels"] == labels].reset_index() for labels in ("cell types", "classes"))
    assert (coarse["F1 (weighted)"] > fine["F1 (weighted)"]).all()
