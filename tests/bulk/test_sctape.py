"""The scTAPE network: its input, its predictions, and bulks that it refuses."""

import copy
from functools import partial

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import torch

from lib.bulk import sctape
from lib.bulk.pseudobulk import train_mixtures
from lib.bulk.sctape import ScTAPE, adapt, augment, predict, scale, select_genes

N_GENES = 30


def test_scale_by_hand_in_any_unit():
    profile = np.array([[1.0, 3.0, 0.0]])
    np.testing.assert_allclose(scale(profile * 123), [[np.log1p(2500), np.log1p(7500), 0]], rtol=1e-6)
    with pytest.raises(ValueError, match="1 of 1 bulk samples have no expression"):
        scale(np.zeros((1, 3)))
    # published: log(1 + TPM), the smallest value of each sample 0 and the largest 1
    low, high = np.log1p(1e5), np.log1p(5e5)
    expected = [np.log1p([1.25e5, 3.75e5, 0, 5e5]) / high, (np.log1p([5e5, 3e5, 1e5, 1e5]) - low) / (high - low)]
    profiles = np.array([[1.0, 3.0, 0.0, 4.0], [5.0, 3.0, 1.0, 1.0]])
    np.testing.assert_allclose(scale(profiles * 7, minmax=True), expected, rtol=1e-5, atol=1e-7)


@pytest.fixture(scope="module")
def network():
    """A network trained on linear mixtures of three profiles, its checkpoint, and new mixtures with their true proportions."""
    rng = np.random.default_rng(0)
    signature = rng.lognormal(0, 2, (3, N_GENES))
    signature /= signature.sum(axis=1, keepdims=True)
    true = rng.dirichlet(np.ones(3), 1200).astype(np.float32)
    x, p = torch.from_numpy(scale(true[:1000] @ signature)), torch.from_numpy(true[:1000])
    torch.manual_seed(0)
    model = ScTAPE(N_GENES, 3, dropout=0.0)
    model.initialise(x)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(40):
        for rows in torch.randperm(1000).split(100):
            optimizer.zero_grad()
            model(x[rows], p[rows])["loss"].backward()
            optimizer.step()
    names = [f"G{i}" for i in range(N_GENES)]
    checkpoint = {
        "arguments": model.arguments, "weights": model.state_dict(), "gene_names": names, "cell_types": ["a", "b", "c"],
        "mean_profile": torch.from_numpy((true @ signature).mean(axis=0)), "constants": {"MIN_GENE_COVERAGE": 0.7},
    }  # fmt: skip
    return checkpoint, model.eval(), signature, pd.DataFrame(true[1000:] @ signature * 1e6, columns=names), true[1000:]


def test_it_predicts_proportions_whatever_the_order_of_genes(network):
    checkpoint, model, signature, bulk, truth = network
    predicted = predict(checkpoint, bulk)
    np.testing.assert_allclose(predicted.proportions.sum(axis=1), 1, rtol=1e-5)
    assert np.abs(predicted.proportions.to_numpy() - truth).mean() < 0.03
    one = bulk.iloc[[3]].sample(frac=1, axis=1, random_state=0).assign(other=5e5)  # a single sample is enough
    np.testing.assert_allclose(predict(checkpoint, one).proportions, predicted.proportions.iloc[[3]], rtol=1e-4)
    raw = torch.tensor([[-1.0, -2.0], [-1.0, 3.0]])  # no positive value: equal shares
    np.testing.assert_allclose(sctape.non_negative_shares(raw), [[0.5, 0.5], [0, 1]], atol=1e-6)
    np.testing.assert_allclose(predicted.signatures[0], torch.expm1(model.signature_matrix()))
    for k in range(3):
        assert np.corrcoef(np.log1p(predicted.signatures[0, k]), scale(signature[[k]])[0])[0, 1] > 0.8


