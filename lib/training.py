"""What all trainings share: epochs, early stopping, when checkpoints are written (`lib.checkpoints`), and the history."""

import contextlib
import copy
import ctypes
import datetime
import math
import platform
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from lib import parallel, runs
from lib.checkpoints import CHECKPOINT_FORMAT, load_checkpoint, load_resumable, write_checkpoint
from lib.files import reading, replacing, writing

SAVE_EVERY_S = 60


def keep_freed_memory() -> None:
    """Keep freed memory in this process instead of returning it to the system (Linux with glibc; elsewhere this does nothing).

    Each training step allocates and frees the same tens of megabytes. Returned pages must be cleared by the system before they
    are used again, which takes a third of a step on two cores. Pieces above 32 MB, such as cells read from disk, are still
    returned, because they would fragment the memory.
    """
    if sys.platform == "linux" and platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
        libc.mallopt(M_MMAP_THRESHOLD, 32 * 2**20)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def clip_gradients(model: torch.nn.Module, max_norm: float) -> None:
    """Scale all gradients so that their common norm is at most `max_norm`.

    On a CPU the norm is checked first, which saves a pass; on a GPU the check would wait for the device.
    """
    parameters = [p for p in model.parameters() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    if norm.device.type == "cuda" or not norm <= max_norm:
        torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)


def tensor_epoch(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, data: tuple[torch.Tensor, ...], batch_size: int, max_gradient_norm: float,
    generator: torch.Generator,
) -> dict[str, float]:  # fmt: skip
    """One epoch over the rows of tensors in random order, each batch divided among the processes. Returns the mean losses per row."""
    device = data[0].device
    order = torch.randperm(len(data[0]), generator=generator).to(device)
    parts = []
    for batch in order.tensor_split(max(1, round(len(order) / batch_size))):
        rows = batch[parallel.RANK :: parallel.N_RANKS]
        optimizer.zero_grad()
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda"):
            losses = model(*(part[rows] for part in data))
        (losses["loss"] * (len(rows) / len(batch) * parallel.N_RANKS)).backward()
        clip_gradients(model, max_gradient_norm)
        optimizer.step()
        parts.append((len(rows), {name: value.detach() for name, value in losses.items()}))
    return parallel.mean_over(parts)


