"""The bulk encoder: it shifts the generated cells towards the state of the cells in the bulk."""

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch
from helpers import STAGES, trained_gmvae

from lib.bulk import bulk_encoder
from lib.bulk.bulk_encoder import BulkEncoder
from lib.data.batches import CellDataset
from lib.data.counts import log_normalize
from lib.models.sampling import Shift, fit_prior, generate
from lib.training import Trainer, tensor_batches

CPU = torch.device("cpu")
pytestmark = pytest.mark.slow  # all but two share one trained GMVAE and encoder
N_TYPES, N_GENES = 3, 60
GENES, TYPES = [f"GENE{i}" for i in range(N_GENES)], np.arange(600) % N_TYPES


def two_state_cells(n_cells: int, responds: np.ndarray | float, seed: int) -> ad.AnnData:
    """Three types whose cells are resting (0) or respond (1); the response changes the same twelve genes in all types."""
    rng, pattern = np.random.default_rng(seed), np.random.default_rng(0)
    profiles = pattern.lognormal(0, 1.2, (N_TYPES, N_GENES))
    change = np.zeros(N_GENES)
    change[:12] = pattern.normal(0, 1, 12)
    types = np.arange(n_cells) % N_TYPES
    mu = profiles[types] * np.exp(np.broadcast_to(responds, n_cells)[:, None] * change)
    mu *= rng.lognormal(np.log(600), 0.3, n_cells)[:, None] / mu.sum(axis=1, keepdims=True)
    counts = sp.csr_matrix(rng.poisson(rng.gamma(10.0, mu / 10.0)).astype(np.float32))
    obs = pd.DataFrame({"cell_type": pd.Categorical.from_codes(types, list("abc"))}, np.arange(n_cells).astype(str))
    return ad.AnnData(counts, obs=obs, var=pd.DataFrame(index=GENES))


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    """A GMVAE of cells of which four in ten respond; the encoder's checkpoint, the encoder, and its mixtures."""
    cells = two_state_cells(900, np.random.default_rng(1).random(900) < 0.4, seed=1)
    codes = cells.obs["cell_type"].cat.codes.to_numpy()
    model = trained_gmvae(cells.X, codes, epochs=80)
    fit_prior(model, CellDataset(cells.X, codes, CPU), None, 0)
    data = bulk_encoder.make_mixtures(model, cells, np.ones(N_GENES, bool), None, N_GENES, 1500, 300, 0.25, seed=0)
    torch.manual_seed(0)
    encoder = BulkEncoder(N_GENES, N_TYPES, data.axes["axes"].shape[1], hidden=64, n_latent=32)
    encoder.initialise(data.fit[0], np.full(N_TYPES, 300))
    about = {
        "arguments": encoder.arguments, "gene_names": list(cells.var_names[data.genes]), "cell_types": list("abc"), "axes": data.axes,
        "mean_profile": torch.from_numpy(data.mean_profile), "constants": {"MIN_GENE_COVERAGE": 0.7},
    }  # fmt: skip
    optimizer, generator = torch.optim.Adam(encoder.parameters(), lr=2e-3), torch.Generator().manual_seed(0)
    trainer = Trainer("bulk_encoder", encoder, optimizer, generator, about, tmp_path_factory.mktemp("encoder"))
    n_held_out = len(data.held_out[0])
    trainer.fit(
        60, lambda _: tensor_batches(data.fit, 100, generator),
        lambda: tensor_batches(data.held_out, n_held_out, torch.Generator().manual_seed(0)), 30, 1.0,
    )  # fmt: skip
    return model, about | {"weights": encoder.state_dict()}, encoder, data


def bulk_of(*parts: ad.AnnData) -> pd.DataFrame:
    return pd.DataFrame([np.asarray(cells.X.sum(axis=0)).ravel() for cells in parts], columns=GENES)


def type_means(counts) -> np.ndarray:
    values = log_normalize(sp.csr_matrix(counts), 1e4).toarray()
    return np.stack([values[k == TYPES].mean(axis=0) for k in range(N_TYPES)])