def test_missing_genes_get_their_mean_share_and_too_many_are_refused(network, capsys):
    checkpoint, _, _, bulk, truth = network
    genes = {"gene_names": ["A", "C", "B", "D"], "mean_profile": torch.tensor([0.4, 0.2, 0.2, 0.2])}
    profiles = sctape.bulk_profiles(checkpoint | genes, pd.DataFrame({"A": [6.0], "B": [2.0], "D": [4.0]}), "", "")
    np.testing.assert_allclose(profiles, scale(np.array([[6.0, 12.0 * 0.2 / 0.8, 2.0, 4.0]])), rtol=1e-6)
    predicted = predict(checkpoint, bulk.iloc[:, :25]).proportions
    assert "83.3% of the 30 genes that scTAPE" in capsys.readouterr().out
    assert np.abs(predicted.to_numpy() - truth).mean() < 0.15
    with pytest.raises(ValueError, match=r"33% of the 30 genes .* expected at least 70%.*--bulk-file"):
        predict(checkpoint, bulk.iloc[:, :10])


def augmented(profiles: torch.Tensor, share: torch.Tensor, sd: float) -> torch.Tensor:
    return augment(profiles, share, sd, torch.Generator().manual_seed(0))


def test_augmented_profiles_have_platform_factors_of_their_own():
    share = torch.from_numpy(np.random.default_rng(1).dirichlet(np.full(800, 20.0)).astype(np.float32))
    changed = torch.expm1(augmented(torch.log1p(1e4 * share).repeat(400, 1), share, 1.0))
    torch.testing.assert_close(changed.sum(dim=1), torch.full((400,), 1e4), rtol=1e-4, atol=0.1)
    log_factors = torch.log(changed / (1e4 * share) + 1e-9)
    sd = log_factors.std(dim=1)
    assert sd.min() < 0.3 and sd.max() < 1.5 and 0.4 < sd.mean() < 0.8  # uniform between 0 and 1, plus sampling noise
    between = np.corrcoef(log_factors[:50].numpy())[np.triu_indices(50, 1)]
    assert np.abs(between.mean()) < 0.05  # no factor is shared


def test_augmentation_replaces_missing_genes_by_their_mean_share(monkeypatch):
    monkeypatch.setattr(sctape, "MIN_DEPTH", 1e12)  # without sampling noise
    monkeypatch.setattr(sctape, "MAX_DEPTH", 1e13)
    share = torch.tensor([0.4, 0.3, 0.2, 0.1])
    profile = torch.log1p(1e4 * torch.tensor([[0.1, 0.2, 0.3, 0.4]])).repeat(2000, 1)
    changed = torch.expm1(augmented(profile, share, 0.0)) / 1e4
    is_missing = (changed[:, 0] - 0.1).abs() > 1e-4  # one of the genes
    assert 0.2 < is_missing.float().mean() < 0.5  # 1 - E[(1 - u)^4], u uniform to 0.2: 0.33
    only_0 = 0.9 * 0.4 / 0.6 / (0.9 + 0.9 * 0.4 / 0.6)  # gene 0 takes .4 / .6 of what the others have
    assert ((changed[:, 0] - only_0).abs() < 1e-4).sum() > 50


def test_only_training_augments_and_the_criterion_is_the_error_of_the_proportions(network):
    _, trained, _, bulk, true = network
    model = ScTAPE(N_GENES, 3, dropout=0.5, platform_sd=1.0)
    model.load_state_dict(trained.state_dict())
    x, p = torch.from_numpy(scale(bulk.to_numpy())), torch.from_numpy(true)
    assert model.train()(x, p)["loss"] > 1.1 * model.eval()(x, p)["loss"]
    plain, other = model(x, p), model(x, p, augmented(x, model.mean_share, 1.0))
    torch.testing.assert_close(plain, trained(x, p))
    torch.testing.assert_close(plain["stopping_criterion"], (model.proportions(x) - p).abs().mean())
    assert other["stopping_criterion"] > 1.2 * plain["stopping_criterion"]
    parts = [model(x[rows], p[rows]) for rows in (slice(50), slice(50, None))]  # as two processes validate
    for name, value in plain.items():
        torch.testing.assert_close(0.25 * parts[0][name] + 0.75 * parts[1][name], value)


