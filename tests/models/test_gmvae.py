"""The GMVAE: its bound, its likelihood, its training on all kinds of labels."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from helpers import CPU, simulated_cells, trained_gmvae

from lib.data.batches import CellDataset
from lib.models.gmvae import GMVAE, LogEluPlusOne
from lib.models.likelihoods import nb_log_prob
from lib.models.profiles import nb_baseline, nb_per_type_log_likelihood
from lib.models.sampling import generate


def sample_epsilon(batch, model) -> torch.Tensor:
    return torch.randn(batch.n_cells, model.n_latent)


def all_cells(counts, types):
    return CellDataset(counts, np.asarray(types), CPU).in_memory_cells.batch(np.arange(len(types)))


@pytest.fixture(scope="module")
def data():
    counts, types = simulated_cells(n_cells=900)
    part = np.random.default_rng(0).random(900) < 0.8
    return (counts[part], types[part]), (counts[~part], types[~part])


@pytest.fixture(scope="module")
def model(data):
    return trained_gmvae(*data[0], epochs=60)


@pytest.fixture(scope="module")
def with_classifier(data):
    """A model of which 10 % of the cells had labels."""
    counts, types = data[0]
    return trained_gmvae(counts, np.where(np.random.default_rng(0).random(len(types)) < 0.1, types, -1), epochs=10)


def test_it_beats_a_model_without_latent_variables_on_cells_it_has_not_seen(data, model):
    train, test = (CellDataset(*part, CPU) for part in data)
    baseline = nb_per_type_log_likelihood(nb_baseline(train, 3), test)
    assert model.log_likelihood(test, n_samples=50).mean() > baseline.mean() + 8


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [{"dispersion": "gene"}, {"likelihood": "zinb"}])
def test_every_variant_learns(data, arguments):
    test = CellDataset(*data[1], CPU)
    untrained, learned = (
        trained_gmvae(*data[0], epochs=n, **arguments).log_likelihood(test, 20).mean() for n in (0, 25)
    )
    assert learned > untrained + 5


def test_the_bound_rises_with_importance_samples_to_the_likelihood(data, model):
    test = CellDataset(*data[1], CPU)
    with torch.no_grad():
        terms = [model.elbo_terms(model.encode_genes(b), b, sample_epsilon(b, model)) for b in test.in_order(64)]
    elbo = -torch.cat([t["reconstruction_loss"] + t["kl_z"] for t in terms]).mean().item()
    one, few, many = (model.log_likelihood(test, n).mean() for n in (1, 10, 100))
    assert abs(one - elbo) < 1.0  # one sample is the ELBO, up to sampling error
    assert one < few < many


def test_mean_expression_is_elu_plus_one_of_a_linear_function_of_z(data, model):
    z, y = torch.tensor([[3.0], [-3.0], [-60.0]]).expand(-1, model.n_latent), torch.tensor([0, 1, 2])
    weight = model.p_x_zyl_log_mean.weight.detach().sum(dim=1).double()
    t = model.log_loading_ratio.detach().exp().double()[y] * (z[:, :1] * weight + model.p_x_zyl_log_mean.bias.detach())
    relative = torch.where(t > 0, 1 + t, t.exp())
    expected = relative.log() + model.log_profiles[y]
    assert (t > 0.5).any() and (t < -20).any()
    torch.testing.assert_close(model.p_x(z, torch.ones(3), y).logits.double(), expected, rtol=1e-4, atol=1e-4)
    points = torch.tensor([-40.0, -0.1, 0.1, 40.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(LogEluPlusOne.apply, points)


def test_the_likelihood_is_exact_where_z_does_nothing(data, model):
    """With a decoder that ignores z, p(x|y,l) is one negative binomial, and every importance weight must cancel to it."""
    blind = GMVAE(**model.arguments)
    blind.load_state_dict(model.state_dict())
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
    exact = nb_log_prob(batch, logits, batch.library_size.log(), log_theta).detach().numpy()
    assert blind.eval().log_likelihood(test, n_samples=2000).mean() == pytest.approx(exact.mean(), abs=0.1)


# --- cells without a label


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
    without, with_it = (m(test, epsilon) for m in (twin, with_classifier))
    assert with_it["loss"].item() == pytest.approx((without["loss"] + with_it["kl_y"]).item(), rel=1e-6)
    assert without["stopping_criterion"].item() == pytest.approx(with_it["stopping_criterion"].item(), rel=1e-6)


@pytest.mark.parametrize("label", [0, -1])
def test_a_process_without_a_cell_of_a_batch_adds_nothing(data, with_classifier, label):
    model = with_classifier
    none = all_cells(data[0][0][:3], np.full(3, label)).select(torch.zeros(3, dtype=torch.bool))
    model.zero_grad()
    losses = model(none, torch.randn(0, model.n_latent))
    losses["loss"].backward()
    assert losses["loss"].item() == pytest.approx(model.shrinkage_penalty().item()) and losses["kl_z"] == 0
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    assert not model.q_z_xy_axes.weight.grad.any() and not model.p_x_zyl_log_mean.weight.grad.any()


# --- numbers


def test_half_precision_keeps_the_likelihood_in_float32(data, model):
    batch = all_cells(*(part[:64] for part in data[0]))
    epsilon = sample_epsilon(batch, model)
    plain = model(batch, epsilon)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = model(batch, epsilon)
    assert all(value.dtype in (torch.float32, torch.float64) for value in half.values())
    for name in ("reconstruction_loss", "kl_z", "library_loss"):
        assert half[name].item() == pytest.approx(plain[name].item(), rel=0.01, abs=0.05), name


@pytest.mark.parametrize("likelihood", ["nb", "zinb"])
def test_float32_gives_the_losses_and_gradients_of_float64(data, likelihood, monkeypatch):
    """Relative tolerance: 1e-5 for the loss of a cell, 1e-3 for the gradient of each parameter as a whole."""
    model, batch = trained_gmvae(*data[0], epochs=3, likelihood=likelihood), all_cells(*data[0])
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


# --- what differs between types


@pytest.mark.slow
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
    new = [generate(model, np.full(1000, k), 0).toarray() for k in (0, 1)]
    erratic, still = (
        [(x[:, g].var(axis=0) / x[:, g].mean(axis=0)).mean() for x in new] for g in (slice(30), slice(30, 60))
    )
    assert erratic[0] > 2.5 * erratic[1] and still[0] < 0.5 * still[1]
