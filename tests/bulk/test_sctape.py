"""The scTAPE network: its input, its predictions, and bulks that it refuses."""

import copy
from functools import partial

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import torch

from lib.bulk import sctape
from lib.bulk.network_input import complete, most_variable_genes, read_profiles, scale, select_genes
from lib.bulk.pseudobulk import train_mixtures
from lib.bulk.sctape import ScTAPE, adapt, augment, predict


def test_scale_by_hand_in_any_unit():
    profile = np.array([[1.0, 3.0, 0.0]])
    np.testing.assert_allclose(scale(profile), [[np.log1p(2500), np.log1p(7500), 0]], rtol=1e-6)
    np.testing.assert_allclose(scale(profile * 123), scale(profile), rtol=1e-6)
    with pytest.raises(ValueError, match="1 of 1 bulk samples have no expression"):
        scale(np.zeros((1, 3)))


def test_the_published_scale_by_hand():
    """log(1 + TPM), the smallest value of each sample 0 and the largest 1."""
    profiles = np.array([[1.0, 3.0, 0.0, 4.0], [5.0, 3.0, 1.0, 1.0]])
    low, high = np.log1p(1e5), np.log1p(5e5)
    expected = [np.log1p([1.25e5, 3.75e5, 0, 5e5]) / high, (np.log1p([5e5, 3e5, 1e5, 1e5]) - low) / (high - low)]
    np.testing.assert_allclose(scale(profiles * 7, minmax=True), expected, rtol=1e-5, atol=1e-7)


def test_the_published_gene_selection_takes_the_most_variable_share_of_the_training_mixtures():
    rng = np.random.default_rng(0)
    counts = rng.poisson(rng.lognormal(3, 1.5, (30, 12))).astype(np.float32)
    role = np.where(np.arange(30) < 20, "fit", "validation")
    mixtures = ad.AnnData(counts, obs=pd.DataFrame({"role": role}, index=[str(i) for i in range(30)]))
    usable = np.arange(12) != 5
    tpm = counts[:20, usable] / counts[:20, usable].sum(axis=1, keepdims=True) * 1e6
    expected = np.flatnonzero(usable)[np.argsort(tpm.var(axis=0))[-9:]]  # 0.85 of 11 genes
    assert most_variable_genes(mixtures, partial(train_mixtures, mixtures, None), usable, 0.85).tolist() == sorted(
        expected
    )


def test_genes_that_a_bulk_lacks_get_their_mean_share():
    bulk = pd.DataFrame([[6.0, 2.0, 9.0]], columns=["A", "B", "other"])
    values = complete(bulk, ["A", "C", "B"], np.array([0.5, 0.2, 0.3]))
    np.testing.assert_allclose(values, [[6.0, 8.0 * 0.2 / 0.8, 2.0]])


def trained_network(n_genes: int = 30, n_types: int = 3):
    """A network trained on linear mixtures of three profiles, as a checkpoint, and new mixtures with their true proportions."""
    rng = np.random.default_rng(0)
    signature = rng.lognormal(0, 2, (n_types, n_genes))
    signature /= signature.sum(axis=1, keepdims=True)
    proportions = rng.dirichlet(np.ones(n_types), 1200).astype(np.float32)
    profiles = scale(proportions @ signature)
    torch.manual_seed(0)
    model = ScTAPE(n_genes, n_types, dropout=0.0)
    model.initialise(torch.from_numpy(profiles[:1000]))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    x, p = torch.from_numpy(profiles[:1000]), torch.from_numpy(proportions[:1000])
    for _ in range(40):
        for rows in torch.randperm(1000).split(100):
            optimizer.zero_grad()
            model(x[rows], p[rows])["loss"].backward()
            optimizer.step()
    names = [f"G{i}" for i in range(n_genes)]
    checkpoint = {
        "arguments": model.arguments, "weights": model.state_dict(), "gene_names": names, "cell_types": ["a", "b", "c"],
        "mean_profile": torch.from_numpy((proportions @ signature).mean(axis=0)), "constants": {"MIN_GENE_COVERAGE": 0.7},
    }  # fmt: skip
    return (
        checkpoint,
        model,
        signature,
        pd.DataFrame(proportions[1000:] @ signature * 1e6, columns=names),
        proportions[1000:],
    )


@pytest.fixture(scope="module")
def network():
    return trained_network()


