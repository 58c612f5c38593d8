"""Effects of donors: estimates against known effects, shrinkage between its two ends, new donors against the covariance."""

import anndata as ad
import numpy as np
import pytest
import scipy.sparse as sp
from helpers import CPU, STAGES, Workplace, simulated_dataset, trained_gmvae

from lib.data.batches import CellDataset
from lib.data.counts import write_h5ad
from lib.models import conditions, sampling
from lib.training import load_checkpoint

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


def composition(counts: sp.csr_matrix) -> np.ndarray:
    total = np.asarray(counts.sum(axis=0)).ravel()
    return total / total.sum()


@pytest.mark.parametrize("in_memory", [True, False])
def test_counts_of_conditions_are_sums_over_the_cells_of_both_parts(in_memory):
    counts, types, donor, _ = simulated_donors()
    types[::7] = -1
    is_held_out = np.arange(len(types)) % 3 == 0
    parts = [np.flatnonzero(~is_held_out), np.flatnonzero(is_held_out)]
    parts = [CellDataset(counts, types, CPU, rows, in_memory=in_memory) for rows in parts]
    scale = np.array([2.0, 3.0, 4.0, 5.0])  # a correction that depends on the type, as that of outliers does
    parts = [part.corrected(lambda x, y: sp.csr_matrix(sp.diags(scale[y]) @ x, dtype=np.float32)) for part in parts]
    group = conditions.read_conditions(donor, *parts, N_TYPES)
    for c, k in np.ndindex(3, N_TYPES):
        mine = (donor == c) & (types == k)
        np.testing.assert_allclose(group.counts[c, k], scale[k] * np.asarray(counts[mine].sum(axis=0)).ravel())
        assert group.n_cells[c, k] == mine.sum()
        assert group.frequency()[c, k] == pytest.approx(mine.sum() / (types == k).sum())
    new_types = np.repeat(np.arange(N_TYPES), 20_000)
    assigned = conditions.assign({"condition_frequency": group.frequency()}, new_types, seed=0)
    for k in range(N_TYPES):  # as frequent as in the train cells of the type
        share = np.bincount(assigned[new_types == k], minlength=3) / 20_000
        np.testing.assert_allclose(share, group.frequency()[:, k], atol=0.01)


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
    group = conditions.read_conditions(donor, CellDataset(counts, types, CPU), None, N_TYPES)
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


def test_new_conditions_vary_as_the_known_ones_do_and_as_much_as_is_unknown_of_these():
    rng = np.random.default_rng(4)
    effects, variance = rng.normal(1, 2, (5, 2, 6)), rng.uniform(0, 3, (3, 6))
    new = []
    known = {}
    for name, part in (
        ("condition_shift", slice(2)),
        ("condition_log_ratio", slice(2, None)),
    ):  # two dimensions of z, genes
        known |= conditions.Effects(effects[:, :, part], variance[:, part]).tensors(name)
    for seed in range(3000):
        prior = conditions.add_new(known, seed)
        assert len(prior["condition_shift"]) == len(prior["condition_log_ratio"]) == 6
        new.append(np.concatenate([prior[f"condition_{name}"][5] for name in ("shift", "log_ratio")], axis=1).ravel())
    true = effects.reshape(5, -1)
    noise = np.kron(np.ones((2, 2)), np.diag(variance[0])) + np.diag(variance[1:].ravel())
    covariance = np.cov(true.T) + noise
    np.testing.assert_allclose(np.cov(np.array(new).T), covariance, atol=0.12 * covariance.max())
    correction = np.where(np.arange(6) < 2, 0, (variance[0] + variance[1:]) / 2).ravel()
    np.testing.assert_allclose(np.mean(new, axis=0), true.mean(axis=0) - correction, atol=0.2)


def test_generated_cells_have_the_means_and_library_sizes_of_their_donor():
    counts, types, donor, _ = simulated_donors()
    is_test = np.random.default_rng(5).random(len(types)) < 0.3
    is_test &= donor != 2
    model = trained_gmvae(counts[~is_test], types[~is_test], epochs=30)
    train = CellDataset(counts, types, CPU, np.flatnonzero(~is_test))
    sampling.fit_prior(model, train, None, 0, donor)
    for c in (0, 1):
        new = sampling.generate(model, np.repeat(np.arange(N_TYPES), 400), 0, condition_idx=np.full(1200, c))
        log_library = np.log(new.sum(axis=1).A1)
        assert np.exp(np.median(log_library)) == pytest.approx([400, 800][c], rel=0.1)
        assert log_library.std() < 0.3  # of one donor, not of all
        for k in range(N_TYPES):
            made = composition(new[400 * k : 400 * (k + 1)])
            mine, other = (composition(counts[is_test & (types == k) & (donor == d)]) for d in (c, 1 - c))
            to_mine, to_other = (np.mean(np.abs(np.log((made + 1e-4) / (real + 1e-4)))) for real in (mine, other))
            assert to_mine < 0.3 * to_other
    both = sampling.generate(model, np.zeros(1000, int), 0)
    donors = conditions.assign(model.prior, np.zeros(1000, int), 0)
    assert np.bincount(donors)[2] < 60
    library = both.sum(axis=1).A1
    assert np.median(library[donors == 1]) > 1.6 * np.median(library[donors == 0])


def test_stages_generate_cells_of_all_donors_of_one_and_of_a_new_one_and_refuse_others(tmp_path):
    adata, place, new = simulated_dataset(n_cells=480), Workplace(tmp_path), {}
    donor = np.tile(["d1", "d2", "d3"], 160)
    adata.obs = adata.obs.assign(donor=donor, barcode=adata.obs_names)
    adata.X = sp.csr_matrix(sp.diags(np.where(donor == "d2", 3.0, 1.0)) @ adata.X, dtype=np.float32)
    adata.uns |= {"dataset": "simulated", "split_id": "one"}
    place.data.mkdir()
    for name, rows in (("train", slice(0, None, 2)), ("test", slice(1, None, 2))):
        write_h5ad(adata[rows].copy(), place.data / f"{name}.h5ad")
    place.main(STAGES[3], CONDITION="donor", EPOCHS=2)
    # all cells have a label
    assert not load_checkpoint(place.models / "gmvae.pt", STAGES[3])["arguments"]["with_classifier"]
    for wanted in (None, "d2", "new"):
        place.main(STAGES[5], EVALUATE=False, CELL_COUNTS="60", GENERATE_CONDITION=wanted)
        new[wanted] = ad.read_h5ad(place.data / "generated.h5ad").obs
        assert set(new[wanted]["cell_type"].value_counts()) == {60}
    assert set(new[None]["donor"]) == {"d1", "d2", "d3"}
    total = new[None].groupby("donor", observed=True)["library_size"].median()
    assert total["d2"] > 2 * total["d1"] and total["d2"] > 2 * total["d3"]
    assert set(new["d2"]["donor"]) == {"d2"} and set(new["new"]["donor"]) == {"new"}
    with pytest.raises(ValueError, match="'d9'; expected d1, d2, d3, new or none"):
        place.main(STAGES[5], EVALUATE=False, CELL_COUNTS="60", GENERATE_CONDITION="d9")
    for column, message in (("patient", "of obs"), ("barcode", "480 values"), ("cell_type", "another name")):
        with pytest.raises(ValueError, match=message):
            conditions.condition_column(adata.obs, column, 10)
    with pytest.raises(ValueError, match="expected gmvae and posterior"):
        place.main(STAGES[3], CONDITION="donor", PRIOR="gaussian", EPOCHS=1)
