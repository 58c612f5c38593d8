"""The baselines: they learn the types, sample counts, and match the descriptions of their sources."""

import anndata as ad
import numpy as np
import pytest
import scipy.sparse as sp
import torch
from helpers import FEW, STAGES, simulated_cells

from lib.baselines import beta_vae, expression_sampling, pca_cvae, registry
from lib.baselines.beta_vae import BetaVAE
from lib.baselines.conv_cvae import ConvCVAE, extra_zeros
from lib.baselines.pca_cvae import PCACVAE
from lib.checkpoints import load_checkpoint
from lib.data.batches import CellDataset
from lib.data.counts import log_normalize
from lib.models.profiles import GeneMarginals

CPU = torch.device("cpu")
ABOUT = {
    "stage": "_3_train_gmvae.py",
    "constants": {},
    "gene_names": [f"GENE{i}" for i in range(60)],
    "cell_types": list("abc"),
    "split_id": "x",
}
FAST = {
    "beta_vae": {"epochs": 60, "batch_size": 64, "learning_rate": 2e-3},
    "pca_cvae": {"epochs": 40, "batch_size": 64},
    "conv_cvae": {"epochs": 60},
}
SMALL = {
    "beta_vae": {"n_latent": 8, "hidden": (64, 32)},
    "pca_cvae": {"n_pcs": 20, "n_latent": 8, "hidden": (64, 32), "n_label": 8, "dropout": 0.05},
    "conv_cvae": {},
}


@pytest.fixture(scope="module")
def data():
    counts, types = simulated_cells(n_cells=900)
    part = np.random.default_rng(0).random(900) < 0.8
    return CellDataset(counts[part], types[part], CPU), (counts[~part], types[~part])


def fitted(name: str, data, folder, **settings):
    train, (test_counts, test_types) = data
    settings = registry.SETTINGS[name] | FAST[name] | settings
    return registry.fit(
        name, train, CellDataset(test_counts, test_types, CPU), ABOUT, settings, SMALL[name], folder, seed=0
    )


