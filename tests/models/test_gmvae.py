"""The GMVAE: its bound, its likelihood, its training on all kinds of labels, its cells."""

import copy
import math
from dataclasses import replace

import numpy as np
import pytest
import scipy.sparse as sp
import scipy.stats
import torch
from helpers import simulated_cells, trained_gmvae

from lib.data.batches import CellDataset
from lib.models.gmvae import GMVAE
from lib.models.layers import LogEluPlusOne
from lib.models.likelihoods import Likelihood, nb_log_prob, sample_counts, sample_positive_nb
from lib.models.profiles import gene_marginals, nb_per_type_log_likelihood
from lib.models.sampling import BLOCK_CELLS, fit_prior, generate, sample, sample_z

CPU = torch.device("cpu")


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
    return trained_gmvae(*data[0])


def test_it_beats_a_model_without_latent_variables_on_cells_it_has_not_seen(data, model):
    train, test = (CellDataset(*part, CPU) for part in data)
    baseline = nb_per_type_log_likelihood(gene_marginals(train, 3), test)
    assert model.log_likelihood(test, n_samples=50).mean() > baseline.mean() + 8


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [{"dispersion": "gene"}, {"likelihood": "zinb"}],
)
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
    for of_type_and_library, bias in ((blind.q_z_xy_mean, 0.3), (blind.q_z_xy_log_var, 0.4)):
        torch.nn.init.zeros_(of_type_and_library.weight), torch.nn.init.constant_(of_type_and_library.bias, bias)
    for zero in (blind.p_z_y_mean, blind.p_z_y_log_var, blind.q_z_xy_axes.weight):
        torch.nn.init.zeros_(zero)
    test, batch = CellDataset(*data[1], CPU), all_cells(*data[1])
    relative_mean = torch.nn.functional.elu(blind.p_x_zyl_log_mean.bias * blind.log_loading_ratio.exp()) + 1
    logits = (relative_mean.log() + blind.log_profiles)[batch.cell_type_idx]
    log_theta = (blind.log_theta + blind.log_theta_ratio)[batch.cell_type_idx]
    exact = nb_log_prob(batch, logits, batch.library_size.log(), log_theta).detach().numpy()
    assert blind.eval().log_likelihood(test, n_samples=2000).mean() == pytest.approx(exact.mean(), abs=0.1)


