"""The baselines: they learn the types, sample counts, and match the descriptions of their sources."""

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch
from helpers import CPU, FEW, STAGES, simulated_cells

from lib import parallel
from lib.baselines import registry
from lib.baselines.beta_vae import BetaVAE
from lib.baselines.conv_cvae import ConvCVAE, extra_zeros
from lib.baselines.expression_sampling import gene_fractions
from lib.baselines.pca_cvae import PCACVAE, fit_components
from lib.data.batches import CellDataset
from lib.data.counts import log_normalize, row_blocks
from lib.models.profiles import GeneMarginals, type_means
from lib.training import Trainer, load_checkpoint

ABOUT = {"stage": STAGES[3], "constants": {}, "gene_names": list(range(60)), "cell_types": list("abc"), "split_id": "x"}
FAST = {
    "beta_vae": {"epochs": 60, "batch_size": 64, "learning_rate": 2e-3}, "pca_cvae": {"epochs": 40, "batch_size": 64},
    "conv_cvae": {"epochs": 60},
}  # fmt: skip
SMALL = {
    "beta_vae": {"n_latent": 8, "hidden": (64, 32)}, "conv_cvae": {},
    "pca_cvae": {"n_pcs": 20, "n_latent": 8, "hidden": (64, 32), "n_label": 8, "dropout": 0.05},
}  # fmt: skip


@pytest.fixture(scope="module")
def data():
    counts, types = simulated_cells(n_cells=900)
    part = np.random.default_rng(0).random(900) < 0.8
    return CellDataset(counts[part], types[part], CPU), (counts[~part], types[~part])


@pytest.fixture(scope="module", params=["beta_vae", "pca_cvae", pytest.param("conv_cvae", marks=pytest.mark.slow)])
def trained(request, data, tmp_path_factory):
    """Name, model and trainer of a trained baseline."""
    name, train, held_out = request.param, data[0], CellDataset(*data[1], CPU)
    settings = registry.SETTINGS[name] | FAST[name]
    torch.manual_seed(0)
    model = registry.make(name, 60, 3, SMALL[name])
    model.initialise(train)
    optimizer, generator = registry.make_optimizer(model, settings), torch.Generator().manual_seed(0)
    about = ABOUT | {"generator": name, "arguments": model.arguments}
    trainer = Trainer(name, model, optimizer, generator, about, tmp_path_factory.mktemp(name))
    batches = registry.train_batches(train, model, optimizer, settings, generator)
    validation = registry.held_out_batches(held_out, model, settings, 0)
    trainer.fit(settings["epochs"], batches, validation, settings["patience"])
    model.fit_prior(train, 0)
    trainer.save_best(prior=model.prior)
    return name, model, trainer


def test_generated_cells_are_counts_and_resemble_their_type(trained, data):
    """They are closest to held-out cells of their own type, and far closer than the mean of all types is."""
    (_, model, trainer), (train, held_out) = trained, data
    types = np.repeat(np.arange(3), 300)
    cells = registry.generate(model, types, seed=0)
    assert cells.format == "csr" and cells.shape == (900, 60)
    assert (cells.data > 0).all() and (cells.data == np.rint(cells.data)).all()
    means = [type_means(log_normalize(x, 1e4).toarray(), y, 3) for x, y in (held_out, (cells, types))]
    distance = np.abs(means[1][:, None] - means[0]).mean(axis=2)  # generated types x real types
    assert (distance.argmin(axis=1) == np.arange(3)).all()
    assert np.diag(distance).mean() < 0.5 * np.abs(means[0] - means[0].mean(axis=0)).mean()
    for k in range(3):
        generated, real = cells[types == k].sum(axis=1).A1, train.library_size[train.cell_type_idx == k]
        assert np.median(generated) == pytest.approx(np.median(real), rel=0.12)
    losses = trainer.history_table()["held_out_reconstruction_loss"]
    assert losses.min() < 0.9 * losses[0]


