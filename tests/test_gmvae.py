"""The GMVAE: its bound, its likelihood, its training on all kinds of labels, its cells."""

import math

import numpy as np
import pytest
import torch
from conftest import simulated_cells

from lib.batches import CellDataset
from lib.gmvae import GMVAE
from lib.likelihoods import nb_log_prob, nb_per_type_log_likelihood

CPU = torch.device("cpu")


def trained(counts, cell_type_idx, epochs: int = 150, seed: int = 0, **arguments) -> GMVAE:
    torch.manual_seed(seed)
    model = GMVAE(counts.shape[1], 3, n_latent=4, hidden=(32, 16), **({"likelihood": "nb"} | arguments))
    model.initialise(counts, cell_type_idx)
    dataset, generator = CellDataset(counts, cell_type_idx, CPU), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam([{"params": [model.log_theta], "lr": 2e-2}, {"params": [p for n, p in model.named_parameters() if n != "log_theta"]}], lr=3e-3)
    for epoch in range(epochs):
        for batch in dataset.shuffled(64, generator):
            optimizer.zero_grad()
            model.loss(batch, min(1.0, epoch / 50), generator)["loss"].backward()
            optimizer.step()
    return model.eval()


@pytest.fixture(scope="module")
def data():
    counts, types = simulated_cells(n_cells=900)
    part = np.random.default_rng(0).random(900) < 0.8
    return (counts[part], types[part]), (counts[~part], types[~part])


@pytest.fixture(scope="module")
def model(data):
    return trained(*data[0])


def test_it_beats_a_model_without_latent_variables_on_cells_it_has_not_seen(data, model):
    train, test = (CellDataset(*part, CPU) for part in data)
    assert model.log_likelihood(test, n_samples=50).mean() > nb_per_type_log_likelihood(train, test).mean() + 8


@pytest.mark.parametrize("arguments", [{"likelihood": "zinb"}, {"dispersion": "gene-cell"}, {"likelihood": "zinb", "dispersion": "gene-cell"}])
def test_every_variant_learns(data, arguments):
    test = CellDataset(*data[1], CPU)
    untrained, learned = (trained(*data[0], epochs=n, **arguments).log_likelihood(test, 20).mean() for n in (0, 25))
    assert learned > untrained + 5


def test_the_bound_rises_with_importance_samples_to_the_likelihood(data, model):
    test = CellDataset(*data[1], CPU)
    with torch.no_grad():
        terms = [model.elbo_terms(b) for b in test.in_order(64)]
    elbo = -torch.cat([t["reconstruction_loss"] + t["kl_z"] for t in terms]).mean().item()
    one, few, many = (model.log_likelihood(test, n).mean() for n in (1, 10, 100))
    assert abs(one - elbo) < 1.0  # one sample is the ELBO, up to the draw
    assert one < few < many


def test_the_likelihood_is_exact_where_z_does_nothing(data, model):
    """With a decoder that ignores z, p(x|y,l) is one negative binomial, and every importance weight must cancel to it."""
    blind = GMVAE(**model.arguments)
    blind.load_state_dict(model.state_dict())
    torch.nn.init.zeros_(blind.p_x_z_log_mean.weight)
    # p(z|y) = N(0, 1), q(z|x,y) = N(0.3, e^0.4): different, so the weights must cancel, and q covers p
    heads = (blind.p_z_y_mean[-1], 0.0), (blind.p_z_y_log_var[-1], 0.0), (blind.q_z_xy_mean.rest[-1], 0.3), (blind.q_z_xy_log_var.rest[-1], 0.4)
    for head, bias in heads:
        torch.nn.init.zeros_(head.weight), torch.nn.init.constant_(head.bias, bias)
    test = CellDataset(*data[1], CPU)
    batch = test.batch(np.arange(len(test)))
    log_mu = torch.log_softmax(blind.p_x_z_log_mean.bias, 0)[None] + batch.library_size.log()[:, None]
    exact = nb_log_prob(batch, log_mu, blind.log_theta).detach().numpy()
    assert blind.eval().log_likelihood(test, n_samples=2000).mean() == pytest.approx(exact.mean(), abs=0.1)


def test_cells_without_labels_sum_over_all_types(data):
    """An unlabelled cell's loss is the labelled bounds weighted by q(y|x), plus KL(q(y|x) || p(y)): here term by term."""
    (counts, types), _ = data
    model = trained(counts, types, epochs=2)
    unknown = CellDataset(counts[:5], np.full(5, -1), CPU).batch(np.arange(5))
    q = torch.softmax(model.q_y(unknown), dim=1).detach()
    generator = torch.Generator().manual_seed(7)
    expected = (q * (q.log() - model.type_frequency.log())).sum(dim=1).double()
    for k in range(3):
        terms = model.elbo_terms(unknown.of_type(k), generator)
        expected = expected + q[:, k] * (terms["reconstruction_loss"] + terms["library_loss"] + terms["kl_z"]).detach()
    ours = model.loss(unknown, generator=torch.Generator().manual_seed(7))["loss"]
    assert ours.item() == pytest.approx(expected.mean().item(), rel=1e-5)