def test_the_latent_representation_is_q_of_each_labelled_cell_in_order(data, model):
    counts, types = data[1][0][:50], np.where(np.arange(50) % 5 == 0, -1, data[1][1][:50])
    mean, log_var, cell_types = model.get_latent_representation(CellDataset(counts, types, CPU), batch_size=16)
    known = np.flatnonzero(types >= 0)
    np.testing.assert_array_equal(cell_types, types[known])
    for cell in known[[0, 7, -1]]:
        one = all_cells(counts[cell], types[[cell]])
        with torch.no_grad():
            expected = model.q_z(model.encode_genes(one), one)
        place = int(np.searchsorted(known, cell))
        torch.testing.assert_close(mean[[place]], expected[0], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(log_var[[place]], expected[1], rtol=1e-4, atol=1e-4)


def test_cells_without_labels_sum_over_all_types(data):
    """An unlabelled cell's loss is the labelled bounds weighted by q(y|x), plus KL(q(y|x) || p(y)): here term by term."""
    (counts, types), _ = data
    model = trained_gmvae(counts, types, epochs=2)
    unknown, epsilon = all_cells(counts[:5], np.full(5, -1)), torch.randn(5, model.n_latent)
    q = torch.softmax(model.q_y(model.encode_genes(unknown), unknown), dim=1).detach()
    expected = (q * (q.log() - model.type_frequency.log())).sum(dim=1).double()
    for k in range(3):
        of_type_k = all_cells(counts[:5], np.full(5, k))
        terms = model.elbo_terms(model.encode_genes(of_type_k), of_type_k, epsilon)
        expected = expected + q[:, k] * (terms["reconstruction_loss"] + terms["library_loss"] + terms["kl_z"]).detach()
    assert model(unknown, epsilon)["loss"].item() == pytest.approx(
        (expected.mean() + model.shrinkage_penalty()).item(), rel=1e-5
    )


def test_mixed_batches_equal_their_parts(data):
    (counts, types), _ = data
    model = trained_gmvae(counts, types, epochs=1)
    decoded = []
    model.p_x_zyl_log_mean.register_forward_hook(lambda _, z, __: decoded.append(len(z[0])))
    labels, epsilon = np.where(np.arange(8) < 4, types[:8], -1), torch.randn(8, model.n_latent)
    whole = model(all_cells(counts[:8], labels), epsilon)["loss"].item()
    parts = [
        model(all_cells(counts[part], labels[part]), epsilon[part])["loss"].item() for part in (slice(4), slice(4, 8))
    ]
    assert whole == pytest.approx(np.mean(parts), rel=1e-5)
    assert sum(decoded) == 2 * (4 + 4 * 3)  # a labelled cell is decoded once, whoever shares its batch


@pytest.mark.slow
def test_unlabelled_cells_help_and_get_their_types_back(data):
    (counts, types), (test_counts, test_types) = data
    few = np.where(np.random.default_rng(0).random(len(types)) < 0.1, types, -1)
    model = trained_gmvae(counts, few, epochs=25)
    with torch.no_grad():
        test = all_cells(test_counts, test_types)
        guess = model.q_y(model.encode_genes(test), test).argmax(dim=1).numpy()
    assert (guess == test_types).mean() > 0.9


def test_generated_cells_have_the_margins_of_their_type(data, model):
    (counts, types), _ = data
    wanted = np.repeat([0, 1, 2], 400)
    cells = generate(model, wanted, seed=0)
    assert cells.dtype == np.float32 and (cells.data == np.rint(cells.data)).all() and (cells.data > 0).all()
    for k in range(3):
        real, made = counts[types == k].toarray(), cells[wanted == k].toarray()
        share = [x.sum(axis=0) / x.sum() for x in (real, made)]
        assert np.corrcoef(*np.log(np.array(share) + 1e-3))[0, 1] > 0.97
        assert np.median(made.sum(axis=1)) == pytest.approx(np.median(real.sum(axis=1)), rel=0.2)
        assert np.log(made.sum(axis=1) + 1).std() == pytest.approx(np.log(real.sum(axis=1) + 1).std(), rel=0.35)
        assert (made == 0).mean() == pytest.approx((real == 0).mean(), abs=0.04)


def test_generation_is_seeded_and_in_the_order_asked_for(model):
    wanted = np.arange(3 * BLOCK_CELLS) % 3
    a, b, c = (generate(model, wanted, seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(a.toarray(), b.toarray())
    assert (a != c).nnz > 0
    part = generate(model, wanted, 1, blocks=range(1, 3))
    np.testing.assert_array_equal(part.toarray(), a[BLOCK_CELLS:].toarray())  # whoever makes a block, it is the same
    assert list(sample(model, np.array([], dtype=int), 1)) == []
    n_threads = torch.get_num_threads()
    try:
        for n in (1, 3):
            torch.set_num_threads(n)
            assert (generate(model, wanted, 1) != a).nnz == 0
            assert torch.get_num_threads() == n
    finally:
        torch.set_num_threads(n_threads)


def test_after_the_fit_cells_have_the_means_of_their_type_even_if_the_model_has_others(data):
    (counts, types), _ = data
    model = trained_gmvae(counts, types, epochs=3)
    model.log_profiles += 0.5 * torch.randn(model.log_profiles.shape)

    def error() -> float:
        made = generate(model, np.repeat([0, 1, 2], 1000), seed=0)
        shares = [
            [x.sum(axis=0) / x.sum() for x in (counts[types == k], made[1000 * k : 1000 * (k + 1)])] for k in range(3)
        ]
        return np.mean([np.abs(np.asarray(real) - np.asarray(new)).sum() for real, new in shares])

    before = error()
    fit_prior(model, CellDataset(counts, types, CPU), None, seed=0)
    assert error() < 0.1 < 0.5 * before
    _, log_library = sample_z(model, torch.from_numpy(types), 1.0, torch.Generator().manual_seed(1))
    assert log_library.std().item() == pytest.approx(np.log(np.asarray(counts.sum(axis=1))).std(), rel=0.1)


def test_latent_spread_narrows_the_cells(model):
    def spread(factor):
        z_driven = generate(model, np.zeros(600, dtype=int), 0, factor).toarray()
        shares = np.log1p(z_driven / np.maximum(z_driven.sum(axis=1, keepdims=True), 1) * 400)
        return shares.var(axis=0).sum()

    assert spread(0.0) < spread(1.0) < spread(2.0)


@pytest.mark.parametrize("zi_logits", [None, 0.0])
def test_counts_are_sampled_from_the_likelihood(zi_logits):
    n, mu, theta = 40_000, 3.0, 2.0
    one_gene = torch.zeros((n, 1))  # all of the library is its mean
    likelihood = Likelihood(
        one_gene,
        torch.full((n,), math.log(mu)),
        torch.tensor([math.log(theta)]),
        None if zi_logits is None else torch.full((n, 1), zi_logits),
    )
    x = likelihood.sample(torch.Generator().manual_seed(0)).toarray()
    keep = 1.0 if zi_logits is None else 0.5
    variance = mu + mu**2 / theta
    assert x.mean() == pytest.approx(keep * mu, rel=0.03)
    assert x.var() == pytest.approx(keep * variance + keep * (1 - keep) * mu**2, rel=0.06)
    assert (x == 0).mean() == pytest.approx(1 - keep + keep * (theta / (theta + mu)) ** theta, abs=0.01)


@pytest.mark.parametrize("extra_zeros", [0.0, 0.3])
@pytest.mark.parametrize("of_cell", [False, True])
def test_rare_and_frequent_genes_have_the_zeros_and_means_of_the_distribution(extra_zeros, of_cell):
    """Two likelihoods, one after the other, with thetas and extra zeros of their own genes, or of each cell and gene."""
    n, shares, theta = 20_000, np.array([0.001, 0.02, 0.179, 0.8]), np.array([0.1, 5.0, 1.0, 1e4])
    likelihoods = [
        Likelihood(
            torch.tensor(shares).float().log().expand(n, 4),
            torch.full((n,), math.log(library)),
            torch.tensor(theta).float().log() if not of_cell else torch.tensor(theta).float().log().expand(n, 4),
            torch.full((n, 4), math.log(extra_zeros / (1 - extra_zeros))) if extra_zeros else None,
        )
        for library in (2.0, 60.0)
    ]
    x = sample_counts(likelihoods, torch.Generator().manual_seed(3)).toarray()
    assert x.shape == (2 * n, 4)
    for library, part in ((2.0, x[:n]), (60.0, x[n:])):
        mu = library * shares
        zeros = extra_zeros + (1 - extra_zeros) * scipy.stats.nbinom.pmf(0, theta, theta / (theta + mu))
        np.testing.assert_allclose((part == 0).mean(axis=0), zeros, atol=4 * 0.5 / np.sqrt(n))
        variance = (1 - extra_zeros) * (mu + mu**2 / theta + extra_zeros * mu**2)
        assert (np.abs(part.mean(axis=0) - (1 - extra_zeros) * mu) < 5 * np.sqrt(variance / n)).all()


@pytest.mark.parametrize(
    "mu, theta", [(0.05, 0.02), (0.3, 5.0), (4.0, 0.1), (4.0, 30.0), (300.0, 2.0), (50.0, 0.02), (0.01, 1e6)]
)
def test_positive_counts_follow_the_truncated_distribution(mu, theta):
    """Both ways of drawing, against scipy's negative binomial without its zeros."""
    n, generator = 60_000, torch.Generator().manual_seed(1)
    ratio, shape = (torch.full((n,), value, dtype=torch.float64) for value in (mu / theta, theta))
    x = sample_positive_nb(ratio, shape, torch.rand(n, generator=generator, dtype=torch.float64), generator).numpy()
    assert x.min() >= 1
    nb = scipy.stats.nbinom(theta, theta / (theta + mu))
    edges = np.unique([nb.isf(nb.sf(0) * tail) for tail in (0.99, 0.9, 0.75, 0.5, 0.25, 0.1, 0.02)])
    expected = nb.sf(edges) / nb.sf(0)
    observed = (x[:, None] > edges).mean(axis=0)
    np.testing.assert_allclose(observed, expected, atol=4 * 0.5 / np.sqrt(n))


def test_half_precision_keeps_the_likelihood_in_float32(data):
    (counts, types), _ = data
    model = trained_gmvae(counts, types, epochs=3)
    batch, epsilon = all_cells(counts[:64], types[:64]), torch.randn(64, model.n_latent)
    plain = model(batch, epsilon)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = model(batch, epsilon)
    half["loss"].backward()
    assert all(value.dtype in (torch.float32, torch.float64) for value in half.values())
    for name in ("reconstruction_loss", "kl_z", "library_loss"):
        assert half[name].item() == pytest.approx(plain[name].item(), rel=0.01, abs=0.05), name
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


@pytest.mark.slow
def test_dispersion_is_that_of_each_type(data):
    """A gene that is steady in one type and erratic in another gets a theta for each."""
    rng = np.random.default_rng(0)
    types = rng.integers(0, 3, 900)
    mu, theta = np.full((900, 30), 8.0), np.where(types == 0, 0.5, 50.0)[:, None]
    counts = sp.csr_matrix(
        np.column_stack([rng.poisson(rng.gamma(theta, mu / theta)), rng.poisson(20, (900, 30))]).astype(np.float32)
    )
    model = trained_gmvae(counts, types, epochs=40)
    learned = (model.log_theta + model.log_theta_ratio).detach()[:, :30].mean(dim=1)
    assert learned[0] < learned[1] - 1 and learned[0] < learned[2] - 1
    made = [generate(model, np.full(1000, k), 0).toarray()[:, :30] for k in (0, 1)]
    fano = [(x.var(axis=0) / x.mean(axis=0)).mean() for x in made]
    assert fano[0] > 2.5 * fano[1]


@pytest.mark.slow
def test_a_gene_follows_a_programme_only_in_the_types_where_it_does():
    """Thirty genes move together in two types of three; in the third, half of them stand still."""
    rng = np.random.default_rng(0)
    types = rng.integers(0, 3, 900)
    follows = np.ones((900, 30))
    follows[types == 0, 15:] = 0
    mu = 8 * np.exp(0.7 * rng.normal(size=(900, 1)) * follows)
    counts = sp.csr_matrix(np.column_stack([rng.poisson(mu), rng.poisson(20, (900, 60))]).astype(np.float32))
    model = trained_gmvae(counts, types, epochs=40)
    ratio = model.log_loading_ratio.detach()[:, 15:30].mean(dim=1)
    assert ratio[0] < ratio[1] - 0.3 and ratio[0] < ratio[2] - 0.3
    made = [generate(model, np.full(1000, k), 0).toarray()[:, 15:30] for k in (0, 1)]
    fano = [(x.var(axis=0) / x.mean(axis=0)).mean() for x in made]
    assert fano[0] < 0.5 * fano[1]


def test_new_cells_have_the_outliers_of_the_model(model):
    types = np.resize([0, 1, 2], 600)
    without = generate(model, types, 0)
    model.outlier_rate.fill_(0.01)
    model.outlier_sizes.fill_(40.0)
    try:
        added = generate(model, types, 0).data - without.data
    finally:
        model.outlier_rate.zero_()
    assert (added % 40 == 0).all() and added.sum() / without.sum() == pytest.approx(0.4, rel=0.1)


@pytest.mark.parametrize("likelihood", ["nb", "zinb"])
def test_float32_gives_the_losses_and_gradients_of_float64(data, likelihood, monkeypatch):
    """Relative tolerance: 1e-5 for the loss of a cell, 1e-3 for the gradient of each parameter as a whole."""
    counts, types = data[0]
    model = trained_gmvae(counts, types, epochs=3, likelihood=likelihood)
    batch = all_cells(counts, types)
    epsilon = sample_epsilon(batch, model)
    model.zero_grad()  # of the last step of training
    exact = copy.deepcopy(model).double()
    floats = {
        name: value.double()
        for name, value in vars(batch).items()
        if torch.is_tensor(value) and value.is_floating_point()
    }
    losses = [model(batch, epsilon)["loss"]]
    with (
        monkeypatch.context() as patched
    ):  # the model computes parts of the loss in float32 on purpose: in float64 here
        patched.setattr(torch.Tensor, "float", torch.Tensor.double)
        losses.append(exact(replace(batch, **floats), epsilon.double())["loss"])
    assert losses[1].dtype == torch.float64
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-5)
    for loss in losses:
        loss.backward()
    for (name, ours), theirs in zip(model.named_parameters(), exact.parameters()):
        if theirs.grad is not None:
            error = (ours.grad.double() - theirs.grad).norm()
            assert error <= 1e-3 * theirs.grad.norm() + 1e-7, name


@pytest.mark.slow
def test_one_and_two_threads_train_the_same_model(data):
    """Sums are rounded in another order, so the weights agree to rounding that training amplifies, not to the bit."""
    before = torch.get_num_threads()
    models = []
    for n_threads in (1, 2):
        torch.set_num_threads(n_threads)
        models.append(trained_gmvae(*data[0], epochs=5))
    torch.set_num_threads(before)
    for (name, one), two in zip(models[0].named_parameters(), models[1].parameters()):
        torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-4, msg=name)
