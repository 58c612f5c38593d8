"""Checkpoints: plain, resumable to the bit, and refused by other data."""

import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import STAGES, Workplace, fingerprint, simulated_dataset

from lib.baselines import registry
from lib.data.counts import write_h5ad
from lib.parallel import start
from lib.training import Trainer, clip_gradients, load_checkpoint

STAGE = STAGES[3]
SMALL = {"EPOCHS": 6, "N_LATENT": 4, "HIDDEN": 16, "DEVICE": "cpu"}
NETWORKS = {"sctape": {}, "bulk_encoder": {"N_STATE_SAMPLES": 60, "CELLS_PER_STATE_SAMPLE": 20}}  # of stage 4


def workplace(path, seed: int = 0, unlabelled: float = 0) -> Workplace:
    """A folder with train cells."""
    place = Workplace(path)
    adata = simulated_dataset(n_cells=120, seed=seed)
    adata.obs.loc[np.random.default_rng(0).random(120) < unlabelled, "cell_type"] = None
    adata.uns |= {"dataset": "simulated", "split_id": fingerprint(adata)}
    place.data.mkdir(parents=True)
    write_h5ad(adata, place.data / "train.h5ad")
    return place


def train(place: Workplace, name: str = "gmvae", **constants) -> None:
    """Train a generator of stage 3, or a network of stage 4, in small."""
    if name in registry.CLASSES:
        place.main(STAGE, **SMALL | {"GENERATOR": name} | constants)
    else:
        place.main(STAGES[4], NETWORK=name, DEVICE="cpu", **NETWORKS[name], **constants)


def checkpoint_of(place: Workplace, name: str = "gmvae") -> dict:
    return load_checkpoint(place.models / f"{name}.pt", STAGES[4] if name.removesuffix("_last") in NETWORKS else STAGE)


def history_of(place: Workplace, name: str = "gmvae") -> pd.DataFrame:
    return pd.read_csv(place.models / f"{name}_history.csv").drop(columns="seconds")


def assert_same_training(a: Workplace, b: Workplace, name: str = "gmvae") -> None:
    for file in (name, f"{name}_last"):
        one, two = checkpoint_of(a, file), checkpoint_of(b, file)
        assert same_weights(one, two) and one["best_criterion"] == two["best_criterion"], file
    pd.testing.assert_frame_equal(history_of(a, name), history_of(b, name))


def same_weights(a: dict, b: dict) -> bool:
    a, b = a["weights"], b["weights"]
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> Workplace:
    place = workplace(tmp_path_factory.mktemp("uninterrupted"))
    train(place)
    return place


def test_same_seed_same_model_and_another_seed_another(uninterrupted, tmp_path):
    place, checkpoints = workplace(tmp_path), []
    for seed in (123, 124):
        train(place, SEED=seed)
        checkpoints.append(checkpoint_of(place))
    assert same_weights(checkpoints[0], checkpoint_of(uninterrupted)) and not same_weights(*checkpoints)


def test_the_best_epoch_is_kept_not_the_last(tmp_path):
    place = workplace(tmp_path)
    train(place, EPOCHS=200, LEARNING_RATE=0.1, PATIENCE=6)  # memorises the cells
    history, best = history_of(place), checkpoint_of(place)["epoch"]
    assert best == history.loc[history["held_out_stopping_criterion"].idxmin(), "epoch"] < len(history) < 200
    assert len(history) == best + 6  # patience


def test_a_checkpoint_is_a_plain_dict(uninterrupted):
    best = checkpoint_of(uninterrupted)  # by weights_only=True
    assert best["gene_names"][:2] == ["GENE0", "GENE1"] and best["cell_types"] == ["type 0", "type 1", "type 2"]
    assert best["constants"]["N_LATENT"] == 4 and best["arguments"]["hidden"] == 16
    assert {"optimizer", "scheduler", "rng", "history"} <= checkpoint_of(uninterrupted, "gmvae_last").keys()
    assert list((uninterrupted.models / "tensorboard" / "gmvae").rglob("events*"))


def test_a_checkpoint_of_an_older_version_is_refused_with_its_remedy(uninterrupted, tmp_path):
    torch.save(checkpoint_of(uninterrupted) | {"format": 1}, tmp_path / "gmvae.pt")
    with pytest.raises(
        ValueError, match=r"gmvae.pt is no checkpoint of _3_.* in this version \(.* \(1, .*: train again"
    ):
        load_checkpoint(tmp_path / "gmvae.pt", STAGE)