def test_it_predicts_proportions(network):
    checkpoint, _, _, bulk, truth = network
    predicted = predict(checkpoint, bulk).proportions
    np.testing.assert_allclose(predicted.sum(axis=1), 1, rtol=1e-5)
    assert np.abs(predicted.to_numpy() - truth).mean() < 0.03
    one = predict(checkpoint, bulk.iloc[[3]]).proportions  # a single sample is enough
    np.testing.assert_allclose(one, predicted.iloc[[3]], rtol=1e-4)


def test_gene_order_and_other_genes_do_not_matter(network):
    checkpoint, _, _, bulk, _ = network
    shuffled = bulk.sample(frac=1, axis=1, random_state=0).assign(other=5e5)
    np.testing.assert_allclose(
        predict(checkpoint, shuffled).proportions, predict(checkpoint, bulk).proportions, rtol=1e-4
    )


def test_missing_genes_give_a_message_and_too_many_are_refused(network, capsys):
    checkpoint, _, _, bulk, truth = network
    predicted = predict(checkpoint, bulk.iloc[:, :25]).proportions
    assert "83.3% of scTAPE's 30 genes" in capsys.readouterr().out
    assert np.abs(predicted.to_numpy() - truth).mean() < 0.15
    with pytest.raises(ValueError, match=r"33% of the 30 genes .* expected at least 70%.*--bulk-file"):
        predict(checkpoint, bulk.iloc[:, :10])


def augmented(profiles: torch.Tensor, share: torch.Tensor, sd: float, seed: int = 0) -> torch.Tensor:
    return augment(profiles, share, sd, torch.Generator().manual_seed(seed))


def test_augmented_profiles_have_platform_factors_of_their_own():
    share = torch.from_numpy(np.random.default_rng(1).dirichlet(np.full(800, 20.0)).astype(np.float32))
    profiles = torch.log1p(1e4 * share).repeat(400, 1)
    changed = torch.expm1(augmented(profiles, share, 1.0))
    torch.testing.assert_close(changed.sum(dim=1), torch.full((400,), 1e4), rtol=1e-4, atol=0.1)
    log_factors = torch.log(changed / (1e4 * share) + 1e-9)
    sd = log_factors.std(dim=1)
    assert sd.min() < 0.3 and sd.max() < 1.5 and 0.4 < sd.mean() < 0.8  # uniform between 0 and 1, plus sampling noise
    between = np.corrcoef(log_factors[:50].numpy())[np.triu_indices(50, 1)]
    assert np.abs(between.mean()) < 0.05  # no factor is shared
    torch.testing.assert_close(augmented(profiles, share, 1.0), augmented(profiles, share, 1.0))
    assert not torch.allclose(augmented(profiles, share, 1.0), augmented(profiles, share, 1.0, seed=1))


def test_augmentation_replaces_missing_genes_by_their_mean_share(monkeypatch):
    monkeypatch.setattr(sctape, "MIN_DEPTH", 1e12)  # without sampling noise
    monkeypatch.setattr(sctape, "MAX_DEPTH", 1e13)
    share = torch.tensor([0.4, 0.3, 0.2, 0.1])
    profile = torch.log1p(1e4 * torch.tensor([[0.1, 0.2, 0.3, 0.4]])).repeat(2000, 1)
    changed = torch.expm1(augmented(profile, share, 0.0)) / 1e4
    first = changed[(changed[:, 0] - 0.1).abs() > 1e-4]  # a gene of these is missing
    assert 0.2 < len(first) / 2000 < 0.5  # 1 - E[(1 - u)^4], u uniform to 0.2: 0.33
    only_0 = 0.9 * 0.4 / 0.6 / (0.9 + 0.9 * 0.4 / 0.6)  # gene 0 takes .4 / .6 of what the others have
    assert ((changed[:, 0] - only_0).abs() < 1e-4).sum() > 50


def test_only_training_augments(network):
    _, model, _, _, _ = network
    model = ScTAPE(30, 3, dropout=0.0, platform_sd=1.0)
    model.load_state_dict(network[1].state_dict())
    profiles = torch.from_numpy(scale(network[3].to_numpy()))
    truth = torch.from_numpy(network[4])
    assert model.train()(profiles, truth)["loss"] > 1.1 * model.eval()(profiles, truth)["loss"]
    torch.testing.assert_close(model.eval()(profiles, truth), network[1].eval()(profiles, truth))
    with torch.no_grad():
        criteria = [float(m.validate(profiles, truth)["stopping_criterion"]) for m in (model, model, network[1])]
    assert criteria[0] == criteria[1] > 1.2 * criteria[2]  # on simulated platforms, the same at each call


