"""The bulk encoder: it shifts the generated cells towards the state of the cells in the bulk."""

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch
from helpers import FEW, STAGES, trained_gmvae

from lib.bulk import bulk_encoder, bulk_states, sctape
from lib.bulk.bulk_encoder import BulkEncoder
from lib.data.batches import CellDataset
from lib.data.counts import log_normalize
from lib.models.sampling import Shift, fit_prior, generate
from lib.training import Trainer

CPU = torch.device("cpu")
pytestmark = pytest.mark.slow  # all but two share one trained GMVAE and encoder
N_TYPES, N_GENES = 3, 60


def two_state_cells(n_cells: int, responds: np.ndarray, seed: int) -> ad.AnnData:
    """Three types whose cells are resting (0) or respond (1); the response changes the same twelve genes in all types."""
    rng, pattern = np.random.default_rng(seed), np.random.default_rng(0)
    profiles = pattern.lognormal(0, 1.2, (N_TYPES, N_GENES))
    change = np.zeros(N_GENES)
    change[:12] = pattern.normal(0, 1, 12)
    types = np.arange(n_cells) % N_TYPES
    mu = profiles[types] * np.exp(responds[:, None] * change)
    mu *= rng.lognormal(np.log(600), 0.3, n_cells)[:, None] / mu.sum(axis=1, keepdims=True)
    counts = sp.csr_matrix(rng.poisson(rng.gamma(10.0, mu / 10.0)).astype(np.float32))
    obs = pd.DataFrame(
        {"cell_type": pd.Categorical.from_codes(types, list("abc"))}, index=[f"cell_{i}" for i in range(n_cells)]
    )
    return ad.AnnData(counts, obs=obs, var=pd.DataFrame(index=[f"GENE{i}" for i in range(N_GENES)]))


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    """A GMVAE of cells of which four in ten respond; the encoder's checkpoint, the encoder, and its mixtures."""
    cells = two_state_cells(900, np.random.default_rng(1).random(900) < 0.4, seed=1)
    codes = cells.obs["cell_type"].cat.codes.to_numpy()
    model = trained_gmvae(cells.X, codes, epochs=80)
    fit_prior(model, CellDataset(cells.X, codes, CPU), None, 0)
    made = bulk_states.make_mixtures(model, cells, np.ones(N_GENES, bool), None, N_GENES, 1500, 300, 0.25, seed=0)
    torch.manual_seed(0)
    encoder = BulkEncoder(N_GENES, N_TYPES, made.axes["axes"].shape[1], hidden=64, n_latent=32)
    encoder.initialise(made.fit[0], np.full(N_TYPES, 300))
    about = {
        "arguments": encoder.arguments,
        "gene_names": list(cells.var_names[made.genes]),
        "cell_types": list("abc"),
        "axes": made.axes,
    }
    about |= {"mean_profile": torch.full((N_GENES,), 1 / N_GENES), "constants": {"MIN_GENE_COVERAGE": 0.7}}
    optimizer = torch.optim.Adam(encoder.parameters(), lr=2e-3)
    trainer = Trainer(
        "bulk_encoder",
        encoder,
        optimizer,
        torch.Generator().manual_seed(0),
        about,
        tmp_path_factory.mktemp("encoder"),
        30,
    )
    sctape.fit(trainer, made.fit, made.held_out, epochs=60, batch_size=100, max_gradient_norm=1.0)
    return model, about | {"weights": trainer.best_weights}, encoder, made


def bulk_of(*parts: ad.AnnData) -> pd.DataFrame:
    return pd.DataFrame([np.asarray(cells.X.sum(axis=0)).ravel() for cells in parts], columns=parts[0].var_names)


def type_means(cells) -> np.ndarray:
    values = log_normalize(sp.csr_matrix(cells.X if isinstance(cells, ad.AnnData) else cells), 1e4).toarray()
    return np.stack([values[np.arange(len(values)) % N_TYPES == k].mean(axis=0) for k in range(N_TYPES)])


