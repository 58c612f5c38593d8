"""The GMVAE as published: its sizes, its loss against the plain formula, its likelihood, its cells, its training by stage 3."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import scipy.stats
import torch
from helpers import STAGES, Workplace, plain_log_zinb, plain_paper_loss, simulated_cells, simulated_dataset

from lib.baselines import registry
from lib.checkpoints import load_checkpoint
from lib.data.batches import CellDataset
from lib.data.counts import write_counts
from lib.models.paper_gmvae import NEGLIGIBLE, PaperGMVAE

CPU = torch.device("cpu")
N_TYPES = 3


@pytest.fixture
def batch():
    """Twelve cells of three types, counts in float64."""
    counts, types = simulated_cells(n_cells=12)
    return in_float64(CellDataset(counts, types, CPU).in_memory_cells.batch(np.arange(12)))


def in_float64(batch):
    return replace(batch, counts=batch.counts.double())


def small_model(n_latent: int = 4, seed: int = 0) -> PaperGMVAE:
    torch.manual_seed(seed)
    return PaperGMVAE(60, N_TYPES, n_latent, (16, 8)).double()


def gradients(model: PaperGMVAE, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    names, parameters = zip(*model.named_parameters())
    return dict(zip(names, torch.autograd.grad(loss, parameters)))


def test_the_plain_zinb_equals_scipy():
    rng = np.random.default_rng(0)
    x, mu, theta, pi = rng.poisson(2.0, 500), rng.lognormal(0, 2, 500), rng.lognormal(0, 2, 500), rng.random(500)
    expected = (1 - pi) * scipy.stats.nbinom.pmf(x, theta, theta / (theta + mu)) + pi * (x == 0)
    found = plain_log_zinb(*(torch.from_numpy(value).double() for value in (x, mu, theta, pi)))
    np.testing.assert_allclose(found, np.log(expected), rtol=1e-8)


def test_the_loss_and_its_gradients_equal_the_plain_formula(batch):
    model = small_model()
    with torch.no_grad():  # means and dispersions on both sides of the ELU's kink, and far below it
        for head in (model.p_x_z_mean[-1], model.p_x_z_theta[-1]):
            head.weight.mul_(4)
            head.bias.copy_(torch.linspace(-6, 6, 60))
    epsilon = torch.randn(12, N_TYPES, 4, dtype=torch.float64)
    losses = model(batch, epsilon)
    plain = plain_paper_loss(model, batch.raw().to_dense(), batch.cell_type_idx, epsilon)
    torch.testing.assert_close(losses["loss"], plain, rtol=1e-9, atol=0)
    assert losses["loss"].item() == pytest.approx(
        sum(losses[name].item() for name in ("reconstruction_loss", "kl_z", "kl_y"))
    )
    ours, theirs = gradients(model, losses["loss"]), gradients(model, plain)
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-6, atol=1e-9, msg=name)


def test_types_that_cannot_change_the_loss_are_not_decoded(batch, monkeypatch):
    model = small_model()
    with torch.no_grad():
        model.q_y_x.bias.copy_(torch.tensor([0.0, -5.0, np.log(NEGLIGIBLE) - 8]))  # q(y=2|x) of about 1e-11
    decoded, real = [], model.p_x
    monkeypatch.setattr(model, "p_x", lambda z: decoded.append(len(z)) or real(z))
    epsilon = torch.randn(12, N_TYPES, 4, dtype=torch.float64)
    loss, plain = (
        model(batch, epsilon)["loss"],
        plain_paper_loss(model, batch.raw().to_dense(), batch.cell_type_idx, epsilon),
    )
    assert decoded == [24]  # two of three types
    float32 = torch.finfo(torch.float32).eps
    torch.testing.assert_close(loss, plain, rtol=float32 / 4, atol=0)
    ours, theirs = gradients(model, loss), gradients(model, plain)
    for name in ours:
        scale = theirs[name].abs().max().item()
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=float32 * scale, msg=name)


def test_the_layers_are_those_of_figure_1():
    model = PaperGMVAE(1000, 17)
    sizes = {name: tuple(p.shape) for name, p in model.named_parameters() if p.dim() == 2}
    assert sizes == {
        "q_genes.weight": (1000, 3 * 128), "q_z_xy_types.weight": (2 * 128, 17), "q_y_x.weight": (17, 128),
        "q_z_xy_mean.0.weight": (64, 128), "q_z_xy_mean.2.weight": (32, 64),
        "q_z_xy_log_var.0.weight": (64, 128), "q_z_xy_log_var.2.weight": (32, 64),
        "p_z_y_mean.0.weight": (128, 17), "p_z_y_mean.2.weight": (32, 128),
        "p_z_y_log_var.0.weight": (128, 17), "p_z_y_log_var.2.weight": (32, 128),
        "p_x_z_trunk.0.weight": (64, 32),
        "p_x_z_zeros.0.weight": (128, 64), "p_x_z_zeros.2.weight": (1000, 128),
        "p_x_z_mean.0.weight": (128, 64), "p_x_z_mean.2.weight": (1000, 128),
        "p_x_z_theta.0.weight": (128, 64), "p_x_z_theta.2.weight": (1000, 128),
    }  # fmt: skip


def test_the_likelihood_is_the_integral_over_z():
    """One dimension of z: numerical integration of p(x|z) p(z|y)."""
    counts, types = simulated_cells(n_cells=6)
    model = small_model(n_latent=1)
    batch = in_float64(CellDataset(counts, types, CPU).in_memory_cells.batch(np.arange(6)))
    z = torch.linspace(-12, 12, 4001, dtype=torch.float64)
    with torch.no_grad():
        mean, log_var = model.p_z()
        parameters = model.p_x(z[:, None])
        expected = []
        for i in range(6):
            of_cell = batch.select(torch.full((len(z),), i))
            prior = torch.distributions.Normal(mean[types[i]], (log_var[types[i]] / 2).exp()).log_prob(z)
            expected.append(torch.logsumexp(parameters.log_prob(of_cell) + prior, dim=0) + np.log(24 / 4000))
    found = model.float().log_likelihood(CellDataset(counts, types, CPU), n_samples=4000)
    np.testing.assert_allclose(found, torch.stack(expected), atol=0.1)


def test_new_cells_come_from_the_prior_of_their_type():
    model = small_model().float()
    with torch.no_grad():
        model.p_z_y_mean[-1].weight.mul_(10)
        likelihood = model.p_x(model.p_z()[0])  # at the mean z of each type
        mu, pi = likelihood.logits.exp(), torch.sigmoid(likelihood.zi_logits)
    types = np.repeat([0, 2], 3000)
    cells = np.concatenate([block.toarray() for block in registry.sample(model, types, 0, 0.0)])
    for k in (0, 2):
        expected = ((1 - pi) * mu)[k].numpy()
        np.testing.assert_allclose(cells[types == k].mean(axis=0), expected, rtol=0.35, atol=0.1)
        assert np.corrcoef(cells[types == k].mean(axis=0), expected)[0, 1] > 0.9
    again, other = registry.generate(model, types, 0), registry.generate(model, types, 1)
    assert (again != registry.generate(model, types, 0)).nnz == 0 and (again != other).nnz > 0
    part = next(registry.sample(model, types, 0, blocks=range(1, 2)))
    assert (part != again[256:512]).nnz == 0


# --- its training


def workplace(path) -> Workplace:
    place = Workplace(path)
    adata = simulated_dataset(n_cells=120)
    adata.uns |= {"dataset": "simulated", "split_id": "x"}
    place.data.mkdir(parents=True)
    write_counts(adata, place.data / "train.h5ad")
    return place


PAPER = {"PRESET": "paper", "DEVICE": "cpu", "KEEP_EVERY": 2, "LEARNING_RATE": 1e-4}


def test_training_ends_with_the_last_epoch_keeps_some_and_can_be_resumed(tmp_path):
    whole, parts = workplace(tmp_path / "whole"), workplace(tmp_path / "parts")
    whole.main(STAGES[3], **PAPER, EPOCHS=5)
    parts.main(STAGES[3], **PAPER, EPOCHS=3)
    torch.manual_seed(99)  # other random numbers in between must not matter
    parts.main(STAGES[3], **PAPER, EPOCHS=5, RESUME=True)
    history = pd.read_csv(whole.models / "paper_gmvae_history.csv")
    assert len(history) == 5 and history["train_loss"].iloc[-1] < history["train_loss"].iloc[0]
    for name, epoch in (("paper_gmvae", 5), ("paper_gmvae_epoch2", 2), ("paper_gmvae_epoch4", 4)):
        a, b = (load_checkpoint(place.models / f"{name}.pt", STAGES[3]) for place in (whole, parts))
        assert a["epoch"] == b["epoch"] == epoch and a["weights"].keys() == b["weights"].keys()
        for key, value in a["weights"].items():
            torch.testing.assert_close(value, b["weights"][key], rtol=0, atol=0)
    assert not (whole.models / "paper_gmvae_epoch5.pt").exists()
    kept = registry.load(load_checkpoint(whole.models / "paper_gmvae_epoch2.pt", STAGES[3]), CPU)
    assert registry.generate(kept, np.zeros(5, dtype=int), 0).shape == (5, 60)  # usable without the end of the training


def test_every_train_cell_is_used_in_every_epoch(tmp_path, monkeypatch):
    seen, real = [], registry.train_epoch

    def watched(model, optimizer, train, *arguments):
        seen.append(len(train))
        return real(model, optimizer, train, *arguments)

    monkeypatch.setattr(registry, "train_epoch", watched)
    workplace(tmp_path).main(STAGES[3], **PAPER, EPOCHS=2)
    assert seen == [120, 120]


def test_early_stopping_without_held_out_cells_is_refused(tmp_path):
    with pytest.raises(
        ValueError, match="VALIDATION_FRACTION is 0, but paper_gmvae with PATIENCE = 5 needs held-out cells"
    ):
        workplace(tmp_path).main(STAGES[3], **PAPER, PATIENCE=5)
