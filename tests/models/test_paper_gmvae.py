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
    parts = sum(losses[name].item() for name in ("reconstruction_loss", "kl_z", "kl_y"))
    assert losses["loss"].item() == pytest.approx(parts)
    ours, theirs = gradients(model, losses["loss"]), gradients(model, plain)
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-6, atol=1e-9, msg=name)
    none = model(batch.select(torch.zeros(12, dtype=torch.bool)), epsilon[:0])["loss"]  # of one of many processes
    assert none.item() == 0 and all(not g.any() for g in gradients(model, none).values())


def test_types_that_cannot_change_the_loss_are_not_decoded(batch):
    model, decoded = small_model(), []
    with torch.no_grad():
        model.q_y_x.bias.copy_(torch.tensor([0.0, -5.0, np.log(NEGLIGIBLE) - 8]))  # q(y=2|x) of about 1e-11
    epsilon = torch.randn(12, N_TYPES, 4, dtype=torch.float64)
    hook = model.p_x_z_trunk.register_forward_hook(lambda _, z, __: decoded.append(len(z[0])))
    loss = model(batch, epsilon)["loss"]
    hook.remove()
    plain = plain_paper_loss(model, batch.raw().to_dense(), batch.cell_type_idx, epsilon)
    assert decoded == [24]  # two of three types
    float32 = torch.finfo(torch.float32).eps
    torch.testing.assert_close(loss, plain, rtol=float32 / 4, atol=0)
    ours, theirs = gradients(model, loss), gradients(model, plain)
    for name in ours:
        scale = theirs[name].abs().max().item()
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=float32 * scale, msg=name)


def test_the_layers_are_those_of_figure_1():
    sizes = {name: tuple(p.shape) for name, p in PaperGMVAE(1000, 17).named_parameters() if p.dim() == 2}
    expected = {"q_genes.weight": (1000, 3 * 128), "q_z_xy_types.weight": (2 * 128, 17), "q_y_x.weight": (17, 128)}
    expected |= {"p_x_z_trunk.0.weight": (64, 32)}
    towers = {"q_z_xy": (("mean", "log_var"), (128, 64, 32)), "p_z_y": (("mean", "log_var"), (17, 128, 32))}
    towers |= {"p_x_z": (("zeros", "mean", "theta"), (64, 128, 1000))}
    for density, (parameters, (n_in, n_hidden, n_out)) in towers.items():
        for parameter in parameters:
            expected[f"{density}_{parameter}.0.weight"] = (n_hidden, n_in)
            expected[f"{density}_{parameter}.2.weight"] = (n_out, n_hidden)
    assert sizes == expected


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
        assert np.corrcoef(cells[types == k].mean(axis=0), expected)[0, 1] > 0.9
    again, other = registry.generate(model, types, 0), registry.generate(model, types, 1)
    assert (again != registry.generate(model, types, 0)).nnz == 0 and (again != other).nnz > 0
    part = next(registry.sample(model, types, 0, blocks=range(1, 2)))
    assert (part != again[256:512]).nnz == 0


# --- its training

PAPER = {"PRESET": "paper", "DEVICE": "cpu", "KEEP_EVERY": 2, "LEARNING_RATE": 1e-4}


def workplace(path) -> Workplace:
    place = Workplace(path)
    adata = simulated_dataset(n_cells=120)
    adata.uns |= {"dataset": "simulated", "split_id": "x"}
    place.data.mkdir(parents=True)
    write_h5ad(adata, place.data / "train.h5ad")
    return place


def test_training_uses_all_cells_and_the_last_epoch_keeps_some_and_can_be_resumed(tmp_path, capsys):
    whole, parts = workplace(tmp_path / "whole"), workplace(tmp_path / "parts")
    whole.main(STAGES[3], **PAPER, EPOCHS=5)
    assert "120 cells to train on, 0 held out" in capsys.readouterr().out
    parts.main(STAGES[3], **PAPER, EPOCHS=3)
    torch.manual_seed(99)  # other random numbers in between must not matter
    # neither must constants of our GMVAE
    parts.main(STAGES[3], **PAPER, EPOCHS=5, RESUME=True, HIDDEN=64, DISPERSION_LEARNING_RATE=0.1)
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


def test_early_stopping_without_held_out_cells_is_refused(tmp_path):
    message = "VALIDATION_FRACTION is 0, but paper_gmvae with PATIENCE = 5 needs held-out cells"
    with pytest.raises(ValueError, match=message):
        workplace(tmp_path).main(STAGES[3], **PAPER, PATIENCE=5)


def test_cells_without_a_type_get_a_classifier_and_other_generators_their_settings(tmp_path):
    place = workplace(tmp_path)
    place.main(STAGES[3], EPOCHS=2, DEVICE="cpu")
    ours = load_checkpoint(place.models / "gmvae.pt", STAGES[3])
    assert not ours["arguments"]["with_classifier"] and "LIKELIHOOD" in ours["constants"]
    adata = simulated_dataset(n_cells=120)
    adata.obs.loc[adata.obs_names[::4], "cell_type"] = np.nan
    adata.uns |= {"dataset": "simulated", "split_id": "x"}
    write_h5ad(adata, place.data / "train.h5ad")
    place.main(STAGES[3], EPOCHS=2, DEVICE="cpu")
    ours = load_checkpoint(place.models / "gmvae.pt", STAGES[3])
    assert ours["arguments"]["with_classifier"] and registry.load(ours, CPU).q_y_x is not None
    place.main(STAGES[3], GENERATOR="pca_cvae", GENERATOR_SETTINGS=("epochs=3", "n_pcs=7"), DEVICE="cpu")
    other = load_checkpoint(place.models / "pca_cvae.pt", STAGES[3])
    assert len(pd.read_csv(place.models / "pca_cvae_history.csv")) == 3 and other["arguments"]["n_pcs"] == 7
    assert other["settings"]["epochs"] == other["constants"]["EPOCHS"] == 3 and "LIKELIHOOD" not in other["constants"]
