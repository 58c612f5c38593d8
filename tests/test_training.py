"""Checkpoints: plain, resumable to the bit, and refused by other data."""

import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import Workplace, simulated_dataset

from lib.baselines import registry
from lib.data.counts import fingerprint, write_h5ad
from lib.parallel import start
from lib.training import Trainer, clip_gradients, load_checkpoint

STAGE = "_3_train_gmvae.py"
SMALL = {"EPOCHS": 6, "N_LATENT": 4, "HIDDEN": 16, "DEVICE": "cpu"}


def workplace(path, seed: int = 0) -> Workplace:
    place = Workplace(path)
    adata = simulated_dataset(n_cells=120, seed=seed)
    adata.uns |= {"dataset": "simulated", "split_id": fingerprint(adata)}
    place.data.mkdir(parents=True)
    write_h5ad(adata, place.data / "train.h5ad")
    return place


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> Workplace:
    place = workplace(tmp_path_factory.mktemp("uninterrupted"))
    place.main(STAGE, **SMALL)
    return place


def same_weights(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_resuming_equals_not_having_stopped(uninterrupted, tmp_path):
    place = workplace(tmp_path)
    place.main(STAGE, **SMALL | {"EPOCHS": 3})
    torch.manual_seed(99)  # other random numbers in between must not matter
    place.main(STAGE, **SMALL | {"RESUME": True})
    for name in ("gmvae.pt", "gmvae_last.pt"):
        whole, resumed = (load_checkpoint(p.models / name, STAGE) for p in (uninterrupted, place))
        assert same_weights(whole["weights"], resumed["weights"]), name
        assert whole["best_criterion"] == resumed["best_criterion"]
    histories = [pd.read_csv(p.models / "gmvae_history.csv").drop(columns="seconds") for p in (uninterrupted, place)]
    pd.testing.assert_frame_equal(*histories)
    assert len(histories[0]) == 6


def test_same_seed_same_model_and_another_seed_another(uninterrupted, tmp_path):
    place = workplace(tmp_path)
    weights = []
    for seed in (123, 124):
        place.main(STAGE, **SMALL | {"SEED": seed})
        weights.append(load_checkpoint(place.models / "gmvae.pt", STAGE)["weights"])
    assert same_weights(weights[0], load_checkpoint(uninterrupted.models / "gmvae.pt", STAGE)["weights"])
    assert not same_weights(*weights)


def test_the_best_epoch_is_kept_not_the_last(tmp_path):
    place = workplace(tmp_path)
    place.main(STAGE, **SMALL | {"EPOCHS": 200, "LEARNING_RATE": 0.1, "PATIENCE": 6})  # memorises the cells
    history = pd.read_csv(place.models / "gmvae_history.csv")
    best = load_checkpoint(place.models / "gmvae.pt", STAGE)
    assert best["epoch"] == history.loc[history["held_out_stopping_criterion"].idxmin(), "epoch"] < len(history) < 200
    assert len(history) == best["epoch"] + 6  # patience


def test_a_checkpoint_is_a_plain_dict(uninterrupted):
    best = load_checkpoint(uninterrupted.models / "gmvae.pt", STAGE)
    assert best["gene_names"][:2] == ["GENE0", "GENE1"] and best["cell_types"] == ["type 0", "type 1", "type 2"]
    assert best["constants"]["N_LATENT"] == 4 and best["arguments"]["hidden"] == 16
    assert {"optimizer", "scheduler", "rng", "history"} <= load_checkpoint(
        uninterrupted.models / "gmvae_last.pt", STAGE
    ).keys()
    assert list((uninterrupted.models / "tensorboard" / "gmvae").rglob("events*"))


def test_a_checkpoint_of_an_older_version_is_refused_with_its_remedy(uninterrupted, tmp_path):
    checkpoint = torch.load(uninterrupted.models / "gmvae.pt", weights_only=True) | {"format": 1}
    torch.save(checkpoint, tmp_path / "gmvae.pt")
    with pytest.raises(
        ValueError, match=r"gmvae.pt is no checkpoint of _3_train_gmvae.py in this version .*train again with _3_"
    ):
        load_checkpoint(tmp_path / "gmvae.pt", STAGE)


def test_an_option_given_by_the_user_wins_over_the_papers_preset(tmp_path):
    place = workplace(tmp_path)
    place.main(STAGE, PRESET="paper", EPOCHS=2, DEVICE="cpu")
    last = load_checkpoint(place.models / "paper_gmvae_last.pt", STAGE)
    assert len(last["history"]) == 2 and last["constants"]["BATCH_SIZE"] == 37
    assert last["settings"]["learning_rate"] == 6e-6 and last["settings"]["patience"] is None
    assert not any(name.startswith("held_out") for name in last["history"][0])  # all cells are trained on


def test_resuming_with_other_data_or_constants_is_refused(uninterrupted, tmp_path):
    other = workplace(tmp_path / "other", seed=1)
    shutil.copytree(uninterrupted.models, other.models)
    with pytest.raises(ValueError, match="comes from split .*, expected split"):
        other.main(STAGE, **SMALL | {"RESUME": True})
    with pytest.raises(ValueError, match="cannot be resumed: BATCH_SIZE was 128, is 64"):
        uninterrupted.main(STAGE, **SMALL | {"RESUME": True, "BATCH_SIZE": 64})
    with pytest.raises(FileNotFoundError, match="gmvae_last.pt is missing"):
        workplace(tmp_path / "fresh").main(STAGE, **SMALL | {"RESUME": True})


def test_resuming_takes_constants_that_change_nothing(uninterrupted, tmp_path):
    place = Workplace(tmp_path / "place")
    shutil.copytree(uninterrupted.path, place.path)
    harmless = {"DEVICE": "auto", "MAX_LIKELIHOOD_CELLS": 5, "PRIOR": "gaussian", "EPOCHS": 7}
    place.main(STAGE, **SMALL | {"RESUME": True} | harmless)
    assert len(pd.read_csv(place.models / "gmvae_history.csv")) == 7


def test_a_partly_labelled_set_trains(tmp_path):
    place = Workplace(tmp_path)
    adata = simulated_dataset(n_cells=150)
    adata.obs.loc[np.random.default_rng(0).random(150) < 0.5, "cell_type"] = None
    adata.uns |= {"dataset": "simulated", "split_id": "x"}
    place.data.mkdir()
    write_h5ad(adata, place.data / "train.h5ad")
    place.main(STAGE, **SMALL)
    history = pd.read_csv(place.models / "gmvae_history.csv")
    for loss in ("train_loss", "held_out_kl_y"):  # the types of cells that have no part in the training
        assert history[loss].iloc[-1] < history[loss].iloc[0]


def test_a_loss_that_is_not_finite_stops_the_training_and_says_why(tmp_path):
    with pytest.raises(ValueError, match="expected finite numbers.*lower LEARNING_RATE"):
        workplace(tmp_path).main(STAGE, **SMALL | {"LEARNING_RATE": 1e12, "MAX_GRADIENT_NORM": 1e12})


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match="sees no GPU"):
        start("cuda")


