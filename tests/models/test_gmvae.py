"""The GMVAE: its bound, its likelihood, its training on all kinds of labels."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from helpers import CPU, trained_gmvae

from lib.data.batches import CellDataset
from lib.models.gmvae import GMVAE, LogEluPlusOne
from lib.models.likelihoods import Likelihood
from lib.models.sampling import generate


def sample_epsilon(batch, model) -> torch.Tensor:
    return torch.randn(batch.n_cells, model.n_latent)


def all_cells(counts, types):
    return CellDataset(counts, np.asarray(types), CPU).in_memory_cells.batch(np.arange(len(types)))


@pytest.fixture(scope="module")
def with_classifier(data):
    """A model of which 10 % of the cells had labels."""
    counts, types = data[0]
    return trained_gmvae(counts, np.where(np.random.default_rng(0).random(len(types)) < 0.1, types, -1), epochs=10)


def test_the_bound_rises_with_importance_samples_to_the_likelihood(data, model):
    test = CellDataset(*data[1], CPU)
    with torch.no_grad():
        terms = [model.elbo_terms(model.encode_genes(b), b, sample_epsilon(b, model)) for b in test.in_order(64)]
    elbo = -torch.cat([t["reconstruction_loss"] + t["kl_z"] for t in terms]).mean().item()
    one, few, many = (model.log_likelihood(test, n).mean() for n in (1, 10, 100))
    assert abs(one - elbo) < 1.0  # one sample is the ELBO, up to sampling error
    assert one < few < many


def test_mean_expression_is_elu_plus_one_of_a_linear_function_of_z(model):
    z, y, layer = torch.tensor([[3.0], [-3.0], [-60.0]]), torch.tensor([0, 1, 2]), model.p_x_zyl_log_mean
    t = model.log_loading_ratio.detach().exp().double()[y] * (z * layer.weight.sum(dim=1) + layer.bias).detach()
    expected = torch.where(t > 0, 1 + t, t.exp()).log() + model.log_profiles[y]
    assert (t > 0.5).any() and (t < -20).any()
    logits = model.p_x(z.expand(-1, model.n_latent), torch.ones(3), y).logits
    torch.testing.assert_close(logits.double(), expected, rtol=1e-4, atol=1e-4)
    points = torch.tensor([-40.0, -0.1, 0.1, 40.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(LogEluPlusOne.apply, points)


def test_the_likelihood_is_exact_where_z_does_nothing(data, model):
    """With a decoder that ignores z, p(x|y,l) is one negative binomial, and every importance weight must cancel to it."""
    blind = copy.deepcopy(model)
    torch.nn.init.zeros_(blind.p_x_zyl_log_mean.weight)
    # p(z|y) = N(0, 1), q(z|x,y) = N(0.3, e^0.4): different, so the weights must cancel, and q covers p
    for layer, bias in ((blind.q_z_xy_mean, 0.3), (blind.q_z_xy_log_var, 0.4)):
        torch.nn.init.zeros_(layer.weight), torch.nn.init.constant_(layer.bias, bias)
    for zero in (blind.p_z_y_mean, blind.p_z_y_log_var, blind.q_z_xy_axes.weight):
        torch.nn.init.zeros_(zero)
    test, batch = CellDataset(*data[1], CPU), all_cells(*data[1])
    relative_mean = torch.nn.functional.elu(blind.p_x_zyl_log_mean.bias * blind.log_loading_ratio.exp()) + 1
    logits = (relative_mean.log() + blind.log_profiles)[batch.cell_type_idx]
    log_theta = (blind.log_theta + blind.log_theta_ratio)[batch.cell_type_idx]
    exact = Likelihood(logits, batch.library_size.log(), log_theta, None).log_prob(batch).mean().item()
    assert blind.log_likelihood(test, n_samples=2000).mean() == pytest.approx(exact, abs=0.1)


def test_cells_without_labels_sum_over_all_types(data, with_classifier):
    """An unlabelled cell's loss is the labelled bounds weighted by q(y|x), plus KL(q(y|x) || p(y)): here term by term."""
    model, counts = with_classifier, data[0][0]
    unknown, epsilon = all_cells(counts[:5], np.full(5, -1)), torch.randn(5, model.n_latent)
    q = torch.softmax(model.q_y(model.encode_genes(unknown), unknown), dim=1).detach()
    expected = (q * (q.log() - model.type_frequency.log())).sum(dim=1).double()
    for k in range(3):
        of_type_k = all_cells(counts[:5], np.full(5, k))
        terms = model.elbo_terms(model.encode_genes(of_type_k), of_type_k, epsilon)
        expected = expected + q[:, k] * (terms["reconstruction_loss"] + terms["library_loss"] + terms["kl_z"]).detach()
    loss = (expected.mean() + model.shrinkage_penalty()).item()
    assert model(unknown, epsilon)["loss"].item() == pytest.approx(loss, rel=1e-5)