def test_a_bulk_shifts_generated_cells_towards_its_own_cells(fitted):
    """Cells generated for a bulk of responding (resting) cells are closer to these cells than cells generated without a bulk."""
    model, checkpoint, _, _ = fitted
    bulk_cells = [two_state_cells(600, state, seed=5 + state) for state in (0, 1)]
    shift = bulk_encoder.shift(checkpoint, bulk_of(*bulk_cells))
    unshifted, truth = type_means(generate(model, TYPES, 3)), [type_means(cells.X) for cells in bulk_cells]

    def error(a, b):
        return np.sqrt(np.square(a - b)[:, :12].mean(axis=1))  # per type, over the twelve genes that change

    for own in (0, 1):
        shifted = type_means(generate(model, TYPES, 3, shift=shift, groups=TYPES + N_TYPES * own))
        assert (error(shifted, truth[own]) < error(unshifted, truth[own])).all()
        assert error(shifted, truth[own]).mean() < 0.75 * error(unshifted, truth[own]).mean()
        assert (error(shifted, truth[1 - own]) > error(unshifted, truth[1 - own])).all()
    # the other genes hardly change
    assert np.abs(shifted - truth[1])[:, 12:].mean() < 1.3 * np.abs(unshifted - truth[1])[:, 12:].mean() + 0.02


def test_it_predicts_states_and_proportions_of_held_out_cells(fitted):
    _, checkpoint, encoder, data = fitted
    profiles, proportions, means, log_scales = data.held_out
    with torch.no_grad():
        p, *states = encoder.eval().encode(profiles)
    common = proportions >= 0.05
    for predicted, true, share in zip(states, (means, log_scales), (0.3, 0.1)):
        assert (predicted - true)[common].square().sum() < (1 - share) * true[common].square().sum()
    assert (p - proportions).abs().mean() < 0.4 * (proportions - data.fit[1].mean(dim=0)).abs().mean()
    cells = two_state_cells(600, np.arange(600) >= 300, seed=9)
    bulk = bulk_of(cells[cells.obs["cell_type"] != "a"])
    predicted, _ = bulk_encoder.predict(checkpoint, bulk)
    assert predicted.loc[0, "a"] < 0.15 and predicted.sum(axis=1)[0] == pytest.approx(1)
    with pytest.raises(
        ValueError, match="has 50% of the 60 genes that the bulk encoder was trained on, .* at least 70%"
    ):
        bulk_encoder.predict(checkpoint, bulk.iloc[:, :30])
    vectors = data.axes["axes"]
    torch.testing.assert_close(vectors.T @ vectors, torch.eye(vectors.shape[1]), atol=1e-5, rtol=0)
    assert (data.axes["spread"].diff() <= 0).all()


def test_means_and_scales_of_mixtures_are_those_of_their_cells():
    """Means and scales computed from the cells that the mixing matrix names, one by one; strong weights shift the means."""
    rng = np.random.default_rng(0)
    types = np.repeat([0, 1, -1], [200, 100, 50])
    coordinates, variance = rng.normal(size=(350, 4)), np.array([0.1, 0.2, 0.3, 0.4])
    cells_per_type = rng.integers(0, 60, (40, 2))
    mixing, means, log_scales = bulk_encoder.mix_states(cells_per_type, types, coordinates, variance, rng)
    assert mixing.shape == (40, 350) and mixing[:, types == -1].nnz == 0
    for k in range(2):
        np.testing.assert_array_equal(np.asarray(mixing[:, types == k].sum(axis=1)).ravel(), cells_per_type[:, k])
    for i in (0, 7, 31):
        sampled = np.repeat(coordinates[types == 1], mixing[i].toarray()[0][types == 1].astype(int), axis=0)
        np.testing.assert_allclose(means[i, 1], sampled.mean(axis=0), atol=1e-5)
        expected = 0.5 * np.log((sampled.var(axis=0) + variance) / (coordinates[types == 1].var(axis=0) + variance))
        np.testing.assert_allclose(log_scales[i, 1], expected, atol=1e-5)
    full = cells_per_type[:, 0] > 20
    assert np.linalg.norm(means[full, 0], axis=1).max() > 1.5 > 3 * np.linalg.norm(means[full, 0], axis=1).min()