def test_a_bulk_shifts_generated_cells_towards_its_own_cells(fitted):
    """Cells generated for a bulk of responding (resting) cells are closer to these cells than cells generated without a bulk."""
    model, checkpoint, _, _ = fitted
    bulk_cells = [two_state_cells(600, np.full(600, state), seed=5 + state) for state in (0, 1)]
    types = np.arange(600) % N_TYPES
    unshifted = type_means(generate(model, types, 3))
    shift = bulk_encoder.shift(checkpoint, bulk_of(*bulk_cells))
    shifted = [type_means(generate(model, types, 3, shift=shift, groups=types + N_TYPES * sample)) for sample in (0, 1)]
    truth = [type_means(cells) for cells in bulk_cells]

    def error(a, b):
        return np.sqrt(np.square(a - b)[:, :12].mean(axis=1))  # per type, over the twelve genes that change

    for own in (0, 1):
        assert (error(shifted[own], truth[own]) < error(unshifted, truth[own])).all()
        assert error(shifted[own], truth[own]).mean() < 0.75 * error(unshifted, truth[own]).mean()
        assert (error(shifted[own], truth[1 - own]) > error(unshifted, truth[1 - own])).all()
    # the other genes hardly change
    assert np.abs(shifted[1] - truth[1])[:, 12:].mean() < 1.3 * np.abs(unshifted - truth[1])[:, 12:].mean() + 0.02


def test_it_predicts_states_and_proportions_of_held_out_cells(fitted):
    _, checkpoint, encoder, made = fitted
    found = bulk_states.explained(encoder, made.held_out)
    assert found["means"] > 0.3 and found["scales"] > 0.1
    assert found["mae"] < 0.4 * float((made.held_out[1] - made.fit[1].mean(dim=0)).abs().mean())
    a, b = two_state_cells(300, np.zeros(300), 7), two_state_cells(300, np.ones(300), 8)
    kept = (a.obs["cell_type"] == "a").to_numpy(), (b.obs["cell_type"] != "b").to_numpy()
    predicted = bulk_encoder.predict(checkpoint, bulk_of(a[kept[0]], b[kept[1]]))
    assert predicted.shape == (2, 3) and predicted.loc[0, "a"] > 0.8 and predicted.loc[1, "b"] < 0.15
    np.testing.assert_allclose(predicted.sum(axis=1), 1, rtol=1e-5)


def test_the_response_is_a_state_axis(fitted):
    model, _, _, made = fitted
    cells = two_state_cells(600, np.arange(600) >= 300, seed=9)
    codes = cells.obs["cell_type"].cat.codes.to_numpy(dtype=np.int64)
    mean = model.get_latent_representation(CellDataset(cells.X, codes, CPU))[0].numpy()
    coordinates = bulk_states.state_coordinates(made.axes, mean, codes)
    difference = coordinates[300:].mean(axis=0) - coordinates[:300].mean(axis=0)
    assert (np.abs(difference) / coordinates.std(axis=0)).max() > 1.2
    vectors = made.axes["axes"]
    torch.testing.assert_close(vectors.T @ vectors, torch.eye(vectors.shape[1]), atol=1e-5, rtol=0)
    assert (made.axes["spread"].diff() <= 0).all()


def test_means_and_scales_of_mixtures_are_those_of_their_cells():
    """Means and scales computed from the cells that the mixing matrix names, one by one; strong weights shift the means."""
    rng = np.random.default_rng(0)
    types = np.repeat([0, 1, -1], [200, 100, 50])
    coordinates, variance = rng.normal(size=(350, 4)), np.array([0.1, 0.2, 0.3, 0.4])
    cells_per_type = rng.integers(0, 60, (40, 2))
    mixing, means, log_scales = bulk_states.mix_states(cells_per_type, types, coordinates, variance, rng)
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
    with pytest.raises(ValueError, match="cell type number 2 has no cells"):
        bulk_states.mix_states(np.ones((2, 3), int), types, coordinates, variance, rng)