def test_mixed_batches_equal_their_parts(data, with_classifier):
    (counts, types), model, decoded = data[0], with_classifier, []
    hook = model.p_x_zyl_log_mean.register_forward_hook(lambda _, z, __: decoded.append(len(z[0])))
    labels, epsilon = np.where(np.arange(8) < 4, types[:8], -1), torch.randn(8, model.n_latent)
    whole = model(all_cells(counts[:8], labels), epsilon)["loss"].item()
    parts = [model(all_cells(counts[p], labels[p]), epsilon[p])["loss"].item() for p in (slice(4), slice(4, 8))]
    hook.remove()
    assert whole == pytest.approx(np.mean(parts), rel=1e-5)
    assert sum(decoded) == 2 * (4 + 4 * 3)  # a labelled cell is decoded once, whoever shares its batch


def test_a_classifier_is_trained_only_where_cells_lack_labels(data, model, with_classifier):
    assert model.q_y_x is None and not [name for name, _ in model.named_parameters() if "q_y" in name]
    counts, types = data[1]
    test = all_cells(counts, types)
    with torch.no_grad():
        guess = with_classifier.q_y(with_classifier.encode_genes(test), test).argmax(dim=1).numpy()
    assert (guess == types).mean() > 0.9
    twin = GMVAE(**with_classifier.arguments | {"with_classifier": False})
    twin.load_state_dict(with_classifier.state_dict(), strict=False)
    epsilon = sample_epsilon(test, twin)
    without, with_it = ({k: v.item() for k, v in m(test, epsilon).items()} for m in (twin, with_classifier))
    assert with_it["loss"] == pytest.approx(without["loss"] + with_it["kl_y"], rel=1e-6)
    assert without["stopping_criterion"] == pytest.approx(with_it["stopping_criterion"], rel=1e-6)


@pytest.mark.parametrize("label", [0, -1])
def test_a_process_without_a_cell_of_a_batch_adds_nothing(data, with_classifier, label):
    model = with_classifier
    none = all_cells(data[0][0][:3], np.full(3, label)).select(torch.zeros(3, dtype=torch.bool))
    model.zero_grad()
    losses = model(none, torch.randn(0, model.n_latent))
    losses["loss"].backward()
    assert losses["loss"].item() == pytest.approx(model.shrinkage_penalty().item()) and losses["kl_z"] == 0
    assert not model.q_z_xy_axes.weight.grad.any() and not model.p_x_zyl_log_mean.weight.grad.any()


def test_half_precision_keeps_the_likelihood_in_float32(data, model):
    batch = all_cells(*(part[:64] for part in data[0]))
    epsilon = sample_epsilon(batch, model)
    plain = model(batch, epsilon)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = model(batch, epsilon)
    for name, value in half.items():
        assert value.dtype in (torch.float32, torch.float64), name
        assert value.item() == pytest.approx(plain[name].item(), rel=0.01, abs=0.05), name


@pytest.mark.parametrize("arguments", [{}, {"likelihood": "zinb", "dispersion": "gene"}])
def test_every_variant_learns_and_float32_gives_losses_and_gradients_of_float64(data, arguments, monkeypatch):
    """Relative tolerance: 1e-5 for the loss of a cell, 1e-3 for the gradient of each parameter as a whole."""
    test = CellDataset(*data[1], CPU)
    untrained, model = (trained_gmvae(*data[0], epochs=n, **arguments) for n in (0, 5))
    assert model.log_likelihood(test, 20).mean() > untrained.log_likelihood(test, 20).mean() + 2
    batch = all_cells(*data[0])
    epsilon = sample_epsilon(batch, model)
    model.zero_grad()  # of the last step of training
    exact = copy.deepcopy(model).double()
    floats = {k: v.double() for k, v in vars(batch).items() if torch.is_tensor(v) and v.is_floating_point()}
    losses = [model(batch, epsilon)["loss"]]
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)  # parts are computed in float32 on purpose
    losses.append(exact(replace(batch, **floats), epsilon.double())["loss"])
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-5)
    for loss in losses:
        loss.backward()
    for (name, ours), theirs in zip(model.named_parameters(), exact.parameters()):
        error = (ours.grad.double() - theirs.grad).norm()
        assert error <= 1e-3 * theirs.grad.norm() + 1e-7, name


def test_dispersion_and_loadings_are_those_of_each_type():
    """In type 0, thirty genes are erratic, and thirty others stand still, which follow a programme in the other types."""
    rng = np.random.default_rng(0)
    types = rng.integers(0, 3, 900)
    mu, theta = np.full((900, 30), 8.0), np.where(types == 0, 0.5, 50.0)[:, None]
    follows = np.ones((900, 60))
    follows[types == 0, :30] = 0
    programme = 8 * np.exp(0.7 * rng.normal(size=(900, 1)) * follows)
    parts = rng.poisson(rng.gamma(theta, mu / theta)), rng.poisson(programme), rng.poisson(20, (900, 60))
    model = trained_gmvae(sp.csr_matrix(np.column_stack(parts).astype(np.float32)), types, epochs=40)
    log_theta = (model.log_theta + model.log_theta_ratio).detach()[:, :30].mean(dim=1)
    log_loading = model.log_loading_ratio.detach()[:, 30:60].mean(dim=1)
    assert log_theta[0] < log_theta[1:].min() - 1 and log_loading[0] < log_loading[1:].min() - 0.3
    first, second = (generate(model, np.full(1000, k), 0).toarray() for k in (0, 1))
    erratic, still = np.split(first.var(axis=0)[:60] / second.var(axis=0)[:60], 2)
    assert np.median(erratic) > 2.5 and np.median(still) < 0.5