def test_mixed_batches_equal_their_parts(data):
    (counts, types), _ = data
    model = trained(counts, types, epochs=1)
    model.q_z_xy_log_var.rest[-1].bias.data.fill_(-60)  # next to no noise, so that the order of the draws plays no part
    decoded = []
    model.p_x_z.register_forward_hook(lambda _, z, __: decoded.append(len(z[0])))
    labels = np.where(np.arange(8) < 4, types[:8], -1)
    whole = model.loss(CellDataset(counts[:8], labels, CPU).batch(np.arange(8)))["loss"].item()
    parts = [model.loss(CellDataset(counts[:8], labels, CPU).batch(np.arange(*ends)))["loss"].item() for ends in ((0, 4), (4, 8))]
    assert whole == pytest.approx(np.mean(parts), rel=1e-3)
    assert sum(decoded) == 2 * (4 + 4 * 3)  # a labelled cell is decoded once, whoever shares its batch


def test_unlabelled_cells_help_and_get_their_types_back(data):
    (counts, types), (test_counts, test_types) = data
    few = np.where(np.random.default_rng(0).random(len(types)) < 0.1, types, -1)
    model = trained(counts, few, epochs=25)
    with torch.no_grad():
        guess = model.q_y(CellDataset(test_counts, test_types, CPU).batch(np.arange(len(test_types)))).argmax(dim=1).numpy()
    assert (guess == test_types).mean() > 0.9


def test_generated_cells_have_the_margins_of_their_type(data, model):
    (counts, types), _ = data
    wanted = np.repeat([0, 1, 2], 400)
    cells = model.sample(wanted, seed=0)
    assert cells.dtype == np.float32 and (cells.data == np.rint(cells.data)).all() and (cells.data > 0).all()
    for k in range(3):
        real, made = counts[types == k].toarray(), cells[wanted == k].toarray()
        share = [x.sum(axis=0) / x.sum() for x in (real, made)]
        assert np.corrcoef(*np.log(np.array(share) + 1e-3))[0, 1] > 0.97
        assert np.median(made.sum(axis=1)) == pytest.approx(np.median(real.sum(axis=1)), rel=0.2)
        assert np.log(made.sum(axis=1) + 1).std() == pytest.approx(np.log(real.sum(axis=1) + 1).std(), rel=0.35)
        assert (made == 0).mean() == pytest.approx((real == 0).mean(), abs=0.04)


def test_generation_is_seeded_and_in_the_order_asked_for(model):
    a, b, c = model.sample(np.array([0, 2, 1] * 10), 1), model.sample(np.array([0, 2, 1] * 10), 1), model.sample(np.array([0, 2, 1] * 10), 2)
    np.testing.assert_array_equal(a.toarray(), b.toarray())
    assert (a != c).nnz > 0
    assert model.sample(np.array([], dtype=int), 1).shape == (0, 60)


def test_noise_factor_narrows_the_cells(model):
    def spread(factor):
        z_driven = model.sample(np.zeros(600, dtype=int), 0, factor).toarray()
        shares = np.log1p(z_driven / np.maximum(z_driven.sum(axis=1, keepdims=True), 1) * 400)
        return shares.var(axis=0).sum()

    assert spread(0.0) < spread(1.0) < spread(2.0)


@pytest.mark.parametrize("zi_logits", [None, 0.0])
def test_the_sampler_draws_from_the_likelihood(zi_logits):
    from lib.gmvae import Likelihood

    n, mu, theta = 40_000, 3.0, 2.0
    full = torch.full((n, 1), math.log(mu))
    draws = Likelihood(full, torch.tensor([math.log(theta)]), None if zi_logits is None else torch.full((n, 1), zi_logits))
    x = draws.sample(torch.Generator().manual_seed(0)).numpy()
    keep = 1.0 if zi_logits is None else 0.5
    variance = mu + mu**2 / theta
    assert x.mean() == pytest.approx(keep * mu, rel=0.03)
    assert x.var() == pytest.approx(keep * variance + keep * (1 - keep) * mu**2, rel=0.06)
    assert (x == 0).mean() == pytest.approx(1 - keep + keep * (theta / (theta + mu)) ** theta, abs=0.01)


def test_half_precision_keeps_the_likelihood_in_float32(data):
    (counts, types), _ = data
    model = trained(counts, types, epochs=3)
    batch = CellDataset(counts, types, CPU).batch(np.arange(64))
    plain = model.loss(batch, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = model.loss(batch, generator=torch.Generator().manual_seed(0))
    half["loss"].backward()
    assert all(value.dtype in (torch.float32, torch.float64) for value in half.values())
    for name in ("reconstruction_loss", "kl_z", "library_loss"):
        assert half[name].item() == pytest.approx(plain[name].item(), rel=0.01, abs=0.05), name
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
