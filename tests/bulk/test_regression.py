"""Reference profiles, their signature genes, the NNLS baseline, and the two steps of the regression."""

import numpy as np
import pandas as pd
import scipy.optimize
import scipy.sparse as sp
import scipy.stats

from lib.bulk import regression
from lib.bulk.regression import Reference, non_negative_least_squares, reference_profiles, signature_genes


def reference_of(mean: np.ndarray, names: list[str] | None = None, n_cells: int = 1000) -> Reference:
    """Profiles with the variance of Poisson counts."""
    names = names or [f"G{i}" for i in range(mean.shape[1])]
    return Reference(names, [f"type {k}" for k in range(len(mean))], mean, mean, np.full(len(mean), n_cells))


def test_moments_equal_numpys_and_unlabelled_cells_are_ignored():
    counts = np.random.default_rng(0).poisson(3.0, (40, 5)).astype(np.float32)
    types = np.repeat([0, 1, -1], [20, 15, 5])
    reference = reference_profiles(sp.csr_matrix(counts), types, list("ABCDE"), ["x", "y"])
    for k in range(2):
        np.testing.assert_allclose(reference.mean[k], counts[types == k].mean(axis=0))
        np.testing.assert_allclose(reference.variance[k], counts[types == k].var(axis=0, ddof=1), rtol=1e-6)
    np.testing.assert_array_equal(reference.n_cells, [20, 15])
    # a gene not observed in few cells keeps a positive variance
    counts = sp.csr_matrix(np.array([[4.0, 1.0], [4.0, 1.0], [0.0, 1.0]], dtype=np.float32))
    reference = reference_profiles(counts, np.array([0, 0, 1]), ["A", "B"], ["x", "y"])
    assert reference.mean[1, 0] == 0 and reference.variance[1, 0] == 0.5 * 2.0  # half the Poisson variance of the mean


def test_signature_genes_differ_between_types_and_are_not_technical():
    names = ["CD3E", "ACTB", "RPL3", "CD19", "MT-CO1", "RPS6KA1", "Rps6"]
    mean = np.array([[10.0, 5, 10, 0, 5, 9, 9], [1.0, 5, 1, 9, 5, 1, 1]])
    mean[1] *= mean[0].sum() / mean[1].sum()  # so that ACTB differs as little as the totals
    for n_cells in (100, 2):  # with two cells no z reaches the limit: the largest are used
        selected = {names[g] for g in signature_genes(reference_of(mean, names, n_cells))}
        assert {"CD3E", "CD19", "RPS6KA1"} <= selected <= {"CD3E", "CD19", "RPS6KA1", "ACTB"}


def test_genes_of_small_fold_are_used_where_a_type_has_no_others():
    mean = np.tile(np.random.default_rng(0).lognormal(1, 1, 200), (3, 1))
    mean[:, :10] = 0.05
    mean[0, :10] = 0.5  # ten clear markers; thirty genes differ by a factor of 1.5; the others do not differ
    mean[1, 100:130] *= 1.5
    reference = reference_of(mean, n_cells=10**6)
    selected = set(signature_genes(reference))
    assert set(range(10)) <= selected <= {*range(10), *range(100, 130)} and len(selected) >= 20  # twenty of each type
    sizes = np.array([1.0, 5.0, 0.3])[:, None]  # of cells, which do not matter
    np.testing.assert_array_equal(signature_genes(reference.times(sizes)), sorted(selected))


def test_per_length_divides_by_gene_length_and_keeps_the_scale():
    reference = reference_of(np.array([[4.0, 2.0, 1.0], [2.0, 2.0, 1.0]]), ["A", "B", "C"])
    back = Reference.from_checkpoint(reference.to_checkpoint())
    assert back.gene_names == reference.gene_names and (back.mean == reference.mean).all()
    per_length = back.per_length(pd.Series({"A": 2000.0, "B": 1000.0}))
    assert per_length.gene_names == ["A", "B"]
    np.testing.assert_allclose(per_length.mean / per_length.mean[0, 0], [[1, 1], [0.5, 1]])
    np.testing.assert_allclose(per_length.mean.sum(), 10)
    np.testing.assert_allclose(per_length.variance, per_length.mean**2 / reference.mean[:, :2])


def test_the_baseline_finds_exact_mixtures():
    rng = np.random.default_rng(0)
    reference = reference_of(rng.lognormal(0, 1.5, (3, 200)))
    true = rng.dirichlet(np.ones(3), 5)
    bulk = pd.DataFrame(true @ reference.mean * 7, columns=reference.gene_names)
    np.testing.assert_allclose(regression.nnls_on_markers(bulk, reference), true, atol=1e-6)


def test_least_squares_equal_scipys_for_one_gram_matrix_and_for_many():
    rng = np.random.default_rng(0)
    designs, y = rng.random((6, 20, 5)), rng.normal(0, 1, (6, 20))
    grams, targets = np.einsum("nij,nik->njk", designs, designs), np.einsum("nij,ni->nj", designs, y)
    expected = [scipy.optimize.nnls(a, b)[0] for a, b in zip(designs, y)]
    np.testing.assert_allclose(non_negative_least_squares(grams, targets), expected, atol=1e-8)
    expected = [scipy.optimize.nnls(designs[0], b)[0] for b in y]
    np.testing.assert_allclose(non_negative_least_squares(grams[:1], y @ designs[0]), expected, atol=1e-8)


def test_platform_factors_minimise_their_objective():
    rng = np.random.default_rng(0)
    fitted = rng.lognormal(0, 1, (5, 8))
    y, variance = fitted * rng.lognormal(0, 0.8, 8), np.full((1, 8), 0.3)
    factors = regression.fit_platform_factors(y, fitted, np.ones((1, 8)), variance, n_steps=60)
    for g in range(8):

        def objective(log_f, g=g):
            errors = ((y[:, g] - np.exp(log_f) * fitted[:, g]) ** 2).sum() / (2 * variance[0, g])
            return errors - scipy.stats.t.logpdf(log_f, regression.PLATFORM_FREEDOM, scale=regression.PLATFORM_SD)

        best = scipy.optimize.minimize_scalar(objective, bounds=(-4, 4), method="bounded", options={"xatol": 1e-9})
        np.testing.assert_allclose(np.log(factors[0, g]), best.x, atol=1e-4)