def test_gradients_are_clipped_to_their_common_norm():
    layer = torch.nn.Linear(3, 2)
    for limit, expected in ((100.0, 13.0), (6.5, 6.5)):
        layer.weight.grad, layer.bias.grad = (
            torch.tensor([[3.0, 0, 0], [0, 4.0, 0]]),
            torch.tensor([12.0, 0]),
        )  # norm 13
        clip_gradients(layer, limit)
        norm = torch.cat([layer.weight.grad.ravel(), layer.bias.grad]).norm().item()
        assert norm == pytest.approx(expected, rel=1e-4)
        assert layer.weight.grad[1, 1] / layer.weight.grad[0, 0] == pytest.approx(4 / 3)


# --- interrupted in the middle of an epoch, and continued


FEW_EPOCHS = SMALL | {"EPOCHS": 4, "BATCH_SIZE": 30}
NETWORKS = {"sctape": {}, "bulk_encoder": {"N_STATE_SAMPLES": 60, "CELLS_PER_STATE_SAMPLE": 20}}


def train(place: Workplace, name: str, **constants) -> None:
    """Train a generator of stage 3 or a network of stage 4 for four epochs."""
    if name in NETWORKS:
        settings = {"NETWORK": name, "EPOCHS": 4, "BATCH_SIZE": 20, "DEVICE": "cpu"} | NETWORKS[name]
        place.main("_4_train_sctape.py", **settings | constants)
    else:
        place.main(STAGE, **FEW_EPOCHS | {"GENERATOR": name} | constants)


@pytest.fixture(scope="module")
def mixtures(tmp_path_factory) -> Workplace:
    """Train cells, mixtures of them, and a GMVAE of which a bulk encoder can learn."""
    place = workplace(tmp_path_factory.mktemp("mixtures"))
    shutil.copy(place.data / "train.h5ad", place.data / "test.h5ad")
    place.main("_2_make_pseudobulk.py", N_TRAIN_SAMPLES=80, CELLS_PER_SAMPLE=30, N_TEST_DIRICHLET=2)
    place.main(STAGE, **FEW_EPOCHS)
    return place


def check_resumed(mixtures: Workplace, path, name: str, after: int, monkeypatch) -> None:
    """A training that is interrupted during the epoch after `after` and resumed gives the weights of an uninterrupted one."""
    places = [Workplace(path / kind) for kind in ("whole", "interrupted")]
    for place in places:
        shutil.copytree(mixtures.path, place.path)
    whole, interrupted = places
    train(whole, name)

    real = Trainer._record

    def record(self, *arguments):
        if len(self.history) == after:  # the weights have changed since the last finished epoch
            raise KeyboardInterrupt
        return real(self, *arguments)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Trainer, "_record", record)
        train(interrupted, name)
    torch.manual_seed(99)
    train(interrupted, name, RESUME=True)
    stage = STAGE if name not in NETWORKS else "_4_train_sctape.py"
    for file in (f"{name}.pt", f"{name}_last.pt"):
        checkpoints = [load_checkpoint(place.models / file, stage) for place in places]
        assert same_weights(*(checkpoint["weights"] for checkpoint in checkpoints)), file
        assert checkpoints[0]["best_epoch"] == checkpoints[1]["best_epoch"]
    histories = [pd.read_csv(place.models / f"{name}_history.csv").drop(columns="seconds") for place in places]
    pd.testing.assert_frame_equal(*histories)
    assert len(histories[0]) == 4


def test_a_gmvae_that_is_interrupted_is_resumed_to_the_bit(mixtures, tmp_path, monkeypatch):
    check_resumed(mixtures, tmp_path, "gmvae", 2, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("after", [1, 2, 3])
@pytest.mark.parametrize("name", [*registry.CLASSES, *NETWORKS])
def test_any_training_that_is_interrupted_is_resumed_to_the_bit(mixtures, tmp_path, monkeypatch, name, after):
    check_resumed(mixtures, tmp_path, name, after, monkeypatch)


def test_another_length_of_a_learning_rate_cycle_is_refused(mixtures, tmp_path):
    place = Workplace(tmp_path / "place")
    shutil.copytree(mixtures.path, place.path)
    train(place, "pca_cvae", EPOCHS=2)
    with pytest.raises(ValueError, match="the number of epochs, on which the learning rate depends, was 2, is 4"):
        train(place, "pca_cvae", RESUME=True)