def test_a_shift_changes_z_on_the_axes_alone(fitted, monkeypatch):
    model, checkpoint, _, made = fitted
    # two axes in a z of five dimensions
    vectors = torch.linalg.qr(torch.randn(5, 2, generator=torch.Generator().manual_seed(0)))[0]
    axes = {"middle": torch.randn(N_TYPES, 5), "axes": vectors, "spread": torch.tensor([2.0, 0.7])}
    means, log_scales = torch.randn(2, N_TYPES, 2).numpy(), torch.randn(2, N_TYPES, 2).numpy() * 0.5
    monkeypatch.setattr(bulk_encoder, "read", lambda *_: (None, means, log_scales))
    matrix, offset, _ = bulk_encoder.shift(checkpoint | {"axes": axes}, pd.DataFrame(index=["x", "y"]))
    z, (sample, k) = torch.randn(50, 5), (1, 2)
    moved = z @ matrix[sample * N_TYPES + k].T + offset[sample * N_TYPES + k]
    before, after = ((v - axes["middle"][k]) @ axes["axes"] / axes["spread"] for v in (z, moved))
    np.testing.assert_allclose(after, before.numpy() * np.exp(log_scales[sample, k]) + means[sample, k], atol=2e-4)
    orthogonal = torch.eye(5) - vectors @ vectors.T
    torch.testing.assert_close(z @ orthogonal, moved @ orthogonal, atol=1e-4, rtol=1e-3)
    means = log_scales = np.zeros((2, N_TYPES, made.axes["axes"].shape[1]), np.float32)
    monkeypatch.setattr(bulk_encoder, "read", lambda *_: (None, means, log_scales))
    types = np.arange(300) % N_TYPES
    unshifted, identity = (
        generate(model, types, 1, **m)
        for m in ({}, {"shift": bulk_encoder.shift(checkpoint, pd.DataFrame(index=["x", "y"])), "groups": types})
    )
    assert (unshifted != identity).nnz < 0.001 * unshifted.nnz  # the identity, up to rounding


def test_the_table_of_states_holds_the_shift_of_the_cells(fitted, tmp_path):
    """Cells shifted with the table, by hand, are those of `shift`; spread 1 and mean 0 are the train cells."""
    _, checkpoint, _, made = fitted
    bulk = bulk_of(two_state_cells(300, np.zeros(300), 5), two_state_cells(300, np.ones(300), 6)).set_axis(
        ["rest", "response"]
    )
    table = pd.read_csv(bulk_encoder.write_states(checkpoint, bulk, tmp_path / "predicted_states.csv"))
    n_axes = made.axes["axes"].shape[1]
    assert (
        list(table.columns) == ["sample", "cell_type", "axis", "mean", "spread"] and len(table) == 2 * N_TYPES * n_axes
    )
    of_type = (
        table[(table["sample"] == "response") & (table["cell_type"] == "c")].set_index("axis").loc[range(1, n_axes + 1)]
    )
    vectors, spread, middle = made.axes["axes"].numpy(), made.axes["spread"].numpy(), made.axes["middle"][2].numpy()
    matrix, offset, _ = bulk_encoder.shift(checkpoint, bulk)
    z = np.random.default_rng(0).normal(size=vectors.shape[0]).astype(np.float32)
    moved = matrix[N_TYPES + 2].numpy() @ z + offset[N_TYPES + 2].numpy()
    before, after = ((v - middle) @ vectors / spread for v in (z, moved))
    np.testing.assert_allclose(after, before * of_type["spread"] + of_type["mean"], atol=1e-3)
    assert (table["mean"].abs() > 0.2).any() and (table["spread"] > 0).all()


def test_rare_and_absent_types_do_not_enter_the_loss(fitted):
    _, _, _, made = fitted
    n_axes = made.axes["axes"].shape[1]
    encoder = BulkEncoder(N_GENES, N_TYPES, n_axes, hidden=8, n_latent=8, dropout=0.0).eval()
    encoder.initialise(made.fit[0], np.array([300, 300, bulk_encoder.MIN_CELLS - 1]))
    torch.nn.init.normal_(encoder.to_mean.weight)
    profiles, proportions = made.fit[0][:5], torch.tensor([[0.5, 0.0, 0.5]]).expand(5, 3)
    mean = torch.zeros(5, N_TYPES, n_axes)
    assert (encoder.encode(profiles)[1][:, 2] == 0).all()
    far = mean.clone()
    far[:, 1:] = 100.0  # the absent type, and the type with few train cells
    a, b = (encoder(profiles, proportions, m, mean)["mean_loss"].item() for m in (mean, far))
    assert a == b > 0


