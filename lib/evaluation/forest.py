"""A random forest (Breiman, Machine Learning 2001): many trees, each fitted to a bootstrap sample of the cells.

The trees are those of sklearn's RandomForestClassifier with the same seed. That class also copies and checks the settings of every
tree, which takes as long as fitting the tree to a hundred cells.
"""

import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import sklearn
from sklearn.tree import DecisionTreeClassifier

N_TREES = 300


def forest_probability(features: np.ndarray, labels: np.ndarray, new_features: np.ndarray, seed: int) -> np.ndarray:
    """Probability of each label for new cells, (n_new, n_labels): the mean over the trees. Labels in the order of `np.unique`.

    Parameters
    ----------
    features, new_features
        Cells x features.
    labels
        (n_cells,) of `features`.
    """
    x, new = (np.ascontiguousarray(values, dtype=np.float32) for values in (features, new_features))
    names, y = np.unique(labels, return_inverse=True)
    seeds = np.random.RandomState(seed).randint(np.iinfo(np.int32).max, size=N_TREES)

    def sum_of_trees(some: np.ndarray) -> np.ndarray:
        total = np.zeros((len(new), len(names)))
        with sklearn.config_context(skip_parameter_validation=True):
            for tree_seed in some:
                rows = np.random.RandomState(tree_seed).randint(0, len(x), len(x), dtype=np.int32)
                weight = np.bincount(rows, minlength=len(x)).astype(np.float64)
                tree = DecisionTreeClassifier(max_features="sqrt", random_state=int(tree_seed))
                total += tree.fit(x, y, sample_weight=weight, check_input=False).predict_proba(new, check_input=False)
        return total

    n_threads = os.cpu_count() or 1
    with ThreadPoolExecutor(n_threads) as pool:
        return np.sum(list(pool.map(sum_of_trees, np.array_split(seeds, n_threads))), axis=0) / N_TREES
