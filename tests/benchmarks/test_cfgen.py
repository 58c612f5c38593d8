"""The distances of CFGen's protocol against sums and linear programmes written out."""

import cfgen
import numpy as np
import pytest
from helpers import simulated_dataset
from scipy.optimize import linprog

RNG = np.random.default_rng(0)
X, Y = RNG.normal(size=(6, 3)), RNG.normal(0.5, 2, (6, 3))


def test_wasserstein_is_the_best_transport():
    cost = ((X[:, None] - Y[None]) ** 2).sum(axis=2)
    sums = np.vstack([np.kron(np.eye(6), np.ones(6)), np.kron(np.ones(6), np.eye(6))])
    transport = linprog(cost.ravel(), A_eq=sums, b_eq=np.full(12, 1 / 6))
    assert cfgen.wasserstein(X, Y) ** 2 == pytest.approx(transport.fun)
    assert cfgen.wasserstein(X, X + np.array([3.0, 0, 4.0])) == pytest.approx(5.0)  # a translation
    with pytest.raises(ValueError, match="got 6 and 5 cells"):
        cfgen.wasserstein(X, Y[:5])


def test_mmd_is_the_biased_sum_over_pairs_and_kernels():
    def mean(first: np.ndarray, second: np.ndarray) -> float:
        squared = [np.sum((a - b) ** 2) for a in first for b in second]
        return np.mean([sum(np.exp(-d / (2 * s**2)) for s in (0.01, 0.1, 1, 10, 100)) for d in squared])

    assert cfgen.mmd(X, Y) == pytest.approx(mean(X, X) + mean(Y, Y) - 2 * mean(X, Y))
    apart = 1e6 * np.arange(8.0)[:, None]  # every kernel sees the pairs of a point with itself alone
    assert cfgen.mmd(apart[:4], apart[4:]) == pytest.approx(10 / 4)


def test_cells_are_placed_in_the_components_of_the_test_cells():
    test, others = simulated_dataset(n_cells=80, seed=1), simulated_dataset(n_cells=40, seed=2)
    place = cfgen.space_of(test)
    logs = [np.log1p(1e4 * x / x.sum(axis=1, keepdims=True)) for x in (cells.X.toarray() for cells in (test, others))]
    mean = logs[0].mean(axis=0)
    axes = np.linalg.svd(logs[0] - mean, full_matrices=False)[2][: cfgen.N_PCS]
    for cells, values in zip((test, others), logs):
        np.testing.assert_allclose(np.abs(place(cells)), np.abs((values - mean) @ axes.T), atol=2e-3)


def test_every_type_with_two_test_cells_counts_equally():
    test, cells = simulated_dataset(n_cells=90, seed=1), simulated_dataset(n_cells=90, seed=1)
    labels = np.repeat(["a", "b", "c"], [60, 29, 1])  # the cells of a are the same, the only one of c is not compared
    test.obs["cell_type"] = cells.obs["cell_type"] = labels
    cells.X[60:] = cells.X[60:][:, ::-1]
    place = cfgen.space_of(test)
    b = [place(part[labels == "b"]) for part in (test, cells)]
    expected = cfgen.mmd(*b) / 2, cfgen.wasserstein(*b) / 2
    np.testing.assert_allclose(cfgen.distances(place, test, cells[::-1].copy()), expected, rtol=1e-2)
