"""The regression with platform factors: exact mixtures, another platform, one sample, warnings, and refused input."""

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.optimize
import scipy.sparse as sp
import scipy.stats
from helpers import ROOT

from lib.bulk.deconvolution import (
    PLATFORM_TYPE_SD,
    cell_type_expression,
    deconvolve,
    ensemble,
    inseparable_types,
    merged_proportions,
    reconstruction_r,
    spread,
)
from lib.bulk.reference import reference_profiles
from lib.bulk.regression import (
    PLATFORM_FREEDOM,
    PLATFORM_SD,
    fit_platform_factors,
    fit_regression,
    non_negative_least_squares,
    scaled,
)
from lib.bulk.rna_content import to_cells, to_rna
from lib.evaluation.metrics import mae

N_TYPES, N_GENES = 4, 400


@pytest.fixture(scope="module")
def world():
    """A reference of 60 simulated cells per type, its true means, and 30 vectors of proportions."""
    rng = np.random.default_rng(0)
    means = rng.lognormal(0, 1, N_GENES) * np.where(rng.random((N_TYPES, N_GENES)) < 0.15, 8, 1)
    types = np.repeat(np.arange(N_TYPES), 60)
    counts = rng.poisson(means[types] * rng.gamma(5, 1 / 5, (len(types), N_GENES)))
    reference = reference_profiles(
        sp.csr_matrix(counts.astype(np.float32)), types, [f"G{i}" for i in range(N_GENES)], list("abcd")
    )
    return reference, means, rng.dirichlet(np.ones(N_TYPES), 30)


def bulk_of(world, platform_sd: float = 0.0, seed: int = 1) -> pd.DataFrame:
    reference, means, true = world
    rng = np.random.default_rng(seed)
    values = true @ means * np.exp(rng.normal(0, platform_sd, N_GENES)) * rng.lognormal(0, 0.5, (len(true), 1))
    return pd.DataFrame(values * 1000, [f"s{i}" for i in range(len(true))], reference.gene_names)


def test_least_squares_equal_scipys_for_one_gram_matrix_and_for_many():
    rng = np.random.default_rng(0)
    designs = rng.random((6, 20, 5))
    y = rng.normal(0, 1, (6, 20))
    grams, targets = np.einsum("nij,nik->njk", designs, designs), np.einsum("nij,ni->nj", designs, y)
    expected = [scipy.optimize.nnls(a, b)[0] for a, b in zip(designs, y)]
    np.testing.assert_allclose(non_negative_least_squares(grams, targets), expected, atol=1e-8)
    same = non_negative_least_squares(grams[:1], targets)

    def minimum(target):
        return scipy.optimize.minimize(
            lambda x: x @ grams[0] @ x / 2 - target @ x, np.ones(5), bounds=[(0, None)] * 5, tol=1e-12
        ).x

    one_by_one = [minimum(target) for target in targets]
    np.testing.assert_allclose(same, one_by_one, atol=1e-4)


def test_platform_factors_minimise_their_objective():
    rng = np.random.default_rng(0)
    fitted = rng.lognormal(0, 1, (5, 8))
    y, variance = fitted * rng.lognormal(0, 0.8, 8), np.full((1, 8), 0.3)
    factors = np.ones((1, 8))
    for _ in range(20):
        factors = fit_platform_factors(y, fitted, factors, variance)
    for g in range(8):

        def objective(log_f, g=g):
            errors = ((y[:, g] - np.exp(log_f) * fitted[:, g]) ** 2).sum() / (2 * variance[0, g])
            return errors - scipy.stats.t.logpdf(log_f, PLATFORM_FREEDOM, scale=PLATFORM_SD)

        best = scipy.optimize.minimize_scalar(objective, bounds=(-4, 4), method="bounded", options={"xatol": 1e-9})
        np.testing.assert_allclose(np.log(factors[0, g]), best.x, atol=1e-4)


def test_true_profiles_give_true_proportions(world):
    reference, means, true = world
    exact = reference._replace(mean=means, n_cells=np.full(N_TYPES, 10**9))
    bulk = true @ means
    for how in ({}, {"per_sample": True}, {"adaptive": False}):
        np.testing.assert_allclose(fit_regression(bulk, exact, **how).proportions, true, atol=2e-3)


def test_adaptation_reduces_the_error_on_another_platform(world):
    _, _, true = world
    bulk = bulk_of(world, platform_sd=1.0)
    errors = {
        mode: mae(true, deconvolve(world[0], bulk, mode, n_members=0).proportions)
        for mode in ("regression", "regression-per-sample", "regression-unadapted")
    }
    assert errors["regression"] < 0.03
    assert errors["regression"] < 0.6 * errors["regression-unadapted"]
    assert errors["regression-per-sample"] < 1.2 * errors["regression-unadapted"]