@pytest.fixture(scope="module", params=["beta_vae", "pca_cvae", pytest.param("conv_cvae", marks=pytest.mark.slow)])
def trained(request, data, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    return request.param, *fitted(request.param, data, folder)


def mean_log(counts, types) -> np.ndarray:
    """Types x genes: mean log(1 + counts per 10,000)."""
    values = log_normalize(sp.csr_matrix(counts), 1e4).toarray()
    return np.stack([values[types == k].mean(axis=0) for k in range(3)])


def test_generated_cells_resemble_their_type(trained, data):
    """Generated cells are closest to held-out cells of their own type, and far closer than the mean of all types is."""
    _, model, trainer = trained
    test_counts, test_types = data[1]
    types = np.repeat(np.arange(3), 200)
    real, generated = mean_log(test_counts, test_types), mean_log(registry.generate(model, types, seed=0), types)
    distance = np.abs(generated[:, None] - real[None]).mean(axis=2)  # generated types x real types
    assert (distance.argmin(axis=1) == np.arange(3)).all()
    assert np.diag(distance).mean() < 0.5 * np.abs(real - real.mean(axis=0)).mean()
    losses = [row["held_out_reconstruction_loss"] for row in trainer.history]
    assert min(losses) < 0.9 * losses[0]


def test_cells_are_counts_with_library_sizes_of_their_type(trained, data):
    _, model, _ = trained
    train, types = data[0], np.repeat(np.arange(3), 300)
    cells = registry.generate(model, types, seed=0)
    assert (
        cells.format == "csr"
        and cells.shape == (900, 60)
        and (cells.data > 0).all()
        and (cells.data == np.rint(cells.data)).all()
    )
    for k in range(3):
        generated, real = np.asarray(cells[types == k].sum(axis=1)), train.library_size[train.cell_type_idx == k]
        assert np.median(generated) == pytest.approx(np.median(real), rel=0.12)


def test_sampling_is_seeded_and_its_blocks_are_independent(trained):
    _, model, _ = trained
    types = np.random.default_rng(0).integers(0, 3, 600)
    a, b, c = (
        registry.generate(model, types, seed=0),
        registry.generate(model, types, seed=0),
        registry.generate(model, types, seed=1),
    )
    assert (a != b).nnz == 0 and (a != c).nnz > 0
    second = sp.vstack(list(registry.sample(model, types, 0, blocks=range(1, 3))))
    assert (second != a[256:]).nnz == 0


def test_a_loaded_checkpoint_samples_the_same_cells(trained):
    name, model, trainer = trained
    checkpoint = load_checkpoint(trainer.best_path, STAGES[3])  # weights_only
    again = registry.load(checkpoint, CPU)
    types = np.arange(3).repeat(50)
    assert (
        checkpoint["generator"] == name
        and (registry.generate(again, types, seed=0) != registry.generate(model.eval(), types, seed=0)).nnz == 0
    )


def test_a_baseline_whose_training_was_interrupted_is_refused(trained):
    name, _, trainer = trained
    checkpoint = load_checkpoint(trainer.best_path, STAGES[3])
    with pytest.raises(ValueError, match=f"the training of {name} was interrupted: .*; finish it with .* --resume"):
        registry.load(checkpoint | {"prior": None}, CPU)


def test_resumed_training_equals_uninterrupted(data, tmp_path):
    whole, _ = fitted("beta_vae", data, tmp_path, epochs=4)
    half = tmp_path / "half"
    half.mkdir()
    fitted("beta_vae", data, half, epochs=2)
    settings = registry.SETTINGS["beta_vae"] | FAST["beta_vae"] | {"epochs": 4}
    resumed, trainer = registry.fit(
        "beta_vae", data[0], CellDataset(*data[1], CPU), ABOUT, settings, SMALL["beta_vae"], half, 0, resume=True
    )
    assert len(trainer.history) == 4
    for a, b in zip(whole.state_dict().values(), resumed.state_dict().values()):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


# --- the published descriptions


def test_deepconvcvae_has_the_published_number_of_parameters():
    model = ConvCVAE(n_genes=144 * 144, n_cell_types=11)
    assert model.side == 144 and sum(p.numel() for p in model.parameters()) == 1_503_877
    encoder = [model.label_image, model.encoder, model.z_mean, model.z_log_var]
    assert sum(p.numel() for part in encoder for p in part.parameters()) == 917_412
    assert sum(p.numel() for p in model.decoder.parameters()) == 586_465


@pytest.mark.parametrize("n_genes, side", [(1, 4), (16, 4), (17, 8), (765, 28), (13_714, 120), (20_736, 144)])
def test_any_number_of_genes_fits_a_square_image(n_genes, side):
    model = ConvCVAE(n_genes, 2, filters=2)
    counts = np.zeros((2, n_genes), np.float32)
    counts[0, 0], counts[1, -1] = 3, 1
    dataset = CellDataset(sp.csr_matrix(counts), np.array([0, 1]), CPU)
    model.initialise(dataset)
    images = model.images(dataset.in_memory_cells.batch(np.arange(2)))
    assert images.shape == (2, 1, side, side)
    assert images[0, 0, 0, 0] == 1 and images[1].flatten()[n_genes - 1] == 1 and images.sum() == 2  # zeros elsewhere
    assert model.decode(torch.zeros(2, 2), torch.tensor([0, 1])).shape == (2, 1, side, side)


@pytest.mark.parametrize("kernel, strides, side", [(5, 2, 12), (3, 1, 10), (7, 3, 18)])
def test_kernel_and_strides_may_be_others(kernel, strides, side):
    """The shapes of Keras' "same" padding: each convolution divides the side by the stride, each transposed one multiplies it."""
    model = ConvCVAE(100, 2, n_latent=3, filters=4, kernel=kernel, strides=strides)
    assert model.side == side
    images = [torch.zeros(5, 2, side, side)]
    for layer in model.encoder[:4]:
        images.append(layer(images[-1]))
    assert [image.shape[1:] for image in images[1::2]] == [
        (4, side // strides, side // strides),
        (8, side // strides**2, side // strides**2),
    ]
    assert model.encoder[0].kernel_size == (kernel, kernel)
    assert model.decode(torch.zeros(5, 3), torch.zeros(5, dtype=torch.int64)).shape == (5, 1, side, side)


def test_a_too_small_image_is_refused():
    with pytest.raises(ValueError, match="the kernel has a side of 4 pixels; expected an odd number"):
        ConvCVAE(60, 2, kernel=4)
    with pytest.raises(ValueError, match="an image of 8 x 8 pixels cannot hold 65 genes"):
        ConvCVAE(65, 2, side=8)


def test_the_beta_vae_has_bulk2singles_sizes_and_loss():
    model = BetaVAE(100, 3)
    widths = [layer.weight.shape[0] for layer in model.encoder if isinstance(layer, torch.nn.Linear)]
    assert (model.from_genes.weight.shape[1], *widths, model.n_latent) == (2048, 1024, 512, 2 * 256, 256)
    widths = [layer.weight.shape[0] for layer in model.decoder if isinstance(layer, torch.nn.Linear)]
    assert widths == [512, 1024, 2048, 100]
    counts, types = simulated_cells(n_cells=20)
    small = BetaVAE(60, 3, n_latent=2, hidden=(8,))
    batch, epsilon = CellDataset(counts, types, CPU).in_memory_cells.batch(np.arange(20)), torch.randn(20, 2)
    x = torch.from_numpy(log_normalize(counts, 1e4).toarray())
    hidden = torch.relu(x @ small.from_genes.weight + small.from_genes_bias)
    mean, log_var = small.encoder(hidden).chunk(2, dim=1)
    kl = 0.5 * (mean**2 + log_var.exp() - log_var - 1).sum(dim=1)
    error = ((small.decoder(mean + (log_var / 2).exp() * epsilon) - x) ** 2).sum(dim=1)
    assert small(batch, epsilon)["loss"].item() == pytest.approx((error + 4 * kl).mean().item(), rel=1e-4)


def test_the_encoder_uses_the_top_markers_only(data):
    train = data[0]
    model = BetaVAE(60, 3, n_latent=4, hidden=(16,), top_markers=5)
    model.initialise(train)
    is_used = model.is_used.numpy().astype(bool)
    assert 5 <= is_used.sum() <= 15
    means = np.stack([np.asarray(train.counts[train.cell_type_idx == k].mean(axis=0)).ravel() for k in range(3)])
    strongest = (means / means.sum(axis=1, keepdims=True) / (means.sum(axis=0) / means.sum())).argmax(axis=1)
    assert is_used[strongest].all()  # each type's strongest marker
    counts = train.counts[:30].toarray()
    counts[:, ~is_used] = np.random.default_rng(0).permutation(counts[:, ~is_used].T).T  # same library sizes
    a, b = (
        CellDataset(c, np.zeros(30, int), CPU).in_memory_cells.batch(np.arange(30)).log_normalized(1e4)
        for c in (train.counts[:30], sp.csr_matrix(counts))
    )
    torch.testing.assert_close(model.q_z(a), model.q_z(b))
    assert not np.allclose(a.to_dense(), b.to_dense())
    assert beta_vae.marker_genes(train, 3, 60).tolist() == list(range(60))


def test_the_cvae_has_generative_genomics_sizes_and_settings(data, capsys):
    train = data[0]
    model = PCACVAE(3000, 126)
    for network, widths in (
        (model.encoder, [2048, 1024, 512, 256, 2 * 512]),
        (model.decoder, [256, 512, 1024, 2048, 2500]),
    ):
        assert [layer.out_features for layer in network if isinstance(layer, torch.nn.Linear)] == widths
    assert model.label.weight.shape == (126, 64) and model.encoder[0].in_features == 2500 + 64
    settings, arguments = pca_cvae.fitting_sizes(registry.SETTINGS["pca_cvae"], {}, train)
    assert registry.SETTINGS["pca_cvae"]["batch_size"] == 5000 and settings["batch_size"] == len(train) // 8
    assert arguments == {"n_pcs": 60}
    out = capsys.readouterr().out
    assert (
        "60 principal components instead of 2,500" in out
        and f"batches of {len(train) // 8} cells instead of 5,000" in out
    )


def test_generated_expression_is_the_inverse_of_the_components(data):
    """With full rank, decoding a cell's own components gives its expression."""
    train = data[0]
    model = PCACVAE(60, 3, n_pcs=60, n_latent=4, hidden=(8,)).eval()
    model.initialise(train)
    model.fit_prior(train, seed=0)
    batch = train.in_memory_cells.batch(np.arange(40))
    model.decode = lambda z, cell_type_idx: model.pcs(batch)
    expression, _ = model.sample_expression(batch.cell_type_idx, 1.0, torch.Generator().manual_seed(0))
    torch.testing.assert_close(expression, batch.log_normalized(1e4).to_dense(), atol=2e-3, rtol=1e-3)


def test_class_balanced_batches_sample_every_type_equally_often():
    counts, _ = simulated_cells(n_cells=1000)
    types = np.where(np.arange(1000) < 20, 0, np.where(np.arange(1000) < 900, 1, -1))
    dataset, generator = CellDataset(counts, types, CPU), torch.Generator().manual_seed(0)
    sampled = torch.cat([b.cell_type_idx for b in dataset.shuffled(100, generator, balanced=True)])
    assert len(sampled) == 1000 and (sampled >= 0).all()  # as many as in an epoch, none of unknown type
    assert (sampled == 0).float().mean().item() == pytest.approx(0.5, abs=0.06)


def test_one_cycle_rises_then_falls():
    settings = {"learning_rate": 1e-3, "epochs": 100, "cycle": 1.0}
    rates = np.array([registry.learning_rate(epoch, settings) for epoch in range(100)])
    peak = rates.argmax()
    assert 25 <= peak <= 33 and rates[peak] == pytest.approx(1e-3, rel=0.02) and rates[0] < 1e-4 and rates[-1] < 1e-5
    assert (np.diff(rates[: peak + 1]) > 0).all() and (np.diff(rates[peak:]) < 0).all()
    weights = [registry.kl_weight(epoch, {"kl_weight": (0.1, 1.0), "kl_warmup_epochs": 9}) for epoch in (0, 9, 50)]
    assert weights == pytest.approx([0.1, 1.0, 1.0])


def test_extra_zeros_are_estimated_where_they_were_added():
    rng = np.random.default_rng(0)
    profile = np.full(40, 1 / 40)
    counts = rng.poisson(rng.gamma(2.0, 400 * profile / 2.0, (4000, 40))).astype(np.float32)
    counts[:, :20][rng.random((4000, 20)) < 0.4] = 0
    library = counts.sum(axis=1)
    dataset = CellDataset(sp.csr_matrix(counts), np.zeros(4000, int), CPU)
    expected_mu = 400 * profile / (library.mean() * profile)  # so that mu is the mean without extra zeros
    estimate = extra_zeros(dataset, GeneMarginals((profile * expected_mu)[None], np.full(40, np.log(2.0))))
    assert estimate[:20].mean() == pytest.approx(0.4, abs=0.04) and estimate[20:].mean() < 0.04


def test_negative_expression_has_no_counts():
    log_expression = torch.tensor([[-1.0, 0.0, np.log(1 + 2500), np.log(1 + 7500)]])
    np.testing.assert_allclose(expression_sampling.gene_fractions(log_expression), [[0, 0, 0.25, 0.75]], rtol=1e-5)


# --- through the scripts


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, options",
    [
        ("beta_vae", {"TOP_MARKERS": 20}),
        ("pca_cvae", {"PCA_COMPONENTS": 50}),
        ("conv_cvae", {"CONV_SIDE": 32, "CONV_FILTERS": 4}),
    ],
)
def test_stages_3_and_5_run_the_baseline_that_a_constant_names(pipeline, tmp_path, name, options):
    models, fig = tmp_path / "models", tmp_path / "fig"
    pipeline.main(
        STAGES[3], GENERATOR=name, OTHER_EPOCHS=2, MODELS_DIR=str(models), FIG_DIR=str(fig), DEVICE="cpu", **options
    )
    assert (fig / f"{name}_loss.png").stat().st_size > 0
    output = tmp_path / "cells.h5ad"
    pipeline.main(
        STAGES[5],
        GENERATOR=name,
        CELL_COUNTS="test",
        OUTPUT=str(output),
        MODELS_DIR=str(models),
        FIG_DIR=str(fig),
        DEVICE="cpu",
        EVALUATE=name == "pca_cvae",  # any other generator than the GMVAE: evaluated without a likelihood
        **FEW,
    )
    generated, test = ad.read_h5ad(output), ad.read_h5ad(pipeline.data / "test.h5ad")
    assert generated.shape == test.shape and generated.uns["generator"] == name
    assert (generated.X.data == np.rint(generated.X.data)).all()


def test_a_missing_generator_is_named(pipeline, tmp_path):
    message = "beta_vae.pt is missing: run _3_train_gmvae.py --generator beta_vae first"
    with pytest.raises(FileNotFoundError, match=message):
        pipeline.main(STAGES[5], GENERATOR="beta_vae", MODELS_DIR=str(tmp_path))