def test_a_bulk_without_the_genes_is_refused(fitted):
    _, checkpoint, _, _ = fitted
    with pytest.raises(
        ValueError, match="has 50% of the 60 genes that the bulk encoder was trained on, expected at least 70%"
    ):
        bulk_encoder.read(checkpoint, bulk_of(two_state_cells(9, np.zeros(9), 0)).iloc[:, :30])


@pytest.mark.slow
def test_stages_4_and_5_use_it_by_a_constant(pipeline, tmp_path):
    options = {"DEVICE": "cpu", "FIG_DIR": str(tmp_path)}
    few = {"N_STATE_SAMPLES": 300, "CELLS_PER_STATE_SAMPLE": 100, "EPOCHS": 2}
    pipeline.main(STAGES[4], NETWORK="bulk_encoder", **options, **few)
    few = FEW | {"OUTPUT": str(tmp_path / "cells.h5ad")}
    options["DECONVOLUTION"] = "bulk_encoder"
    try:
        predicted = (pipeline.data / "predicted_proportions.csv").read_bytes()
        pipeline.main(STAGES[5], **options, **few)
        generated = ad.read_h5ad(tmp_path / "cells.h5ad")
        assert generated.n_obs == ad.read_h5ad(pipeline.data / "test.h5ad").n_obs
        states = pd.read_csv(pipeline.data / "predicted_states.csv")
        assert set(states["sample"]) == {"test_cells"} and set(states["cell_type"]) == set(
            generated.obs["cell_type"].cat.categories
        )
        checkpoint = torch.load(pipeline.models / "bulk_encoder.pt", weights_only=True)
        torch.save(checkpoint | {"gmvae_id": "of another"}, pipeline.models / "bulk_encoder.pt")
        with pytest.raises(ValueError, match="bulk_encoder.pt was trained for another model than models/gmvae.pt"):
            pipeline.main(STAGES[5], **options, **few)
    finally:
        (pipeline.data / "predicted_proportions.csv").write_bytes(predicted)


def test_single_genes_change_where_the_bulk_stands_out(fitted):
    """A gene raised eightfold in the bulk rises severalfold in the cells; platform differences in all genes change hardly any gene."""
    model, _, _, _ = fitted
    types, genes = np.arange(600) % N_TYPES, [f"GENE{i}" for i in range(N_GENES)]
    before = generate(model, types, 3)
    bulk = pd.DataFrame(np.asarray(before.sum(axis=0)), columns=genes)
    identity = Shift(torch.eye(model.n_latent).expand(3, -1, -1), torch.zeros(3, model.n_latent))
    raised = bulk.copy()
    raised["GENE20"] *= 8
    shift = bulk_encoder.with_genes(identity, model, genes, None, np.full((1, 3), 1 / 3), raised, seed=0)
    after = generate(model, types, 3, shift=shift, groups=types)
    gain = np.asarray(after.sum(axis=0) / after.sum()).ravel() / np.asarray(before.sum(axis=0) / before.sum()).ravel()
    assert gain[20] > 3 and np.median(np.abs(np.delete(gain, 20) - 1)) < 0.15
    platform = bulk * np.random.default_rng(0).lognormal(0, 1, N_GENES)
    unchanged = bulk_encoder.with_genes(
        identity, model, genes, None, np.full((1, 3), 1 / 3), platform, seed=0
    ).log_ratio
    assert (unchanged == 0).float().mean() > 0.85
    lengths = dict(zip(genes, np.random.default_rng(1).uniform(500, 9000, N_GENES)))
    by_length = bulk_encoder.with_genes(
        identity, model, genes, lengths, np.full((1, 3), 1 / 3), raised / np.array(list(lengths.values())), seed=0
    ).log_ratio
    assert by_length[0, 20] > 1 and (by_length != 0).float().mean() < 0.15
    missing = bulk_encoder.with_genes(
        identity, model, genes, None, np.full((1, 3), 1 / 3), raised.drop(columns="GENE20"), seed=0
    ).log_ratio
    assert missing[0, 20] == 0 and (missing != 0).float().mean() < 0.15