def test_fitted_factors_are_the_simulated_platform_factors(world):
    reference, means, true = world
    rng = np.random.default_rng(5)
    log_f = rng.normal(0, 0.7, N_GENES)
    found = np.log(fit_regression(true @ means * np.exp(log_f), reference._replace(mean=means)).factors[0])
    assert np.corrcoef(found, log_f)[0, 1] > 0.95


@pytest.mark.parametrize("mode", ["regression", "regression-per-sample", "regression-unadapted"])
def test_one_sample_works_and_units_and_order_of_genes_do_not_matter(world, mode):
    bulk = bulk_of(world, 0.3)
    one = deconvolve(world[0], bulk.iloc[[4]], mode, n_members=3)
    assert one.proportions.shape == (1, N_TYPES) and one.spread.shape == (1, N_TYPES)
    np.testing.assert_allclose(one.proportions.sum(axis=1), 1)
    assert mae(world[2][[4]], one.proportions) < 0.12
    shuffled = bulk.iloc[[4]].sample(frac=1, axis=1, random_state=0).assign(other=1e6) * 37
    np.testing.assert_allclose(
        deconvolve(world[0], shuffled, mode, n_members=0).proportions, one.proportions, atol=1e-6
    )
    if mode != "regression":  # samples are estimated independently
        np.testing.assert_allclose(
            deconvolve(world[0], bulk, mode, n_members=0).proportions.iloc[[4]], one.proportions, atol=2e-3
        )


def test_genes_with_a_thirtyfold_platform_factor_hardly_change_the_proportions(world):
    bulk = bulk_of(world, 0.5)
    bulk.iloc[:, 3::40] *= 30
    assert mae(world[2], deconvolve(world[0], bulk, n_members=0).proportions) < 0.015


def test_duplicate_samples_get_equal_estimates_and_runs_are_reproducible(world):
    bulk = bulk_of(world, 0.5)
    first, second = (deconvolve(world[0], bulk, n_members=3, seed=7) for _ in range(2))
    pd.testing.assert_frame_equal(first.proportions, second.proportions)
    pd.testing.assert_frame_equal(first.spread, second.spread)
    twice = pd.concat([bulk, bulk.rename(index=lambda name: name + "x")])
    found = deconvolve(world[0], twice, n_members=0).proportions.to_numpy()
    np.testing.assert_allclose(found[:30], found[30:], atol=1e-8)


def test_the_spread_is_about_as_large_as_the_errors(world):
    reference, _, true = world
    clean, far = (ensemble(bulk_of(world, sd).to_numpy(), reference, 8, 0).std(axis=0) for sd in (0.0, 1.0))
    assert clean.shape == true.shape and clean.mean() < far.mean()
    off = np.abs(deconvolve(reference, bulk_of(world, 1.0), n_members=0).proportions.to_numpy() - true)
    assert np.mean(off < 3 * far + 0.005) > 0.8


def test_spread_by_hand():
    p = np.array([[0.2, 0.3, 0.5]])
    members = p + np.array([[[0.02, -0.02, 0.0]], [[-0.02, 0.02, 0.0]]])
    sd = np.array([0.3, 0.0, 0.4])
    shared = [
        np.hypot(0.2 * 0.8 * 0.3, 0.2 * 0.5 * 0.4),  # of type 0: its own error, and that of type 2
        np.hypot(0.3 * 0.2 * 0.3, 0.3 * 0.5 * 0.4),
        np.hypot(0.5 * 0.2 * 0.3, 0.5 * 0.5 * 0.4),
    ]
    np.testing.assert_allclose(spread(p, members, sd)[0], np.hypot([0.02, 0.02, 0.0], shared))
    np.testing.assert_allclose(spread(p, members, 0 * sd, np.array([[1.0, 1.0, 0.0]])), [[0.0]], atol=1e-12)
    assert np.isnan(spread(p, members[:0], sd)).all()
    errors = np.random.default_rng(0).normal(0, 0.1 * sd, (20_000, 1, 3))  # small errors, sampled
    scaled_up = p * np.exp(errors)
    scaled_up /= scaled_up.sum(axis=2, keepdims=True)
    np.testing.assert_allclose(spread(p, members * 0 + p, 0.1 * sd), scaled_up.std(axis=0), rtol=0.03)