def test_the_adaptive_stage_reconstructs_the_bulk_near_the_first_estimate(network, monkeypatch):
    monkeypatch.setattr(sctape, "ADAPT_STEPS", 40)  # few and large steps
    monkeypatch.setattr(sctape, "ADAPT_LEARNING_RATE", 1e-3)
    checkpoint, model, _, bulk, truth = network
    bulk = bulk * np.exp(np.random.default_rng(3).normal(0, 0.5, N_GENES))
    profiles, before = torch.from_numpy(scale(bulk.to_numpy())), copy.deepcopy(model.state_dict())
    adapted, target = adapt(model, profiles), model.standardised(profiles)
    torch.testing.assert_close(model.state_dict(), before)  # the trained network is not changed
    with torch.no_grad():
        first, second = ((m.decoder(m.proportions(profiles)) - target).abs().mean() for m in (model, adapted))
        change = (adapted.proportions(profiles) - model.proportions(profiles)).abs().mean()
    assert second < 0.8 * first and 0 < change < 0.1
    changed = predict(checkpoint, bulk, "overall")
    np.testing.assert_allclose(changed.proportions, adapted.proportions(profiles).detach(), rtol=1e-5)
    assert np.abs(changed.proportions.to_numpy() - truth).mean() < 0.2
    both, alone = predict(checkpoint, bulk.iloc[:2], "per-sample"), predict(checkpoint, bulk.iloc[[1]], "overall")
    np.testing.assert_allclose(both.proportions.iloc[1], alone.proportions.iloc[0], rtol=1e-4)
    np.testing.assert_allclose(both.signatures[1], alone.signatures[0], rtol=1e-4)
    assert np.abs(both.signatures[0] - both.signatures[1]).max() > 0


@pytest.fixture
def mixtures():
    """20 mixtures of two types: genes 3 and 5 differ between the types, the other 28 do not; the last 5 are held out."""
    rng = np.random.default_rng(0)
    proportions = rng.dirichlet(np.ones(2), 20)
    mean = np.full((2, 30), 500.0)
    mean[:, [3, 5]] = [[2000, 100], [100, 2000]]
    obs = pd.DataFrame({"role": ["fit"] * 15 + ["validation"] * 5}, index=[f"sample_{i}" for i in range(20)])
    return ad.AnnData(rng.poisson(proportions @ mean).astype(np.float32), obs=obs, obsm={"proportions": proportions})


def test_genes_are_selected_by_the_training_mixtures(mixtures):
    usable, blocks = np.ones(30, dtype=bool), partial(train_mixtures, mixtures, None)
    np.testing.assert_array_equal(select_genes(mixtures, blocks, usable, 2), [3, 5])
    usable[3] = False
    assert 5 in select_genes(mixtures, blocks, usable, 2) and 3 not in select_genes(mixtures, blocks, usable, 29)
    with pytest.raises(ValueError, match="1 genes are left to predict the proportions of 2 cell types.*raise N_GENES"):
        select_genes(mixtures, blocks, usable, 1)
    # published: the share of the genes whose TPM vary most
    tpm = mixtures.X[:15, usable] / mixtures.X[:15, usable].sum(axis=1, keepdims=True) * 1e6
    expected = np.sort(np.flatnonzero(usable)[np.argsort(tpm.var(axis=0))[-24:]])  # 0.85 of 29 genes
    np.testing.assert_array_equal(sctape.most_variable_genes(mixtures, blocks, usable, 0.85), expected)
    # profiles and mean shares by NumPy
    genes = np.array([3, 5, 9])
    profiles, share = sctape.read_profiles(mixtures, partial(train_mixtures, mixtures, None), genes)
    rate = mixtures.X[:, genes] / mixtures.X[:, genes].sum(axis=1, keepdims=True)
    np.testing.assert_allclose(profiles, np.log1p(rate * 1e4), rtol=1e-5)
    np.testing.assert_allclose(share, rate[:15].mean(axis=0), rtol=1e-5)  # of the mixtures to train on
