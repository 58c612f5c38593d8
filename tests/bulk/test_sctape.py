"""scTAPE: what it sees, what it predicts, what it refuses."""

import numpy as np
import pandas as pd
import pytest
import torch

from lib.bulk.sctape import ScTAPE, complete, predict, scale


def test_scale_by_hand_and_whatever_the_unit():
    profile = np.array([[1.0, 3.0, 0.0]])
    np.testing.assert_allclose(scale(profile), [[np.log1p(2500), np.log1p(7500), 0]], rtol=1e-6)
    np.testing.assert_allclose(scale(profile * 123), scale(profile), rtol=1e-6)
    with pytest.raises(ValueError, match="1 of 1 bulk samples have no expression"):
        scale(np.zeros((1, 3)))


def test_genes_that_a_bulk_lacks_take_their_mean_share():
    bulk = pd.DataFrame([[6.0, 2.0, 9.0]], columns=["A", "B", "other"])
    values = complete(bulk, ["A", "C", "B"], np.array([0.5, 0.2, 0.3]))
    np.testing.assert_allclose(values, [[6.0, 8.0 * 0.2 / 0.8, 2.0]])


def learned(n_genes: int = 30, n_types: int = 3):
    """A network trained on linear mixtures of three profiles, as a checkpoint, and new mixtures with their truth."""
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
    return learned()


def test_it_reads_proportions(network):
    checkpoint, _, _, bulk, truth = network
    predicted = predict(checkpoint, bulk)
    np.testing.assert_allclose(predicted.sum(axis=1), 1, rtol=1e-5)
    assert np.abs(predicted.to_numpy() - truth).mean() < 0.03
    one = predict(checkpoint, bulk.iloc[[3]])  # a single sample is enough
    np.testing.assert_allclose(one, predicted.iloc[[3]], rtol=1e-4)


def test_order_and_number_of_other_genes_do_not_matter(network):
    checkpoint, _, _, bulk, _ = network
    shuffled = bulk.sample(frac=1, axis=1, random_state=0).assign(other=5e5)
    np.testing.assert_allclose(predict(checkpoint, shuffled), predict(checkpoint, bulk), rtol=1e-4)


def test_missing_genes_are_told_and_too_many_refused(network, capsys):
    checkpoint, _, _, bulk, truth = network
    predicted = predict(checkpoint, bulk.iloc[:, :25])
    assert "83.3% of scTAPE's 30 genes" in capsys.readouterr().out
    assert np.abs(predicted.to_numpy() - truth).mean() < 0.15
    with pytest.raises(ValueError, match=r"33% of the 30 genes .* expected at least 70%.*--bulk-file"):
        predict(checkpoint, bulk.iloc[:, :10])


def test_the_signature_is_that_of_the_pure_types(network):
    _, model, signature, _, _ = network
    decoded = model.signature_matrix().numpy()
    assert decoded.shape == signature.shape
    for k in range(3):
        assert np.corrcoef(decoded[k], scale(signature[[k]])[0])[0, 1] > 0.8


def test_a_profile_without_a_positive_part_is_spread_evenly():
    model = ScTAPE(4, 2, 0.0)
    torch.nn.init.zeros_(model.encoder[-1].weight)
    torch.nn.init.constant_(model.encoder[-1].bias, -1.0)
    torch.testing.assert_close(model.proportions(torch.ones(1, 4)), torch.full((1, 2), 0.5))