def test_resuming_with_other_data_or_constants_is_refused(uninterrupted, tmp_path):
    other = workplace(tmp_path / "other", seed=1)
    shutil.copytree(uninterrupted.models, other.models)
    for place, constants, error, message in (
        (other, {}, ValueError, "comes from split .*, expected split"),
        (uninterrupted, {"BATCH_SIZE": 64}, ValueError, "cannot be resumed: BATCH_SIZE was 128, is 64"),
        (workplace(tmp_path / "fresh"), {}, FileNotFoundError, "gmvae_last.pt is missing"),
    ):
        with pytest.raises(error, match=message):
            train(place, RESUME=True, **constants)


def test_resuming_takes_constants_that_change_nothing(uninterrupted, tmp_path):
    place = uninterrupted.copy(tmp_path / "place")
    train(place, RESUME=True, DEVICE="auto", MAX_LIKELIHOOD_CELLS=5, PRIOR="gaussian", EPOCHS=7)
    assert len(history_of(place)) == 7


def test_a_partly_labelled_set_trains(tmp_path):
    place = workplace(tmp_path, unlabelled=0.5)
    train(place)
    for loss in ("train_loss", "held_out_kl_y"):  # the types of cells that have no part in the training
        assert history_of(place)[loss].iloc[-1] < history_of(place)[loss].iloc[0]


def test_a_loss_that_is_not_finite_stops_the_training_and_says_why(tmp_path):
    with pytest.raises(ValueError, match="expected finite numbers.*lower LEARNING_RATE"):
        train(workplace(tmp_path), LEARNING_RATE=1e12, MAX_GRADIENT_NORM=1e12)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match="sees no GPU"):
        start("cuda")


def test_gradients_are_clipped_to_their_common_norm():
    layer = torch.nn.Linear(3, 2)
    for limit, expected in ((100.0, 13.0), (6.5, 6.5)):
        layer.weight.grad = torch.tensor([[3.0, 0, 0], [0, 4.0, 0]])
        layer.bias.grad = torch.tensor([12.0, 0])  # norm of both: 13
        clip_gradients(layer, limit)
        norm = torch.cat([layer.weight.grad.ravel(), layer.bias.grad]).norm().item()
        assert norm == pytest.approx(expected, rel=1e-4)
        assert layer.weight.grad[1, 1] / layer.weight.grad[0, 0] == pytest.approx(4 / 3)


# --- interrupted in the middle of an epoch, and continued


FOUR_EPOCHS = {"EPOCHS": 4, "BATCH_SIZE": 30}


@pytest.fixture(scope="module")
def mixtures(tmp_path_factory) -> Workplace:
    """Train cells, mixtures of them, and a GMVAE of which a bulk encoder can learn."""
    place = workplace(tmp_path_factory.mktemp("mixtures"))
    shutil.copy(place.data / "train.h5ad", place.data / "test.h5ad")
    place.main(STAGES[2], N_TRAIN_SAMPLES=80, CELLS_PER_SAMPLE=30, N_TEST_DIRICHLET=2)
    train(place, **FOUR_EPOCHS)
    return place


TRAININGS = [(name, after) for name in (*registry.CLASSES, *NETWORKS) for after in (1, 2, 3)]
FAST = ("gmvae", 2)


@pytest.mark.parametrize(
    ("name", "after"), [FAST, *(pytest.param(*one, marks=pytest.mark.slow) for one in TRAININGS if one != FAST)]
)
def test_a_training_that_is_interrupted_and_resumed_equals_one_that_is_not(
    mixtures, tmp_path, monkeypatch, name, after
):
    """Interrupted during the epoch after `after`, when the weights have changed since the last finished one."""
    whole, interrupted = (mixtures.copy(tmp_path / name) for name in ("whole", "interrupted"))
    train(whole, name, **FOUR_EPOCHS)
    real = Trainer._record

    def record(self, *arguments):
        if len(self.history) == after:
            raise KeyboardInterrupt
        return real(self, *arguments)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Trainer, "_record", record)
        train(interrupted, name, **FOUR_EPOCHS)
    torch.manual_seed(99)  # other random numbers in between must not matter
    train(interrupted, name, RESUME=True, **FOUR_EPOCHS)
    assert_same_training(whole, interrupted, name)
    assert len(history_of(whole, name)) == 4


def test_another_length_of_a_learning_rate_cycle_is_refused(mixtures, tmp_path):
    place = mixtures.copy(tmp_path / "place")
    train(place, "pca_cvae", EPOCHS=2)
    with pytest.raises(ValueError, match="the number of epochs, on which the learning rate depends, was 2, is 4"):
        train(place, "pca_cvae", RESUME=True, EPOCHS=4)
