"""New cells: z and library size of each type, its means, zeros and outliers; random streams."""

import copy

import numpy as np
import pytest
import scipy.stats
import torch
from helpers import CPU, trained_gmvae

from lib.data.batches import CellDataset
from lib.models import sampling
from lib.models.profiles import counts_per_type
from lib.models.sampling import BLOCK_CELLS, generate, sample_z


def samples(prior, k: int, n: int = 20_000) -> np.ndarray:
    return sampling.sample_aggregated_posterior(prior, torch.full((n,), k), torch.Generator().manual_seed(0)).numpy()


@pytest.fixture(scope="module")
def fitted():
    """One type is a correlated Gaussian, one lies in two far groups, one has six cells, one none."""
    rng = np.random.default_rng(0)
    gaussian = rng.multivariate_normal([1, -1, 0], [[1, 0.8, 0], [0.8, 1, 0], [0, 0, 0.2]], 900)
    groups = rng.normal(0, 0.3, (900, 3)) + np.where(rng.random((900, 1)) < 0.5, [3.0, 0, 0], [0, -3.0, 0])
    rare = rng.normal(5, 0.5, (6, 3))
    points = np.concatenate([gaussian, groups, rare])
    types = np.repeat([0, 1, 2], [900, 900, 6])
    return points, sampling.aggregated_posterior(points, types, 4)


def test_large_types_keep_some_of_their_cells_and_others_all():
    types = np.repeat([0, 1, -1, 3], [sampling.MAX_POINTS + 80, 20, 10, 60])
    chosen = sampling.select_cells(types, 4, np.random.default_rng(0))
    assert len(set(chosen)) == len(chosen) and np.bincount(types[chosen]).tolist() == [sampling.MAX_POINTS, 20, 0, 60]


def test_mean_and_covariance_are_those_of_the_cells(fitted):
    points, prior = fitted
    for k, rows in ((0, slice(900)), (1, slice(900, 1800))):
        new = samples(prior, k)
        np.testing.assert_allclose(new.mean(axis=0), points[rows].mean(axis=0), atol=0.06)
        np.testing.assert_allclose(np.cov(new.T), np.cov(points[rows].T), rtol=0.06, atol=0.05)


def test_groups_of_cells_within_a_type_stay_apart(fitted):
    """The two groups differ in two dimensions at once: no cell has the first of one and the second of the other."""
    _, prior = fitted
    first, second, _ = samples(prior, 1).T
    assert np.mean((first > 2) & (second < -2)) < 0.01
    assert np.mean((first > 2) & (second > -1)) == pytest.approx(0.5, abs=0.05)
    assert np.mean(np.abs(first - 1.5) < 0.5) < 0.05  # hardly any between them


def test_library_sizes_keep_their_distribution_and_their_bond_with_z():
    rng = np.random.default_rng(2)
    z = rng.normal(size=(1000, 2))
    library = np.exp(0.8 * (0.9 * z[:, 0] + np.sqrt(1 - 0.81) * rng.normal(size=1000)))  # skewed, and tied to z
    prior = sampling.aggregated_posterior(np.column_stack([z, library]), np.zeros(1000, dtype=int), 1)
    new = samples(prior, 0, 5000)
    assert scipy.stats.ks_2samp(new[:, -1], library).statistic < 0.05
    tied = [scipy.stats.spearmanr(x, y).statistic for x, y in ((new[:, 0], new[:, -1]), (z[:, 0], library))]
    assert tied[0] == pytest.approx(tied[1], abs=0.05)


def test_a_rare_type_borrows_deviations_and_stays_in_its_place(fitted):
    points, prior = fitted
    new, own = samples(prior, 2), points[1800:]
    np.testing.assert_allclose(new.mean(axis=0), own.mean(axis=0), atol=0.1)
    all_deviations = prior["deviations"].numpy()
    weight = sampling.PRIOR_CELLS / (6 + sampling.PRIOR_CELLS)
    expected = (1 - weight) * own.var(axis=0) + weight * (all_deviations**2).mean(axis=0)
    np.testing.assert_allclose(new.var(axis=0), expected, rtol=0.05)
    # a type without cells lies between the others
    np.testing.assert_allclose(samples(prior, 3).mean(axis=0), points.mean(axis=0), atol=0.1)


