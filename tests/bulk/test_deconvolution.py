"""The regression on simulated bulks: exact mixtures, another platform, one sample, spread and intervals, warnings, refused input."""

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from helpers import ROOT

from lib.bulk import deconvolution
from lib.bulk.deconvolution import MODES, PLATFORM_TYPE_SD, Estimate, deconvolve, merged_proportions, spread
from lib.bulk.regression import fit_regression, reference_profiles, signature_genes
from lib.bulk.rna_content import to_rna
from lib.evaluation.metrics import mae

DATA = ROOT.parent / "shared" / "data"
N_TYPES, N_GENES = 4, 400


@pytest.fixture(scope="module")
def world():
    """A reference of 60 simulated cells per type, its true means, and 30 vectors of proportions."""
    rng = np.random.default_rng(0)
    means = rng.lognormal(0, 1, N_GENES) * np.where(rng.random((N_TYPES, N_GENES)) < 0.15, 8, 1)
    types = np.repeat(np.arange(N_TYPES), 60)
    counts = rng.poisson(means[types] * rng.gamma(5, 1 / 5, (len(types), N_GENES)))
    names = [f"G{i}" for i in range(N_GENES)]
    reference = reference_profiles(sp.csr_matrix(counts.astype(np.float32)), types, names, list("abcd"))
    return reference, means, rng.dirichlet(np.ones(N_TYPES), 30)


def bulk_of(world, platform_sd: float = 0.0) -> pd.DataFrame:
    reference, means, true = world
    rng = np.random.default_rng(1)
    values = true @ means * np.exp(rng.normal(0, platform_sd, N_GENES)) * rng.lognormal(0, 0.5, (len(true), 1))
    return pd.DataFrame(values * 1000, [f"s{i}" for i in range(len(true))], reference.gene_names)


def content_of(reference, rna_per_cell, log_sd: float = 0.0) -> pd.DataFrame:
    return pd.DataFrame({"rna_per_cell": rna_per_cell, "log_sd": log_sd}, reference.cell_types)


def test_true_profiles_give_true_proportions_and_platform_factors(world):
    reference, means, true = world
    exact = reference._replace(mean=means, n_cells=np.full(N_TYPES, 10**9))
    for options in ({}, {"per_sample": True}, {"adaptive": False}):
        np.testing.assert_allclose(fit_regression(true @ means, exact, **options).proportions, true, atol=2e-3)
    log_f = np.random.default_rng(5).normal(0, 0.7, N_GENES)
    fitted = np.log(fit_regression(true @ means * np.exp(log_f), reference._replace(mean=means)).factors[0])
    assert np.corrcoef(fitted, log_f)[0, 1] > 0.95


def test_adaptation_reduces_the_error_on_another_platform(world):
    bulk = bulk_of(world, platform_sd=1.0)
    shared, per_sample, unadapted = (mae(world[2], deconvolve(world[0], bulk, m, 0).proportions) for m in MODES)
    assert shared < 0.03 and shared < 0.6 * unadapted and per_sample < 1.2 * unadapted
    outliers = bulk_of(world, 0.5)
    outliers.iloc[:, 3::40] *= 30
    assert mae(world[2], deconvolve(world[0], outliers, n_members=0).proportions) < 0.015


@pytest.mark.parametrize("mode", MODES)
def test_one_sample_works_and_units_and_order_of_genes_do_not_matter(world, mode):
    bulk = bulk_of(world, 0.3)
    one = deconvolve(world[0], bulk.iloc[[4]], mode, n_members=3, seed=7)
    np.testing.assert_allclose(one.proportions.sum(axis=1), 1)
    assert mae(world[2][[4]], one.proportions) < 0.12
    shuffled = bulk.iloc[[4]].sample(frac=1, axis=1, random_state=0).assign(other=1e6) * 37
    again = deconvolve(world[0], shuffled, mode, n_members=3, seed=7)
    np.testing.assert_allclose(again.proportions, one.proportions, atol=1e-6)
    np.testing.assert_allclose(again.spread, one.spread, atol=1e-6)
    if mode != "regression":  # samples are estimated independently
        together = deconvolve(world[0], bulk, mode, n_members=0).proportions.iloc[[4]]
        np.testing.assert_allclose(together, one.proportions, atol=2e-3)


def test_the_spread_is_about_as_wide_as_the_errors(world):
    clean, far = (deconvolve(world[0], bulk_of(world, sd), n_members=8) for sd in (0.0, 1.0))
    assert clean.spread.mean(axis=None) < far.spread.mean(axis=None)
    assert np.mean(np.abs(far.proportions - world[2]) < 3 * far.spread + 0.005) > 0.8