class Trainer:
    """Runs the epochs of one model. With several processes, only the first one writes.

    Parameters
    ----------
    name
        Name of the files in `models_dir`: `<name>.pt`, `<name>_last.pt`, `<name>_history.csv`.
    model, optimizer, generator
        State that an epoch changes: weights, state of the optimizer, random generator of batches and epsilon.
    about
        Description kept in the checkpoint: stage, model arguments, constants, gene names, cell types, split.
    patience
        Training stops after so many epochs without a better held-out loss; after a third of them the learning rate is multiplied by 0.3.
        None: neither; all epochs are trained, and the last one is used.
    keep_every
        After so many epochs the weights are also written to `<name>_epoch<number>.pt`, which stays; None: never.
    """

    def __init__(
        self, name: str, model: torch.nn.Module, optimizer: torch.optim.Optimizer, generator: torch.Generator,
        about: dict[str, Any], models_dir: Path, patience: int | None, keep_every: int | None = None,
    ):  # fmt: skip
        self.name, self.model, self.optimizer, self.generator = name, model, optimizer, generator
        self.about, self.models_dir, self.patience, self.keep_every = about, models_dir, patience, keep_every
        self.scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(
            optimizer, factor=0.3, patience=max(1, (patience or 0) // 3)
        )
        self.history: list[dict[str, float]] = []
        self.finished: tuple[dict[str, Any], dict[str, Any]] | None = None  # `_state` after the last finished epoch
        self.best_epoch, self.best_criterion = 0, float("inf")
        self.best_weights: dict[str, Any] = model.state_dict()
        self.best_path, self.last_path = models_dir / f"{name}.pt", models_dir / f"{name}_last.pt"
        self.history_path = models_dir / f"{name}_history.csv"

    def resume(self) -> None:
        """Continue from `<name>_last.pt`.

        Raises
        ------
        ValueError
            If it was trained on other data or with other constants.
        """
        last = load_resumable(self.last_path, self.about, self.device_type)
        with reading(self.last_path, "a checkpoint of this model"):
            self.model.load_state_dict(last["weights"])
            self.optimizer.load_state_dict(last["optimizer"])
        patience = self.scheduler.patience  # may differ from that of the interrupted run
        self.scheduler.load_state_dict(last["scheduler"])
        self.scheduler.patience = patience
        self.history, self.best_epoch, self.best_criterion = last["history"], last["best_epoch"], last["best_criterion"]
        self.best_weights = load_checkpoint(self.best_path, self.about["stage"])["weights"]
        self.generator.set_state(last["rng"]["generator"])
        if parallel.IS_FIRST:
            torch.set_rng_state(last["rng"]["torch"])
            if self.device_type == "cuda":
                torch.cuda.set_rng_state(last["rng"]["cuda"])
        else:  # dropout of its own
            torch.manual_seed(torch.initial_seed() + len(self.history))
        print(f"resumed {self.name} after epoch {len(self.history)}")

    def fit(
        self,
        epochs: int,
        train_epoch: Callable[[int], dict[str, float]],
        validate: Callable[[], dict[str, float]] | None,
    ) -> None:
        """Train until `epochs` are done or `patience` is exhausted.

        Parameters
        ----------
        train_epoch
            Takes the number of the epoch (from 0), trains on all data once and returns means over the epoch, including `loss`.
        validate
            Returns the same means over held-out data, and `stopping_criterion`, which selects the best epoch (lowest). None
            without held-out data, which needs `patience` None.
        """
        events = self.models_dir / "tensorboard" / self.name / f"{datetime.datetime.now():%Y%m%d-%H%M%S}"
        with _event_writer(events) as writer:
            try:
                self._run_epochs(epochs, train_epoch, validate, writer)
            except BaseException:  # such as a signal, or a loss that is not finite
                self._save_finished_epochs()
                raise
        self.save()
        why = "no improvement" if self.out_of_patience else "all epochs done"
        best = f"best on held-out data: {self.best_criterion:.5g} after epoch {self.best_epoch}"
        used = best if self.patience is not None else "the last one is used"
        print(f"{self.name}: {len(self.history)} epochs ({why}), {self.seconds:.0f} s; {used}")
        self.model.load_state_dict(self.best_weights)

    def _run_epochs(
        self, epochs: int, train_epoch: Callable[[int], dict[str, float]],
        validate: Callable[[], dict[str, float]] | None, writer: SummaryWriter | None,
    ) -> None:  # fmt: skip
        saved_at = time.monotonic()
        with tqdm(
            total=epochs, initial=len(self.history), desc=self.name, unit="epoch", disable=not parallel.IS_FIRST
        ) as progress:
            while len(self.history) < epochs and not self.out_of_patience:
                started = time.monotonic()
                self.model.train()
                train = train_epoch(len(self.history))
                self.model.eval()
                with torch.no_grad():
                    held_out = {} if validate is None else validate()
                self._record(train, held_out, time.monotonic() - started, writer)
                progress.update()
                losses = {
                    name: f"{part['loss']:.4g}" for name, part in (("train", train), ("held_out", held_out)) if part
                }
                progress.set_postfix(**losses, best_epoch=self.best_epoch)
                if self.keep_every and len(self.history) % self.keep_every == 0 and parallel.IS_FIRST:
                    self._write_best(self.models_dir / f"{self.name}_epoch{len(self.history)}.pt")
                if len(self.history) == 1 or time.monotonic() - saved_at > SAVE_EVERY_S:
                    self.save()
                    saved_at = time.monotonic()

    def _save_finished_epochs(self) -> None:
        """Write the checkpoints after the last finished epoch of an interrupted training, and say how to continue."""
        if self.finished is None or not parallel.IS_FIRST:
            return
        self.save()
        n = self.finished[0]["epoch"]
        print(
            f"{self.name}: {n} finished epoch{'s' * (n > 1)} saved in {self.last_path}; continue with RESUME (--resume)"
        )

    @property
    def device_type(self) -> str:
        return next(self.model.parameters()).device.type

    @property
    def out_of_patience(self) -> bool:
        return self.patience is not None and len(self.history) - self.best_epoch >= self.patience

    @property
    def seconds(self) -> float:
        return sum(row["seconds"] for row in self.history)

    def _record(
        self, train: dict[str, float], held_out: dict[str, float], seconds: float, writer: SummaryWriter | None
    ) -> None:
        epoch = len(self.history) + 1
        losses = {
            f"{where} {name}": value
            for where, part in (("training", train), ("held-out", held_out))
            for name, value in part.items()
        }
        bad = [name for name, value in losses.items() if not math.isfinite(value)]
        if bad:
            raise ValueError(
                f"{self.name}: not finite in epoch {epoch}: {', '.join(bad)}; expected finite numbers. The likely cause is a step that was "
                f"too large: lower LEARNING_RATE (now {self.optimizer.param_groups[0]['lr']:g})"
            )
        row = {"epoch": epoch, "seconds": seconds, "learning_rate": self.optimizer.param_groups[0]["lr"]}
        row |= {f"train_{k}": v for k, v in train.items()} | {f"held_out_{k}": v for k, v in held_out.items()}
        self.history.append(row)
        if self.patience is None:
            self.best_epoch, self.best_criterion, self.best_weights = epoch, train["loss"], self.model.state_dict()
        else:
            criterion = held_out["stopping_criterion"]
            self.scheduler.step(criterion)
            if criterion < self.best_criterion:
                self.best_epoch, self.best_criterion = epoch, criterion
                self.best_weights = copy.deepcopy(self.model.state_dict())
        if parallel.IS_FIRST:
            self.finished = self._state()
        if writer is not None:
            with writing(self.models_dir / "tensorboard"):
                for key, value in row.items():
                    writer.add_scalar(key.replace("train_", "train/").replace("held_out_", "held_out/"), value, epoch)

    def _state(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Copies of what is needed to continue with the next epoch as if training had not stopped, and of the best weights."""
        weights = copy.deepcopy(self.model.state_dict())
        state = {
            "epoch": len(self.history),
            "best_epoch": self.best_epoch,
            "best_criterion": self.best_criterion,
            "device": self.device_type,
            "weights": weights,
            "optimizer": copy.deepcopy(self.optimizer.state_dict()),
            "scheduler": copy.deepcopy(self.scheduler.state_dict()),
            "history": list(self.history),
            "rng": {
                "generator": self.generator.get_state(),
                "torch": torch.get_rng_state(),
                "cuda": torch.cuda.get_rng_state() if self.device_type == "cuda" else None,
            },
        }
        return state, weights if self.patience is None else self.best_weights

    def save(self) -> None:
        """Write both checkpoints and the history. The best one first: if the run is killed in between, resuming repeats it."""
        if not parallel.IS_FIRST:
            return
        state, best_weights = self.finished or self._state()
        about = self.about | _about_best(state["best_epoch"], state["best_criterion"])
        write_checkpoint(about | {"weights": best_weights}, self.best_path)
        write_checkpoint(about | state, self.last_path)
        with replacing(self.history_path) as temporary:
            pd.DataFrame(state["history"]).to_csv(temporary, index=False)

    def save_best(self, **more: Any) -> None:
        """Write the checkpoint to use; `more` is stored beside the weights."""
        if parallel.IS_FIRST:
            self._write_best(self.best_path, **more)

    def _write_best(self, path: Path, **more: Any) -> None:
        about = self.about | _about_best(self.best_epoch, self.best_criterion)
        write_checkpoint(about | {"weights": self.best_weights} | more, path)

    def history_table(self) -> pd.DataFrame:
        """One row per epoch: losses of training and held-out data, learning rate, seconds."""
        return pd.DataFrame(self.history)


def _about_best(epoch: int, criterion: float) -> dict[str, Any]:
    """What both checkpoints say about the run and its best epoch."""
    return {
        "format": CHECKPOINT_FORMAT,
        "made_by": runs.description(),
        "epoch": epoch,
        "best_epoch": epoch,
        "best_criterion": criterion,
    }


@contextlib.contextmanager
def _event_writer(folder: Path) -> Iterator[SummaryWriter | None]:
    """TensorBoard's event file in this folder, closed at the end in any case; None for all processes but the first."""
    if not parallel.IS_FIRST:
        yield None
        return
    with writing(folder):
        writer = SummaryWriter(folder)
    try:
        yield writer
    except BaseException:
        with contextlib.suppress(Exception):
            writer.close()
        raise
    with writing(folder):
        writer.close()