def test_a_shift_changes_z_on_the_axes_as_the_table_of_states_says(fitted):
    """Cells shifted with the table, by hand, are those of `shift`; without a change of states nothing is shifted."""
    model, checkpoint, _, data = fitted
    bulk = bulk_of(two_state_cells(300, 0, 5), two_state_cells(300, 1, 6)).set_axis(["rest", "response"])
    table = bulk_encoder.predict(checkpoint, bulk)[1].sort_index()
    assert (table["mean"].abs() > 0.2).any() and (table["spread"] > 0).all()
    states = table.loc[("response", "c")]
    # some axes of more dimensions than axes: what is orthogonal to them stays
    axes = {name: data.axes[name] for name in ("spread", "posterior_variance")}
    axes["axes"] = torch.linalg.qr(torch.randn(15, len(states), generator=torch.Generator().manual_seed(0)))[0]
    axes["type_mean"] = torch.randn(N_TYPES, 15, generator=torch.Generator().manual_seed(1))
    matrix, offset, _ = bulk_encoder.shift(checkpoint | {"axes": axes}, bulk)
    z = torch.randn(50, 15)
    shifted = z @ matrix[N_TYPES + 2].T + offset[N_TYPES + 2]
    before, after = ((v - axes["type_mean"][2]) @ axes["axes"] / axes["spread"] for v in (z, shifted))
    expected = before.numpy() * states["spread"].to_numpy() + states["mean"].to_numpy()
    np.testing.assert_allclose(after, expected, atol=1e-3)
    orthogonal = torch.eye(15) - axes["axes"] @ axes["axes"].T
    torch.testing.assert_close(z @ orthogonal, shifted @ orthogonal, atol=1e-4, rtol=1e-3)
    weights = checkpoint["weights"].items()
    no_states = {name: value * (not name.startswith(("to_mean", "to_log"))) for name, value in weights}
    identity = bulk_encoder.shift(checkpoint | {"weights": no_states}, bulk)
    unshifted, same = generate(model, TYPES, 1), generate(model, TYPES, 1, shift=identity, groups=TYPES)
    assert (unshifted != same).nnz < 0.001 * unshifted.nnz  # the identity, up to rounding


def test_rare_and_absent_types_do_not_enter_the_loss():
    encoder = BulkEncoder(N_GENES, N_TYPES, 4, hidden=8, n_latent=8, dropout=0.0).eval()
    profiles, proportions = torch.rand(5, N_GENES), torch.tensor([[0.5, 0.0, 0.5]]).expand(5, 3)
    encoder.initialise(profiles, np.array([300, 300, bulk_encoder.MIN_CELLS - 1]))
    torch.nn.init.normal_(encoder.to_mean.weight)
    assert (encoder.encode(profiles)[1][:, 2] == 0).all()
    mean, far = torch.zeros(2, 5, N_TYPES, 4)
    far[:, 1:] = 100.0  # the absent type, and the type with few train cells
    a, b = (encoder(profiles, proportions, m, mean)["mean_loss"].item() for m in (mean, far))
    assert a == b > 0


def test_stage_5_refuses_an_encoder_of_another_gmvae(pipeline, tmp_path):
    few = {"N_STATE_SAMPLES": 300, "CELLS_PER_STATE_SAMPLE": 100, "EPOCHS": 2}
    pipeline.main(STAGES[4], NETWORK="bulk_encoder", DEVICE="cpu", FIG_DIR=str(tmp_path), **few)
    checkpoint = torch.load(pipeline.models / "bulk_encoder.pt", weights_only=True)
    torch.save(checkpoint | {"gmvae_id": "of another"}, pipeline.models / "bulk_encoder.pt")
    with pytest.raises(ValueError, match="bulk_encoder.pt was trained for another model than models/gmvae.pt"):
        pipeline.main(STAGES[5], DECONVOLUTION="bulk_encoder", DEVICE="cpu", OUTPUT=str(tmp_path / "cells.h5ad"))


def test_single_genes_change_where_the_bulk_stands_out(fitted):
    """A gene raised eightfold in the bulk rises severalfold in the cells; platform differences in all genes change hardly any gene."""
    model = fitted[0]
    identity = Shift(torch.eye(model.n_latent).expand(3, -1, -1), torch.zeros(3, model.n_latent))
    before = generate(model, TYPES, 3)
    bulk = pd.DataFrame(np.asarray(before.sum(axis=0)), columns=GENES)
    raised = bulk.assign(GENE20=8 * bulk["GENE20"])

    def with_genes(bulk: pd.DataFrame, lengths: dict[str, float] | None = None) -> Shift:
        return bulk_encoder.with_genes(identity, model, GENES, lengths, np.full((1, 3), 1 / 3), bulk, seed=0)

    after = generate(model, TYPES, 3, shift=with_genes(raised), groups=TYPES)
    share_before, share_after = (np.asarray(counts.sum(axis=0) / counts.sum()).ravel() for counts in (before, after))
    gain = share_after / share_before
    assert gain[20] > 3 and np.median(np.abs(np.delete(gain, 20) - 1)) < 0.15
    lengths = dict(zip(GENES, np.random.default_rng(1).uniform(500, 9000, N_GENES)))
    platform = with_genes(bulk * np.random.default_rng(0).lognormal(0, 1, N_GENES)).log_ratio
    by_length = with_genes(raised / np.array(list(lengths.values())), lengths).log_ratio
    missing = with_genes(raised.drop(columns="GENE20")).log_ratio
    assert all((log_ratio != 0).float().mean() < 0.15 for log_ratio in (platform, by_length, missing))
    assert by_length[0, 20] > 1 and missing[0, 20] == 0