def test_spread_holds_the_ensemble_and_errors_that_all_samples_share():
    p, sd = np.array([[0.2, 0.3, 0.5]]), np.array([0.03, 0.0, 0.04])
    members = p + np.array([[[0.02, -0.02, 0.0]], [[-0.02, 0.02, 0.0]]])
    own = spread(p, members, 0 * sd)
    np.testing.assert_allclose(own[0], 0.02 * np.sqrt([2, 2, 0]))  # two members, one degree of freedom
    np.testing.assert_allclose(spread(p, members, 0 * sd, np.array([[1.0, 1.0, 0.0]])), [[0.0]], atol=1e-12)
    assert np.isnan(spread(p, members[:1], sd)).all()
    shifted = p * np.exp(np.random.default_rng(0).normal(0, sd, (20_000, 1, 3)))  # small errors, sampled
    shifted /= shifted.sum(axis=2, keepdims=True)
    np.testing.assert_allclose(spread(p, members, sd), np.hypot(own, shifted.std(axis=0)), rtol=0.03)


@pytest.mark.parametrize("n_members", [3, 10])
def test_intervals_of_normal_members_cover_95_percent(n_members):
    """Members differ from their centre as the estimate differs from the truth; two deviations with ddof 0 cover 91 % of ten."""
    rng = np.random.default_rng(0)
    truth, n = np.array([0.4, 0.6]), 40_000
    errors = rng.normal(0, 0.01, (n_members + 1, n, 1)) * [1, -1]
    proportions = pd.DataFrame(truth + errors[0], columns=["a", "b"])
    sd = pd.DataFrame(spread(proportions.to_numpy(), truth + errors[1:], np.zeros(2)), columns=["a", "b"])
    estimate = Estimate(proportions, sd, 1 - proportions, sd, pd.DataFrame(), pd.DataFrame(), None, None, n_members)
    for (low, high), true in ((estimate.interval(), truth), (estimate.rna_interval(), 1 - truth)):
        assert np.mean((low <= true) & (true <= high)) == pytest.approx(0.95, abs=0.005)
    low, high = estimate._replace(proportions=proportions * 0 + [0.001, 0.999]).interval()
    assert low.min(axis=None) == 0 and high.max(axis=None) == 1
    assert estimate._replace(spread=sd * np.nan, n_members=0).interval()[0].isna().all(axis=None)


def test_types_that_exchange_their_proportions_are_merged(tmp_path):
    rng = np.random.default_rng(0)
    total, part = rng.normal(0.6, 0.01, (50, 2)), rng.uniform(0.3, 0.7, (50, 2))
    members = np.stack([total * part, rng.normal(0.2, 0.01, (50, 2)), total * (1 - part)], axis=2)
    cells = pd.DataFrame([[0.3, 0.2, 0.5]] * 2, ["s1", "s2"], ["a", "b", "c"])
    merged = merged_proportions(cells, members, np.zeros(3))
    assert list(merged["sample"]) == ["s1", "s2"] and list(merged["cell_types"]) == [("a", "c")] * 2
    np.testing.assert_allclose(merged["proportion"], 0.8)
    np.testing.assert_allclose(merged["spread"], total.std(axis=0, ddof=1))
    np.testing.assert_allclose(merged["high"] - merged["low"], 2 * 2.0096 * merged["spread"], rtol=1e-4)  # t of 49
    for others in (rng.normal(0.3, 0.05, (50, 2, 3)), members[:1]):  # independent; no ensemble
        assert merged_proportions(cells, others, np.zeros(3)).empty
    samples = pd.DataFrame({"unexplained_genes": [], "is_unlike_reference": []})
    deconvolution.write(Estimate(cells, cells, cells, cells, merged, samples, cells, None), tmp_path)
    assert list(pd.read_csv(tmp_path / "predicted_merged.csv")["cell_types"]) == ["a + c"] * 2


def test_spread_holds_platform_and_mrna_content_where_the_bulk_is_of_another_platform(world):
    reference, bulk = world[0], bulk_of(world, 0.5)
    contents = [content_of(reference, reference.mean.sum(axis=1), sd) for sd in (0.0, 0.5)]
    sums, known, unknown = (deconvolve(reference, bulk, n_members=4, content=c) for c in (None, *contents))
    pd.testing.assert_frame_equal(sums.proportions, known.proportions)
    platform = known.spread**2 - sums.spread**2
    assert (platform >= 0).all(axis=None) and (platform > 0).mean(axis=None) > 0.8
    np.testing.assert_allclose(unknown.spread**2 - sums.spread**2, platform * (1 + (0.5 / PLATFORM_TYPE_SD) ** 2))
    pd.testing.assert_frame_equal(unknown.rna_spread, known.rna_spread)  # of RNA the content does not matter


def test_missing_genes_are_tolerated_with_a_message_or_refused(world, capsys):
    bulk = bulk_of(world)
    estimate = deconvolve(world[0], bulk.iloc[:, : int(0.7 * N_GENES)], n_members=0)
    assert "the bulk has 7" in capsys.readouterr().out
    assert mae(world[2], estimate.proportions) < 0.03
    with pytest.raises(
        ValueError, match=r"the bulk has \d+% of the \d+ signature genes.* expected at least 50%.*GENE_IDS"
    ):
        deconvolve(world[0], bulk.iloc[:, :100], n_members=0)
    with pytest.raises(ValueError, match="1 of 30 bulk samples have no expression in the"):
        deconvolve(world[0], bulk.mul([0] + [1] * 29, axis=0), n_members=0)