def test_a_loaded_checkpoint_samples_the_same_cells_in_independent_blocks(trained):
    name, model, trainer = trained
    checkpoint = load_checkpoint(trainer.best_path, STAGES[3])  # weights_only
    types = np.random.default_rng(0).integers(0, 3, 600)
    cells = registry.generate(model, types, seed=0)
    loaded = registry.load(checkpoint, CPU)
    assert (registry.generate(loaded, types, seed=0) != cells).nnz == 0
    assert (registry.generate(loaded, types, seed=1) != cells).nnz > 0
    second = sp.vstack(list(registry.sample(loaded, types, 0, blocks=range(1, 3))))
    assert (second != cells[256:]).nnz == 0
    with pytest.raises(ValueError, match=f"the training of {name} was interrupted: .*; finish it with .* --resume"):
        registry.load(checkpoint | {"prior": None}, CPU)


# --- training


@pytest.mark.parametrize("in_memory", [True, False])
@pytest.mark.parametrize("name", SMALL)
def test_cells_without_a_label_are_left_out(name, in_memory, monkeypatch):
    """Most cells have no label, so that whole batches would have none; two processes have as many batches as each other."""
    counts, types = simulated_cells(n_cells=700)
    dataset = CellDataset(counts, np.where(np.arange(700) % 350 < 70, types, -1), CPU, in_memory=in_memory)
    model, settings = registry.make(name, 60, 3, SMALL[name]), registry.SETTINGS[name] | {"batch_size": 20}
    model.initialise(dataset)
    optimizer = registry.make_optimizer(model, settings)
    train = registry.train_batches(dataset, model, optimizer, settings, torch.Generator().manual_seed(0))
    for batches in (list(train(0)), list(registry.held_out_batches(dataset, model, settings, 0)())):
        assert sum(batch.n_rows for batch in batches) == 140
        assert all(model(*batch.inputs)["loss"].isfinite() for batch in batches)
    monkeypatch.setattr(parallel, "N_RANKS", 2)
    n_rows = []
    for rank in range(2):
        monkeypatch.setattr(parallel, "RANK", rank)
        n_rows.append([batch.n_rows for batch in train(1)])
    assert len(n_rows[0]) == len(n_rows[1]) and np.sum(n_rows) == 140


def test_an_epoch_sets_the_learning_rate_and_gives_the_weight_of_the_kl(data, capsys):
    """One cycle rises, then falls; small data have smaller batches, at least eight."""
    settings = registry.SETTINGS["pca_cvae"] | {"cycle": 1.0}
    model = registry.make("pca_cvae", 60, 3, SMALL["pca_cvae"])
    optimizer = registry.make_optimizer(model, settings)
    batches = registry.train_batches(data[0], model, optimizer, settings, torch.Generator().manual_seed(0))
    assert f"batches of {len(data[0]) // 8} cells instead of 5,000" in capsys.readouterr().out
    rates, weights = [], []
    for epoch in range(100):
        _, _, weight = next(iter(batches(epoch))).inputs
        rates.append(optimizer.param_groups[0]["lr"])
        weights.append(weight)
    peak = np.argmax(rates)
    assert 25 <= peak <= 33 and rates[peak] == pytest.approx(1e-3, rel=0.02) and rates[0] < 1e-4 and rates[-1] < 1e-5
    assert (np.diff(rates[: peak + 1]) > 0).all() and (np.diff(rates[peak:]) < 0).all()
    assert [weights[epoch] for epoch in (0, 9, 50)] == pytest.approx([0.1, 1.0, 1.0])


def test_settings_are_the_published_ones_and_words_change_them():
    settings, arguments = registry.parse_settings("pca_cvae", ("epochs=7", "learning_rate=1e-4", "n_pcs=500"))
    assert settings == registry.SETTINGS["pca_cvae"] | {"epochs": 7, "learning_rate": 1e-4}
    assert arguments["n_pcs"] == 500 and PCACVAE(10, 2, **arguments).arguments["n_latent"] == 512
    assert registry.parse_settings("beta_vae", ("top_markers=200",))[1]["top_markers"] == 200
    assert registry.SETTINGS["pca_cvae"]["epochs"] == 100
    for word in ("n_pcs=5", "epochs=0", "epochs=1.5", "epochs", "filters=x", "learning_rate=nan"):
        with pytest.raises(ValueError, match=f"GENERATOR_SETTINGS has '{word}'; expected .*: epochs=50, .*filters=16"):
            registry.parse_settings("conv_cvae", (word,))


# --- the published descriptions