def test_types_that_exchange_their_proportions_are_merged():
    rng = np.random.default_rng(0)
    total, part = rng.normal(0.6, 0.01, (50, 2)), rng.uniform(0.3, 0.7, (50, 2))
    members = np.stack([total * part, rng.normal(0.2, 0.01, (50, 2)), total * (1 - part)], axis=2)
    assert inseparable_types(members) == [[0, 2]]
    assert inseparable_types(rng.normal(0.3, 0.05, (50, 2, 3))) == [] == inseparable_types(members[:1])
    cells = pd.DataFrame([[0.3, 0.2, 0.5]] * 2, ["s1", "s2"], ["a", "b", "c"])
    merged = merged_proportions(cells, members, np.zeros(3))
    np.testing.assert_allclose(merged.loc[("s1", "a + c"), "proportion"], 0.8)
    np.testing.assert_allclose(merged["spread"], total.std(axis=0))
    assert merged_proportions(cells, rng.normal(0.3, 0.05, (50, 2, 3)), np.zeros(3)).empty


def test_spread_holds_platform_and_mrna_content_where_the_bulk_is_of_another_platform(world):
    reference, bulk = world[0], bulk_of(world, 0.5)
    counts = reference.mean.sum(axis=1)
    contents = [pd.DataFrame({"rna_per_cell": counts, "log_sd": sd}, reference.cell_types) for sd in (0.0, 0.5)]
    sums, known, unknown = (deconvolve(reference, bulk, n_members=4, content=c) for c in (None, *contents))
    pd.testing.assert_frame_equal(sums.proportions, known.proportions)
    p = known.proportions.to_numpy()
    own = np.square(PLATFORM_TYPE_SD * p * (1 - p))
    others = np.square(PLATFORM_TYPE_SD * p) * (np.square(p).sum(axis=1, keepdims=True) - np.square(p))
    np.testing.assert_allclose(known.spread**2, sums.spread**2 + own + others, rtol=1e-6)
    with_content = (own + others) * (PLATFORM_TYPE_SD**2 + 0.5**2) / PLATFORM_TYPE_SD**2
    np.testing.assert_allclose(unknown.spread**2, sums.spread**2 + with_content, rtol=1e-6)
    pd.testing.assert_frame_equal(unknown.rna_spread, known.rna_spread)  # of RNA the content does not matter


def test_missing_genes_are_tolerated_with_a_message_or_refused(world, capsys):
    bulk = bulk_of(world)
    estimate = deconvolve(world[0], bulk.iloc[:, : int(0.7 * N_GENES)], n_members=0)
    assert "the bulk has 7" in capsys.readouterr().out
    assert mae(world[2], estimate.proportions) < 0.03
    with pytest.raises(
        ValueError, match=r"the bulk has \d+% of the \d+ signature genes, expected at least 50%.*GENE_IDS"
    ):
        deconvolve(world[0], bulk.iloc[:, :100], n_members=0)
    with pytest.raises(ValueError, match="1 of 30 bulk samples have no expression in the"):
        deconvolve(world[0], bulk.mul([0] + [1] * 29, axis=0), n_members=0)


def test_a_bulk_of_something_else_is_warned_of_and_unexplained_genes_are_named(world):
    reference = world[0]
    bulk = bulk_of(world)
    assert (deconvolve(reference, bulk, n_members=0).samples["warning"] == "").all()
    other = bulk.set_axis(np.random.default_rng(0).permutation(bulk.columns), axis=1)
    assert (deconvolve(reference, other, n_members=0).samples["warning"] == "unlike the reference").all()
    bulk["G7"] *= 200
    assert (deconvolve(reference, bulk, n_members=0).samples["unexplained_genes"].str.startswith("G7")).all()


def test_reconstruction_r_by_numpy(world):
    reference, _, true = world
    bulk = bulk_of(world).to_numpy()
    mixed = true @ reference.mean
    a, b = (np.log1p(v[3] / v[3].sum() * 1e4) for v in (bulk, mixed))
    np.testing.assert_allclose(reconstruction_r(bulk, reference, true)[3], np.corrcoef(a, b)[0, 1])


def test_rna_shares_by_hand():
    np.testing.assert_allclose(to_rna(np.array([[0.5, 0.5]]), np.array([1000, 3000])), [[0.25, 0.75]])
    np.testing.assert_allclose(to_cells(np.array([[0.25, 0.75]]), np.array([1000, 3000])), [[0.5, 0.5]])