# --- cells of a trained model


@pytest.fixture(scope="module")
def train(data) -> CellDataset:
    return CellDataset(*data[0], CPU)


def test_latent_spread_is_the_factor_of_the_distance_from_the_mean(data, train):
    model, y = trained_gmvae(*data[0], epochs=0), torch.arange(300) % 3
    for _ in range(2):  # from the prior of the model, then from that of train cells
        z = [sample_z(model, y, spread, torch.Generator().manual_seed(0))[0] for spread in (0.0, 1.0, 2.0)]
        torch.testing.assert_close(z[2] - z[0], 2 * (z[1] - z[0]), rtol=1e-3, atol=1e-4)
        assert (z[0][y == 1] == z[0][1]).all() and z[1].std() > 0.5
        sampling.fit_prior(model, train, None, seed=0)


def test_generated_cells_have_the_margins_of_their_type(data, model):
    counts, types = data[0]
    wanted = np.repeat([0, 1, 2], 400)
    cells = generate(model, wanted, seed=0)
    assert cells.dtype == np.float32 and (cells.data == np.rint(cells.data)).all() and (cells.data > 0).all()
    for k in range(3):
        real, new = counts[types == k].toarray(), cells[wanted == k].toarray()
        share = [x.sum(axis=0) / x.sum() for x in (real, new)]
        assert np.corrcoef(*np.log(np.array(share) + 1e-3))[0, 1] > 0.97
        assert np.median(new.sum(axis=1)) == pytest.approx(np.median(real.sum(axis=1)), rel=0.2)
        assert np.log(new.sum(axis=1) + 1).std() == pytest.approx(np.log(real.sum(axis=1) + 1).std(), rel=0.35)
        assert (new == 0).mean() == pytest.approx((real == 0).mean(), abs=0.04)


def test_generation_is_seeded_and_in_the_order_asked_for(model):
    wanted = np.arange(3 * BLOCK_CELLS) % 3
    a, b, c = (generate(model, wanted, seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(a.toarray(), b.toarray())
    assert (a != c).nnz > 0
    part = generate(model, wanted, 1, blocks=range(1, 3))
    np.testing.assert_array_equal(part.toarray(), a[BLOCK_CELLS:].toarray())  # whoever makes a block, it is the same
    assert list(sampling.sample(model, np.array([], dtype=int), 1)) == []


def test_after_the_fit_cells_have_the_means_of_their_type_even_if_the_model_has_others(data, train):
    model, types, y = trained_gmvae(*data[0], epochs=3), train.cell_type_idx, np.repeat([0, 1, 2], 1000)
    model.log_profiles += 0.5 * torch.randn(model.log_profiles.shape)
    real = counts_per_type(train, 3)

    def error() -> float:
        new = counts_per_type(CellDataset(generate(model, y, seed=0), y, CPU), 3)
        return np.abs(new / new.sum(axis=1, keepdims=True) - real / real.sum(axis=1, keepdims=True)).sum(axis=1).mean()

    before = error()
    sampling.fit_prior(model, train, None, seed=0)
    assert error() < 0.1 < 0.5 * before
    _, log_library = sample_z(model, torch.from_numpy(types), 1.0, torch.Generator().manual_seed(1))
    assert log_library.std().item() == pytest.approx(np.log(train.library_size).std(), rel=0.1)


def test_new_cells_have_the_outliers_of_the_model(model):
    types, other = np.resize([0, 1, 2], 600), copy.deepcopy(model)
    without = generate(model, types, 0)
    other.outlier_rate.fill_(0.01)
    other.outlier_sizes.fill_(40.0)
    added = generate(other, types, 0).data - without.data
    assert (added % 40 == 0).all() and added.sum() / without.sum() == pytest.approx(0.4, rel=0.1)
