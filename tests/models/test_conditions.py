"""Effects of donors: estimates against known effects, shrinkage between its two ends, new donors against the covariance."""

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch
from helpers import CPU, STAGES, Workplace, simulated_dataset, trained_gmvae

from lib.data.batches import CellDataset
from lib.data.counts import write_h5ad
from lib.models import conditions, sampling

N_GENES, N_TYPES = 60, 3
N_CELLS = {"A": 500, "B": 400, "C": 20}  # of the donors


def simulated_donors(seed: int = 0, of_donor: float = 0.5, of_type: float = 0.2):
    """Counts of cells of three types and three donors, their types, their donors, and the log effects, donors x types x genes."""
    rng = np.random.default_rng(seed)
    donor = np.repeat(np.arange(len(N_CELLS)), list(N_CELLS.values()))
    cell_type_idx = rng.integers(0, N_TYPES, len(donor))
    profiles = rng.lognormal(0, 1, (N_TYPES, N_GENES))
    effect = rng.normal(0, of_donor, (3, 1, N_GENES)) + rng.normal(0, of_type, (3, N_TYPES, N_GENES))
    mu = profiles[cell_type_idx] * np.exp(effect[donor, cell_type_idx])
    library = rng.lognormal(np.log([400, 800, 400])[donor], 0.2)
    mu *= (library / mu.sum(axis=1))[:, None]
    counts = rng.poisson(rng.gamma(5.0, mu / 5.0)).astype(np.float32)
    return sp.csr_matrix(counts), cell_type_idx, donor, effect


def conditions_of(counts, cell_type_idx, donor) -> conditions.Conditions:
    return conditions.read_conditions(donor, CellDataset(counts, cell_type_idx, CPU), None, N_TYPES)


def composition(counts: sp.csr_matrix) -> np.ndarray:
    total = np.asarray(counts.sum(axis=0)).ravel()
    return total / total.sum()


@pytest.mark.parametrize("in_memory", [True, False])
def test_counts_of_conditions_are_sums_over_the_cells_of_both_parts(in_memory):
    counts, types, donor, _ = simulated_donors()
    types[::7] = -1
    is_held_out = np.arange(len(types)) % 3 == 0
    parts = [np.flatnonzero(~is_held_out), np.flatnonzero(is_held_out)]
    train, held_out = (CellDataset(counts, types, CPU, rows, in_memory=in_memory) for rows in parts)
    scale = np.array([2.0, 3.0, 4.0, 5.0])  # a correction that depends on the type, as that of outliers does
    train, held_out = (
        cells.corrected(lambda x, y: sp.csr_matrix(sp.diags(scale[y]) @ x, dtype=np.float32))
        for cells in (train, held_out)
    )
    group = conditions.read_conditions(donor, train, held_out, N_TYPES)
    for c, k in np.ndindex(3, N_TYPES):
        mine = (donor == c) & (types == k)
        np.testing.assert_allclose(group.counts[c, k], scale[k] * np.asarray(counts[mine].sum(axis=0)).ravel())
        assert group.n_cells[c, k] == mine.sum()
        assert group.frequency()[c, k] == pytest.approx(mine.sum() / (types == k).sum())
    np.testing.assert_array_equal(group.idx, donor[~is_held_out])


def test_means_are_shrunk_as_known_variances_say():
    rng = np.random.default_rng(1)
    n = rng.integers(1, 40, 2000)
    true = rng.normal(0, 0.5, 2000)
    groups = np.repeat(np.arange(2000), n)
    x = true[groups, None] + rng.normal(0, 1.5, (len(groups), 1))
    found, variance = conditions.shrunken_means(x, groups, 2001)
    mean = np.bincount(groups, x[:, 0]) / n
    np.testing.assert_allclose(found[:2000, 0], mean * 0.25 / (0.25 + 2.25 / n), atol=0.1)
    assert found[2000] == 0 and variance[2000] == pytest.approx(0.25, abs=0.03)  # without cells
    assert np.mean((found[:2000, 0] - true) ** 2) == pytest.approx(variance[:2000].mean(), rel=0.1)
    assert np.mean((found[:2000, 0] - true) ** 2) < 0.7 * np.mean((mean - true) ** 2)


def test_ratios_of_donors_are_found_and_a_small_donor_borrows():
    counts, types, donor, effect = simulated_donors()
    group = conditions_of(counts, types, donor)
    pooled = group.counts.sum(axis=0)
    profiles = np.repeat((pooled / pooled.sum(axis=1, keepdims=True))[None], 3, axis=0)
    found = conditions.fit_log_ratio(group, profiles, np.full(N_GENES, 5.0)).mean
    own = np.log(group.counts / group.counts.sum(axis=2, keepdims=True) + 1e-6) - np.log(profiles)
    weights = group.n_cells[:, :, None] / group.n_cells.sum(axis=0)[:, None]
    true = effect - np.log((weights * np.exp(effect)).sum(axis=0))  # against the mean of all donors
    for c in (0, 1):
        assert np.corrcoef(found[c].ravel(), true[c].ravel())[0, 1] > 0.97
    error_found, error_own = (np.mean((estimate[2] - true[2]) ** 2) for estimate in (found, own))
    assert error_found < 0.6 * error_own
    assert error_found < 0.8 * np.mean(true[2] ** 2)  # better than no effect as well


def prior_of(effects: np.ndarray, variance: np.ndarray) -> dict[str, torch.Tensor]:
    """Effects of two dimensions of z and of genes; their posterior variances."""
    prior = {}
    for name, columns in (("condition_shift", slice(2)), ("condition_log_ratio", slice(2, None))):
        prior |= conditions.Effects(effects[:, :, columns], variance[:, columns]).tensors(name)
    return prior