@pytest.fixture
def short_adaptation(monkeypatch):
    monkeypatch.setattr(sctape, "ADAPT_STEPS", 40)
    monkeypatch.setattr(sctape, "ADAPT_LEARNING_RATE", 1e-3)


def test_the_adaptive_stage_reconstructs_the_bulk_near_the_first_estimate(network, short_adaptation):
    checkpoint, model, _, bulk, truth = network
    factors = np.exp(np.random.default_rng(3).normal(0, 0.5, 30))
    profiles = torch.from_numpy(scale((bulk * factors).to_numpy()))
    before = copy.deepcopy(model.state_dict())
    adapted = adapt(model, profiles)
    torch.testing.assert_close(model.state_dict(), before)  # the trained network is not changed
    target = model.standardised(profiles)
    with torch.no_grad():
        first, second = ((m.decoder(m.proportions(profiles)) - target).abs().mean() for m in (model, adapted))
        moved = (adapted.proportions(profiles) - model.proportions(profiles)).abs().mean()
    assert second < 0.8 * first and 0 < moved < 0.1
    changed = predict(checkpoint, bulk * factors, "overall")
    np.testing.assert_allclose(changed.proportions, adapted.proportions(profiles).detach(), rtol=1e-5)
    assert changed.signatures.shape == (1, 3, 30) and np.abs(changed.proportions.to_numpy() - truth).mean() < 0.2


def test_per_sample_adapts_to_each_sample_alone(network, short_adaptation):
    checkpoint, _, _, bulk, _ = network
    both = predict(checkpoint, bulk.iloc[:2], "per-sample")
    alone = predict(checkpoint, bulk.iloc[[1]], "overall")
    np.testing.assert_allclose(both.proportions.iloc[1], alone.proportions.iloc[0], rtol=1e-4)
    np.testing.assert_allclose(both.signatures[1], alone.signatures[0], rtol=1e-4)
    assert both.signatures.shape == (2, 3, 30) and np.abs(both.signatures[0] - both.signatures[1]).max() > 0


def test_the_signature_matrix_holds_the_profiles_of_the_pure_types(network):
    _, model, signature, _, _ = network
    decoded = model.signature_matrix().numpy()
    assert decoded.shape == signature.shape
    for k in range(3):
        assert np.corrcoef(decoded[k], scale(signature[[k]])[0])[0, 1] > 0.8


def test_without_a_positive_output_all_proportions_are_equal():
    model = ScTAPE(4, 2, 0.0)
    torch.nn.init.zeros_(model.encoder[-1].weight)
    torch.nn.init.constant_(model.encoder[-1].bias, -1.0)
    torch.testing.assert_close(model.proportions(torch.ones(1, 4)), torch.full((1, 2), 0.5))


@pytest.fixture
def mixtures():
    """20 mixtures of two types: genes 3 and 5 differ between the types, the other 28 do not; the last 5 are held out."""
    rng = np.random.default_rng(0)
    proportions = rng.dirichlet(np.ones(2), 20)
    mean = np.full((2, 30), 500.0)
    mean[:, [3, 5]] = [[2000, 100], [100, 2000]]
    obs = pd.DataFrame({"role": ["fit"] * 15 + ["validation"] * 5}, index=[f"sample_{i}" for i in range(20)])
    return ad.AnnData(rng.poisson(proportions @ mean).astype(np.float32), obs=obs, obsm={"proportions": proportions})


def test_genes_that_the_proportions_explain_are_selected(mixtures):
    usable, blocks = np.ones(30, dtype=bool), partial(train_mixtures, mixtures, None)
    np.testing.assert_array_equal(select_genes(mixtures, blocks, usable, 2), [3, 5])
    usable[3] = False
    assert 5 in select_genes(mixtures, blocks, usable, 2) and 3 not in select_genes(mixtures, blocks, usable, 29)
    with pytest.raises(ValueError, match="1 genes are left to predict the proportions of 2 cell types.*raise N_GENES"):
        select_genes(mixtures, blocks, usable, 1)


def test_profiles_and_mean_shares_by_numpy(mixtures):
    genes = np.array([3, 5, 9])
    profiles, share = read_profiles(mixtures, partial(train_mixtures, mixtures, None), genes)
    rate = mixtures.X[:, genes] / mixtures.X[:, genes].sum(axis=1, keepdims=True)
    np.testing.assert_allclose(profiles, np.log1p(rate * 1e4), rtol=1e-5)
    np.testing.assert_allclose(share, rate[:15].mean(axis=0), rtol=1e-5)  # of the mixtures to train on