def test_deepconvcvae_has_the_published_number_of_parameters():
    model = ConvCVAE(n_genes=144 * 144, n_cell_types=11)
    assert model.side == 144 and sum(p.numel() for p in model.parameters()) == 1_503_877
    assert sum(p.numel() for p in model.decoder.parameters()) == 586_465


@pytest.mark.parametrize("n_genes, side", [(1, 4), (16, 4), (17, 8), (765, 28), (20_736, 144)])
def test_any_number_of_genes_fits_a_square_image(n_genes, side):
    model = ConvCVAE(n_genes, 2, filters=1)
    counts = np.zeros((2, n_genes), np.float32)
    counts[0, 0], counts[1, -1] = 3, 1
    dataset = CellDataset(sp.csr_matrix(counts), np.array([0, 1]), CPU)
    model.initialise(dataset)
    images = model.inputs(next(dataset.in_order(2)))
    assert images.shape == (2, 1, side, side)
    assert images[0, 0, 0, 0] == 1 and images[1].flatten()[n_genes - 1] == 1 and images.sum() == 2  # zeros elsewhere
    assert model.encoder[:3](torch.zeros(5, 2, side, side)).shape == (5, 2, side // 4, side // 4)
    assert model.decode(torch.zeros(5, 2), torch.zeros(5, dtype=torch.int64)).shape == (5, 1, side, side)


def widths(network) -> list[int]:
    return [layer.out_features for layer in network if isinstance(layer, torch.nn.Linear)]


def test_the_beta_vae_has_bulk2singles_sizes_and_loss():
    model = BetaVAE(100, 3)
    assert model.from_genes.weight.shape == (100, 2048) and widths(model.encoder) == [1024, 512, 2 * 256]
    assert widths(model.decoder) == [512, 1024, 2048, 100]
    counts, types = simulated_cells(n_cells=20)
    small = BetaVAE(60, 3, n_latent=2, hidden=(8,))
    batch, epsilon = next(CellDataset(counts, types, CPU).in_order(20)), torch.randn(20, 2)
    x = torch.from_numpy(log_normalize(counts, 1e4).toarray())
    mean, log_var = small.encoder(torch.relu(x @ small.from_genes.weight + small.from_genes_bias)).chunk(2, dim=1)
    kl = 0.5 * (mean**2 + log_var.exp() - log_var - 1).sum(dim=1)
    error = ((small.decoder(mean + (log_var / 2).exp() * epsilon) - x) ** 2).sum(dim=1)
    for weight in (1.0, 0.3):
        loss = small(batch, epsilon, weight)["loss"].item()
        assert loss == pytest.approx((error + weight * 4 * kl).mean().item(), rel=1e-4)


def test_the_encoder_uses_the_top_markers_only(data):
    train = data[0]
    model = BetaVAE(60, 3, n_latent=4, hidden=(16,), top_markers=5)
    model.initialise(train)
    is_used = model.is_used.numpy().astype(bool)
    assert 5 <= is_used.sum() <= 15
    means = type_means(train.counts.toarray(), train.cell_type_idx, 3)
    strongest = (means / means.sum(axis=1, keepdims=True) / means.sum(axis=0)).argmax(axis=1)
    assert is_used[strongest].all()  # each type's strongest marker
    inputs = model.inputs(next(train.in_order(30)))
    before = model.encode(inputs, None)
    with torch.no_grad():
        model.from_genes.weight[~is_used] += 100.0
    torch.testing.assert_close(model.encode(inputs, None), before)


def test_the_cvae_has_generative_genomics_sizes(data, capsys):
    model = PCACVAE(3000, 126)
    assert widths(model.encoder) == [2048, 1024, 512, 256, 2 * 512]
    assert widths(model.decoder) == [256, 512, 1024, 2048, 2500]
    assert model.label.weight.shape == (126, 64) and model.encoder[0].in_features == 2500 + 64
    small = PCACVAE(60, 3)
    small.initialise(data[0])  # fewer components where the data have fewer
    assert small.arguments["n_pcs"] == 60 and widths(small.decoder) == [256, 512, 1024, 2048, 60]
    assert f"60 principal components instead of 2,500: {len(data[0])} cells, 60 genes" in capsys.readouterr().out


def test_components_span_the_space_of_an_exact_pca():
    """Of 2,600 cells in three steps of at least 1,024 cells, the last of them smaller."""
    counts, _ = simulated_cells(n_cells=2600)
    values = log_normalize(counts, 1e4).toarray().astype(np.float64)
    standardised = (values - values.mean(axis=0)) / values.std(axis=0)
    components = fit_components(lambda: (block for _, block in row_blocks(counts, 90)), 5)
    exact = np.linalg.svd(standardised, full_matrices=False)[2][:3].T
    assert np.linalg.svd(components.vectors.T @ exact)[1].min() > 0.98
    np.testing.assert_allclose(components.transform(counts), standardised @ components.vectors, atol=2e-3)
    np.testing.assert_allclose(components.vectors.T @ components.vectors, np.eye(5), atol=1e-5)


def test_generated_expression_is_the_inverse_of_the_components(data):
    """With full rank, the expression of a cell's own components is the cell's."""
    model = PCACVAE(60, 3, n_pcs=60, n_latent=4, hidden=(8,)).eval()
    model.initialise(data[0])
    batch = next(data[0].in_order(40))
    expected = batch.log_normalized(1e4).to_dense()
    torch.testing.assert_close(model.expression(model.inputs(batch)), expected, atol=2e-3, rtol=1e-3)


def test_extra_zeros_are_estimated_where_they_were_added():
    rng = np.random.default_rng(0)
    profile = np.full(40, 1 / 40)
    counts = rng.poisson(rng.gamma(2.0, 400 * profile / 2.0, (4000, 40))).astype(np.float32)
    counts[:, :20][rng.random((4000, 20)) < 0.4] = 0
    dataset = CellDataset(sp.csr_matrix(counts), np.zeros(4000, int), CPU)
    without_zeros = 400 / counts.sum(axis=1).mean() * profile  # so that mu is the mean without extra zeros
    estimate = extra_zeros(dataset, GeneMarginals(without_zeros[None], np.full(40, np.log(2.0))))
    assert estimate[:20].mean() == pytest.approx(0.4, abs=0.04) and estimate[20:].mean() < 0.04


def test_negative_expression_has_no_counts():
    log_expression = torch.tensor([[-1.0, 0.0, np.log(1 + 2500), np.log(1 + 7500)]])
    np.testing.assert_allclose(gene_fractions(log_expression), [[0, 0, 0.25, 0.75]], rtol=1e-5)


# --- through the scripts


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, words", [("beta_vae", ("top_markers=20",)), ("pca_cvae", ("n_pcs=50",)), ("conv_cvae", ("filters=4",))]
)  # fmt: skip
def test_stages_3_and_5_run_the_baseline_that_a_constant_names(pipeline, tmp_path, name, words):
    folders = {"MODELS_DIR": str(tmp_path), "FIG_DIR": str(tmp_path / "fig"), "DEVICE": "cpu", "GENERATOR": name}
    with pytest.raises(FileNotFoundError, match=f"run _3_train_gmvae.py --generator {name} first"):
        pipeline.main(STAGES[5], **folders)
    pipeline.main(STAGES[3], GENERATOR_SETTINGS=("epochs=2", *words), **folders)
    assert (tmp_path / "fig" / f"{name}_loss.png").stat().st_size > 0
    output = tmp_path / "cells.h5ad"
    test, evaluated = ad.read_h5ad(pipeline.data / "test.h5ad"), {"EVALUATE": False}
    if name == "pca_cvae":  # evaluated without a likelihood, and with XGBoost, as in its source
        types = test.obs["cell_type"].cat.categories.to_series()
        types.str.contains("CD4|CD8").rename("class").rename_axis("type").to_csv(tmp_path / "classes.csv")
        evaluated = {"XGBOOST": True, "XGBOOST_CELLS": (20, 30, 10), "CLASS_FILE": str(tmp_path / "classes.csv"), **FEW}
    pipeline.main(STAGES[5], CELL_COUNTS="test", OUTPUT=str(output), **folders, **evaluated)
    generated = ad.read_h5ad(output)
    assert generated.shape == test.shape and generated.uns["generator"] == name
    assert (generated.X.data == np.rint(generated.X.data)).all()
    if name == "pca_cvae":
        f1 = pd.read_csv(tmp_path / "fig" / "xgboost.csv").set_index("labels")["F1 (weighted)"]
        assert len(f1) == 6 and (f1["classes"].to_numpy() > f1["cell types"].to_numpy()).all()