def test_published_mrna_contents_turn_shares_of_rna_into_shares_of_cells(world):
    reference, means, _ = world
    cells = np.array([[0.4, 0.3, 0.2, 0.1], [0.1, 0.1, 0.1, 0.7]])
    content = np.array([4.0, 1.0, 1.0, 2.0])  # of real cells; the reference's counts do not show it
    bulk = pd.DataFrame(cells * content @ (means / means.sum(axis=1, keepdims=True)), columns=reference.gene_names)
    table = pd.DataFrame({"rna_per_cell": content, "log_sd": 0.0}, reference.cell_types)
    found = deconvolve(reference, bulk, n_members=3, content=table)
    np.testing.assert_allclose(found.proportions, cells, atol=0.04)
    np.testing.assert_allclose(
        found.rna_proportions, cells * content / (cells * content).sum(axis=1, keepdims=True), atol=0.04
    )
    by_counts = deconvolve(reference, bulk, n_members=3)
    pd.testing.assert_frame_equal(found.rna_proportions, by_counts.rna_proportions)
    assert np.abs(by_counts.proportions.to_numpy() - cells).max() > 0.1
    counts = reference.mean.sum(axis=1)
    expected = by_counts.rna_proportions / counts
    np.testing.assert_allclose(by_counts.proportions, expected.div(expected.sum(axis=1), axis=0))
    large = table.assign(rna_per_cell=content * [1e6, 1, 1, 1])  # cells of so much RNA are few
    few = deconvolve(reference, bulk, n_members=3, content=large)
    assert (few.proportions["a"] < 1e-4).all() and (few.spread["a"] < 1e-4).all() and (few.spread["b"] > 1e-3).all()


def test_counts_per_cell_of_a_type_do_not_change_its_share_of_rna(world):
    reference = world[0]
    bulk = bulk_of(world, 0.5)
    scale = np.array([1.0, 0.2, 1.0, 5.0])[:, None]
    other = reference._replace(mean=reference.mean * scale, variance=reference.variance * scale**2)
    first, second = (deconvolve(r, bulk, n_members=0).rna_proportions for r in (reference, other))
    np.testing.assert_allclose(first, second, atol=1e-6)


def test_cell_type_expression_divides_the_deviation_among_types_that_express_the_gene():
    signature = np.array([[10.0, 0.0, 5.0], [0.0, 10.0, 5.0]])
    amounts = np.array([[0.5, 0.5]])
    bulk = amounts @ signature  # 5, 5, 5: no deviation
    np.testing.assert_allclose(cell_type_expression(bulk, amounts, signature)[0], signature)
    more = np.array([[6.0, 4.5, 4.5]])  # gene 0, which only type 0 expresses, is higher
    found = cell_type_expression(more, amounts, signature)[0]
    assert 10 < found[0, 0] < 12 and found[1, 0] == 0
    assert found[0, 2] == found[1, 2] < 5
    # one gene of one type: 10 + .5 * 100 * (6 - 5) / (.25 * 100 + (.5 * 5)^2)
    np.testing.assert_allclose(found[0, 0], 10 + 50 / (25 + 6.25))


def test_high_resolution_expression_follows_the_sample(world):
    reference, means, _ = world
    bulk = bulk_of(world)
    estimate = deconvolve(reference, bulk, "regression-per-sample", n_members=0)
    assert estimate.expression.shape == (30, N_TYPES, N_GENES) and (estimate.expression >= 0).all()
    assert deconvolve(reference, bulk, n_members=0).expression is None
    for k in range(N_TYPES):
        assert np.corrcoef(np.log1p(estimate.expression[:, k].mean(axis=0)), np.log1p(means[k]))[0, 1] > 0.95


def test_scaled_samples_have_the_total_of_the_mean_cell(world):
    reference = world[0]
    np.testing.assert_allclose(
        scaled(bulk_of(world).to_numpy(), reference).sum(axis=1), reference.mean.mean(axis=0).sum()
    )


LUNG = ROOT.parent / "shared" / "data"


@pytest.mark.skipif(not (LUNG / "lung_cell_lines.h5ad").exists(), reason="needs lung_cell_lines.h5ad")
def test_real_mixtures_of_rna():
    cells = ad.read_h5ad(LUNG / "lung_cell_lines.h5ad")
    bulk = pd.read_csv(LUNG / "lung_rnamix_bulk_counts.csv.gz", index_col=0).astype(float)
    types = cells.obs["cell_type"].astype("category").cat
    true = pd.read_csv(LUNG / "lung_rnamix_proportions.csv", index_col=0).loc[bulk.index, list(types.categories)]
    reference = reference_profiles(cells.X, types.codes.to_numpy(), list(cells.var_names), list(types.categories))
    estimate = to_rna(deconvolve(reference, bulk, n_members=0).proportions.to_numpy(), reference.mean.sum(axis=1))
    assert mae(true, estimate) < 0.08  # a constant: 0.27