def test_a_bulk_of_something_else_is_recognised_and_unexplained_genes_are_named(world, tmp_path, capsys):
    reference, bulk, genes = world[0], bulk_of(world), signature_genes(world[0])
    estimate = deconvolve(reference, bulk, "regression-unadapted", n_members=0)
    mixed = estimate.proportions.to_numpy() @ reference.mean
    a, b = (np.log1p(v[3, genes] / v[3, genes].sum() * 1e4) for v in (bulk.to_numpy(), mixed))
    assert estimate.samples["reference_r"].iloc[3] == pytest.approx(np.corrcoef(a, b)[0, 1])
    other = bulk.set_axis(np.random.default_rng(0).permutation(bulk.columns), axis=1)
    unlike = deconvolve(reference, other, n_members=0)
    assert unlike.samples["is_unlike_reference"].all() and (unlike.samples["reference_r"] < 0.5).all()
    deconvolution.write(unlike, tmp_path)
    out = capsys.readouterr().out
    assert "WARNING: s3 is unlike the reference" in out and "proportions of cells:\n" in out and "+-" not in out
    estimate = deconvolve(reference, bulk.assign(G7=200 * bulk["G7"]), n_members=3)
    assert not estimate.samples["is_unlike_reference"].any()
    assert all(genes[0] == "G7" for genes in estimate.samples["unexplained_genes"])
    deconvolution.write(estimate, tmp_path)
    assert f"{estimate.proportions.iloc[0, 0]:.3f} +- {estimate.spread.iloc[0, 0]:.3f}" in capsys.readouterr().out
    samples, rna = (pd.read_csv(tmp_path / f"predicted_{name}.csv") for name in ("samples", "rna_proportions"))
    assert samples["unexplained_genes"].str.startswith("G7").all() and "RNA" in rna.columns[0]


def test_mrna_contents_turn_shares_of_rna_into_shares_of_cells(world):
    reference, means, _ = world
    cells = np.array([[0.4, 0.3, 0.2, 0.1], [0.1, 0.1, 0.1, 0.7]])
    content = np.array([4.0, 1.0, 1.0, 2.0])  # of real cells; the reference's counts do not show it
    bulk = pd.DataFrame(cells * content @ (means / means.sum(axis=1, keepdims=True)), columns=reference.gene_names)
    known = deconvolve(reference, bulk, n_members=0, content=content_of(reference, content))
    np.testing.assert_allclose(known.proportions, cells, atol=0.04)
    np.testing.assert_allclose(known.rna_proportions, to_rna(cells, content), atol=0.04)
    other = reference.times(np.array([1.0, 0.2, 1.0, 5.0])[:, None])  # counts per cell do not change the share of RNA
    by_counts = deconvolve(other, bulk, n_members=0)
    np.testing.assert_allclose(by_counts.rna_proportions, known.rna_proportions, atol=1e-6)
    expected = by_counts.rna_proportions / other.mean.sum(axis=1)
    np.testing.assert_allclose(by_counts.proportions, expected.div(expected.sum(axis=1), axis=0))


def test_cell_type_expression_divides_the_deviation_among_types_that_express_the_gene(world):
    signature = np.array([[10.0, 0.0, 5.0], [0.0, 10.0, 5.0]])
    amounts = np.array([[0.5, 0.5]])
    fitting = deconvolution.cell_type_expression(amounts @ signature, amounts, signature)[0]
    np.testing.assert_allclose(fitting, signature)
    # gene 0, which only type 0 expresses, is higher in the bulk than the 5 that are fitted
    expression = deconvolution.cell_type_expression(np.array([[6.0, 4.5, 4.5]]), amounts, signature)[0]
    assert expression[1, 0] == 0 and expression[0, 2] == expression[1, 2] < 5
    # one gene of one type: 10 + .5 * 100 * (6 - 5) / (.25 * 100 + (.5 * 5)^2)
    np.testing.assert_allclose(expression[0, 0], 10 + 50 / (25 + 6.25))
    estimate = deconvolve(world[0], bulk_of(world), "regression-per-sample", n_members=0)
    for k in range(N_TYPES):
        assert np.corrcoef(np.log1p(estimate.expression[:, k].mean(axis=0)), np.log1p(world[1][k]))[0, 1] > 0.95


@pytest.mark.slow
@pytest.mark.skipif(not (DATA / "lung_cell_lines.h5ad").exists(), reason="needs the lung lines in ../shared/data")
def test_real_mixtures_of_rna():
    cells = ad.read_h5ad(DATA / "lung_cell_lines.h5ad")
    bulk = pd.read_csv(DATA / "lung_rnamix_bulk_counts.csv.gz", index_col=0).astype(float)
    types = cells.obs["cell_type"].astype("category").cat
    true = pd.read_csv(DATA / "lung_rnamix_proportions.csv", index_col=0).loc[bulk.index, list(types.categories)]
    reference = reference_profiles(cells.X, types.codes.to_numpy(), list(cells.var_names), list(types.categories))
    estimate = to_rna(deconvolve(reference, bulk, n_members=0).proportions.to_numpy(), reference.mean.sum(axis=1))
    assert mae(true, estimate) < 0.08  # a constant: 0.27