def test_new_conditions_vary_as_the_known_ones_do_and_as_much_as_is_unknown_of_these():
    rng = np.random.default_rng(4)
    effects, variance = rng.normal(1, 2, (5, 2, 6)), rng.uniform(0, 3, (3, 6))
    new = []
    for seed in range(3000):
        prior = conditions.add_new(prior_of(effects, variance), seed)
        assert len(prior["condition_shift"]) == len(prior["condition_log_ratio"]) == 6
        new.append(np.concatenate([prior[f"condition_{name}"][5] for name in ("shift", "log_ratio")], axis=1).ravel())
    known = effects.reshape(5, -1)
    noise = np.kron(np.ones((2, 2)), np.diag(variance[0])) + np.diag(variance[1:].ravel())
    covariance = np.cov(known.T) + noise
    np.testing.assert_allclose(np.cov(np.array(new).T), covariance, atol=0.12 * covariance.max())
    correction = np.where(np.arange(6) < 2, 0, (variance[0] + variance[1:]) / 2).ravel()
    np.testing.assert_allclose(np.mean(new, axis=0), known.mean(axis=0) - correction, atol=0.2)


def test_conditions_are_as_frequent_as_in_the_train_cells_of_the_type():
    frequency = torch.tensor([[0.5, 0.0], [0.2, 0.0], [0.3, 1.0]])
    types = np.repeat([0, 1], 20_000)
    found = conditions.assign({"condition_frequency": frequency}, types, seed=0)
    np.testing.assert_allclose(np.bincount(found[types == 0]) / 20_000, [0.5, 0.2, 0.3], atol=0.01)
    assert (found[types == 1] == 2).all()


def test_generated_cells_have_the_means_and_library_sizes_of_their_donor():
    counts, types, donor, _ = simulated_donors()
    is_test = np.random.default_rng(5).random(len(types)) < 0.3
    is_test &= donor != 2
    model = trained_gmvae(counts[~is_test], types[~is_test], epochs=30)
    train = CellDataset(counts, types, CPU, np.flatnonzero(~is_test))
    of_cells = conditions.read_conditions(donor, train, None, N_TYPES)
    sampling.fit_prior(model, train, None, 0, of_cells)
    new = {}
    for c in (0, 1):
        new[c] = sampling.generate(model, np.repeat(np.arange(N_TYPES), 400), 0, condition_idx=np.full(1200, c))
        library = np.asarray(new[c].sum(axis=1)).ravel()
        assert np.median(library) == pytest.approx([400, 800][c], rel=0.1)
        for k in range(N_TYPES):
            made = composition(new[c][400 * k : 400 * (k + 1)])
            mine, other = (composition(counts[is_test & (types == k) & (donor == d)]) for d in (c, 1 - c))
            to_mine, to_other = (np.mean(np.abs(np.log((made + 1e-4) / (real + 1e-4)))) for real in (mine, other))
            assert to_mine < 0.3 * to_other
    both = sampling.generate(model, np.zeros(1000, int), 0)
    donors = conditions.assign(model.prior, np.zeros(1000, int), 0)
    assert np.bincount(donors)[2] < 60
    library = np.asarray(both.sum(axis=1)).ravel()
    assert np.median(library[donors == 1]) > 1.6 * np.median(library[donors == 0])


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    adata = simulated_dataset(n_cells=480)
    adata.obs["donor"] = np.tile(["d1", "d2", "d3"], 160)
    adata.obs["barcode"] = adata.obs_names
    adata.X = sp.csr_matrix(adata.X.toarray() * np.where(adata.obs["donor"] == "d2", 3, 1)[:, None], dtype=np.float32)
    adata.uns |= {"dataset": "simulated", "split_id": "one"}
    place = Workplace(tmp_path_factory.mktemp("donors"))
    place.data.mkdir()
    for name, rows in (("train", slice(0, None, 2)), ("test", slice(1, None, 2))):
        write_h5ad(adata[rows].copy(), place.data / f"{name}.h5ad")
    place.main(STAGES[3], CONDITION="donor", EPOCHS=2)
    return place


def generated(place, **constants) -> pd.DataFrame:
    place.main(STAGES[5], EVALUATE=False, CELL_COUNTS="60", **constants)
    cells = ad.read_h5ad(place.data / "generated.h5ad")
    return cells.obs.assign(total=np.asarray(cells.X.sum(axis=1)).ravel())


def test_stages_generate_cells_of_all_donors_of_one_and_of_a_new_one(place):
    cells = generated(place)
    assert set(cells["donor"]) == {"d1", "d2", "d3"}
    total = cells.groupby("donor", observed=True)["total"].median()
    assert total["d2"] > 2 * total["d1"] and total["d2"] > 2 * total["d3"]
    cells = generated(place, GENERATE_CONDITION="d2")
    assert set(cells["donor"]) == {"d2"} and set(cells["cell_type"].value_counts()) == {60}
    assert set(generated(place, GENERATE_CONDITION="new")["donor"]) == {"new"}


def test_unknown_conditions_and_columns_are_refused(place):
    with pytest.raises(ValueError, match="'d9'; expected d1, d2, d3, new or none"):
        generated(place, GENERATE_CONDITION="d9")
    obs = ad.read_h5ad(place.data / "train.h5ad").obs
    for column, message in (("patient", "of obs"), ("barcode", "240 values"), ("cell_type", "another name")):
        with pytest.raises(ValueError, match=message):
            conditions.condition_column(obs, column, 10)
    with pytest.raises(ValueError, match="expected gmvae and posterior"):
        place.main(STAGES[3], CONDITION="donor", PRIOR="gaussian", EPOCHS=1)
