"""The GMVAE as published: its sizes, its loss against the plain formula, its likelihood, its cells, its training by stage 3."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import CPU, STAGES, Workplace, plain_paper_loss, simulated_cells, simulated_dataset

from lib.baselines import registry
from lib.data.batches import CellDataset
from lib.data.counts import write_h5ad
from lib.models.paper_gmvae import NEGLIGIBLE, PaperGMVAE
from lib.training import load_checkpoint

N_TYPES = 3


def batch_of(n_cells: int):
    """Cells of three types, counts in float64."""
    batch = CellDataset(*simulated_cells(n_cells=n_cells), CPU).in_memory_cells.batch(np.arange(n_cells))
    return replace(batch, counts=batch.counts.double())


@pytest.fixture
def batch():
    return batch_of(12)


def small_model(n_latent: int = 4, seed: int = 0) -> PaperGMVAE:
    torch.manual_seed(seed)
    return PaperGMVAE(60, N_TYPES, n_latent, (16, 8)).double()


def gradients(model: PaperGMVAE, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    names, parameters = zip(*model.named_parameters())
    return dict(zip(names, torch.autograd.grad(loss, parameters)))


@pytest.mark.parametrize("n_decoded", [3, 2])
def test_the_loss_and_its_gradients_equal_the_plain_formula(batch, n_decoded):
    """With two types decoded, the third cannot change the loss in float32."""
    model, decoded, epsilon = small_model(), [], torch.randn(12, N_TYPES, 4, dtype=torch.float64)
    with torch.no_grad():
        if n_decoded == 2:  # q(y=2|x) of about 1e-11
            model.q_y_x.bias.copy_(torch.tensor([0.0, -5.0, np.log(NEGLIGIBLE) - 8]))
        for head in (model.p_x_z_mean[-1], model.p_x_z_theta[-1]):  # on both sides of the ELU's kink, and far below it
            head.weight.mul_(4)
            head.bias.copy_(torch.linspace(-6, 6, 60))
    hook = model.p_x_z_trunk.register_forward_hook(lambda _, z, __: decoded.append(len(z[0])))
    losses = model(batch, epsilon)
    hook.remove()
    assert decoded == [12 * n_decoded]
    precision = 1e-9 if n_decoded == 3 else torch.finfo(torch.float32).eps
    plain = plain_paper_loss(model, batch.raw().to_dense(), batch.cell_type_idx, epsilon)
    torch.testing.assert_close(losses["loss"], plain, rtol=precision / 4, atol=0)
    parts = sum(losses[name].item() for name in ("reconstruction_loss", "kl_z", "kl_y"))
    assert losses["loss"].item() == pytest.approx(parts)
    ours, theirs = gradients(model, losses["loss"]), gradients(model, plain)
    for name in ours:
        scale = theirs[name].abs().max().item()
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=precision * scale, msg=name)


def test_a_process_without_a_cell_of_a_batch_adds_nothing(batch):
    model = small_model()
    none = model(batch.select(torch.zeros(12, dtype=torch.bool)), torch.randn(0, N_TYPES, 4).double())["loss"]
    assert none.item() == 0 and all(not g.any() for g in gradients(model, none).values())


def test_the_layers_are_those_of_figure_1():
    sizes = {name: tuple(p.shape) for name, p in PaperGMVAE(1000, 17).named_parameters() if p.dim() == 2}
    expected = {
        "q_genes": (1000, 3 * 128),
        "q_z_xy_types": (2 * 128, 17),
        "q_y_x": (17, 128),
        "p_x_z_trunk.0": (64, 32),
    }
    towers = {"q_z_xy_mean": (128, 64, 32), "q_z_xy_log_var": (128, 64, 32)}
    towers |= {"p_z_y_mean": (17, 128, 32), "p_z_y_log_var": (17, 128, 32)}
    towers |= dict.fromkeys(("p_x_z_zeros", "p_x_z_mean", "p_x_z_theta"), (64, 128, 1000))
    for name, (n_in, n_hidden, n_out) in towers.items():
        expected |= {f"{name}.0": (n_hidden, n_in), f"{name}.2": (n_out, n_hidden)}
    assert sizes == {f"{name}.weight": size for name, size in expected.items()}


def test_the_likelihood_is_the_integral_over_z():
    """One dimension of z: numerical integration of p(x|z) p(z|y)."""
    (counts, types), batch = simulated_cells(n_cells=6), batch_of(6)
    model = small_model(n_latent=1)
    z = torch.linspace(-12, 12, 4001, dtype=torch.float64)
    with torch.no_grad():
        mean, log_var = model.p_z()
        p_x, expected = model.p_x(z[:, None]), []
        for i in range(6):
            prior = torch.distributions.Normal(mean[types[i]], (log_var[types[i]] / 2).exp()).log_prob(z)
            log_p_x = p_x.log_prob(batch.select(torch.full((len(z),), i)))
            expected.append(torch.logsumexp(log_p_x + prior, dim=0) + np.log(24 / 4000))
    ours = model.float().log_likelihood(CellDataset(counts, types, CPU), n_samples=4000)
    np.testing.assert_allclose(ours, torch.stack(expected), atol=0.1)


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
    again, other = registry.generate(model, types, 0), registry.generate(model, types, 1)
    assert (again != registry.generate(model, types, 0)).nnz == 0 and (again != other).nnz > 0
    part = next(registry.sample(model, types, 0, blocks=range(1, 2)))
    assert (part != again[256:512]).nnz == 0


# --- its training


def test_training_uses_all_cells_keeps_some_epochs_and_can_be_resumed(tmp_path, capsys):
    place, paper = Workplace(tmp_path), {"PRESET": "paper", "DEVICE": "cpu", "KEEP_EVERY": 2, "LEARNING_RATE": 1e-4}
    adata = simulated_dataset(n_cells=120)
    adata.uns |= {"dataset": "simulated", "split_id": "x"}
    place.data.mkdir()
    write_h5ad(adata, place.data / "train.h5ad")
    place.main(STAGES[3], **paper, EPOCHS=3)
    assert "120 cells to train on, 0 held out" in capsys.readouterr().out
    # constants of our GMVAE do not matter
    place.main(STAGES[3], **paper, EPOCHS=5, RESUME=True, HIDDEN=64, DISPERSION_LEARNING_RATE=0.1)
    history = pd.read_csv(place.models / "paper_gmvae_history.csv")
    assert len(history) == 5 and history["train_loss"].iloc[-1] < history["train_loss"].iloc[0]
    for name, epoch in (("paper_gmvae", 5), ("paper_gmvae_epoch2", 2), ("paper_gmvae_epoch4", 4)):
        checkpoint = load_checkpoint(place.models / f"{name}.pt", STAGES[3])
        assert checkpoint["epoch"] == epoch and "LIKELIHOOD" not in checkpoint["constants"]
        assert registry.generate(registry.load(checkpoint, CPU), np.zeros(5, dtype=int), 0).shape == (5, 60)
    with pytest.raises(ValueError, match="VALIDATION_FRACTION is 0, but paper_gmvae with PATIENCE = 5 needs held-out"):
        place.main(STAGES[3], **paper, PATIENCE=5)
