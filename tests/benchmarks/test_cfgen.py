"""The distances of CFGen's protocol against sums, permutations and linear programmes written out."""

import itertools

import cfgen
import numpy as np
import pytest
from helpers import simulated_dataset
from scipy.optimize import linprog

RNG = np.random.default_rng(0)
X, Y = RNG.normal(size=(6, 3)), RNG.normal(0.5, 2, (6, 3))


def test_wasserstein_is_the_best_pairing():
    pairings = itertools.permutations(range(6))
    by_hand = min(sum(np.sum((X[i] - Y[j]) ** 2) for i, j in enumerate(pairing)) / 6 for pairing in pairings)
    assert cfgen.wasserstein(X, Y) == pytest.approx(np.sqrt(by_hand))
    assert cfgen.wasserstein(X, X + np.array([3.0, 0, 4.0])) == pytest.approx(5.0)  # a translation


def test_no_plan_that_splits_points_is_better_than_a_pairing():
    cost = ((X[:, None] - Y[None]) ** 2).sum(axis=2)
    sums = np.vstack([np.kron(np.eye(6), np.ones(6)), np.kron(np.ones(6), np.eye(6))])
    transport = linprog(cost.ravel(), A_eq=sums, b_eq=np.full(12, 1 / 6))
    assert cfgen.wasserstein(X, Y) ** 2 == pytest.approx(transport.fun)


def test_wasserstein_needs_as_many_cells():
    with pytest.raises(ValueError, match="got 6 and 5 cells"):
        cfgen.wasserstein(X, Y[:5])


def test_mmd_is_the_biased_sum_over_pairs_and_kernels():
    def kernel(a: np.ndarray, b: np.ndarray) -> float:
        return sum(np.exp(-(np.linalg.norm(a - b) ** 2) / (2 * s**2)) for s in (0.01, 0.1, 1, 10, 100))

    def mean(first: np.ndarray, second: np.ndarray) -> float:
        return np.mean([kernel(a, b) for a in first for b in second])

    assert cfgen.mmd(X, Y) == pytest.approx(mean(X, X) + mean(Y, Y) - 2 * mean(X, Y))
    assert cfgen.mmd(X, X) == pytest.approx(0, abs=1e-12)
    apart = 1e6 * np.arange(8.0)[:, None]  # every kernel sees the pairs of a point with itself alone
    assert cfgen.mmd(apart[:4], apart[4:]) == pytest.approx(10 / 4)


def test_cells_are_placed_in_the_components_of_the_test_cells():
    test, others = simulated_dataset(n_cells=80, seed=1), simulated_dataset(n_cells=40, seed=2)
    space = cfgen.space_of(test)

    def logs(cells):
        x = cells.X.toarray().astype(np.float64)
        return np.log1p(1e4 * x / x.sum(axis=1, keepdims=True))

    mean = logs(test).mean(axis=0)
    axes = np.linalg.svd(logs(test) - mean, full_matrices=False)[2][: cfgen.N_PCS]
    for cells in (test, others):
        np.testing.assert_allclose(np.abs(space.place(cells)), np.abs((logs(cells) - mean) @ axes.T), atol=2e-3)


def test_every_type_with_two_test_cells_counts_equally():
    test, cells = simulated_dataset(n_cells=90, seed=1), simulated_dataset(n_cells=90, seed=1)
    labels = np.repeat(["a", "b", "c"], [60, 29, 1])
    test.obs["cell_type"] = cells.obs["cell_type"] = labels
    cells.X.data[cells.X.indptr[89] :] *= 1e4  # counts of the type with one cell
    space = cfgen.space_of(test)
    same = cfgen.distances(space, test, cells[::-1].copy())
    np.testing.assert_allclose(same, 0, atol=1e-3)
    cells.X[60:89] = cells.X[60:89][:, ::-1]
    b = [space.place(part[labels == "b"]) for part in (test, cells)]
    other = cfgen.distances(space, test, cells)
    assert other["W2"] == pytest.approx(cfgen.wasserstein(*b) / 2, rel=1e-3)
    assert other["MMD"] == pytest.approx(cfgen.mmd(*b) / 2, rel=1e-3)
