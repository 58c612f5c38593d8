"""How every model is trained: batches, epochs, early stopping, checkpoints, and how a training is resumed.

A checkpoint is a plain dict of tensors and builtins that loads with `weights_only=True`. `<name>.pt` holds the weights with the
best held-out loss (without early stopping, those of the last epoch), to use. `<name>_last.pt` also holds the state of the optimizer
and of the random generators, so that a resumed training gives the same result as an uninterrupted one.
"""

import ctypes
import datetime
import io
import math
import platform
import re
import sys
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import torch
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from lib import parallel, run
from lib.run import check_same_names, check_same_split, reading, replacing, require

CHECKPOINT_FORMAT = 7  # raised when checkpoints of older versions cannot be used any more
SAVE_EVERY_S = 60
# Constants that may change when a training is resumed: the others would make another model
FREE_TO_CHANGE = frozenset(
    "EPOCHS PATIENCE KEEP_EVERY RESUME DEVICE DATA_DIR MODELS_DIR FIG_DIR PRIOR CONDITION MIN_CONDITION_CELLS "
    "MAX_LIKELIHOOD_CELLS MIN_GENE_COVERAGE".split()
)


class Minibatch(NamedTuple):
    """What one step of a training uses."""

    inputs: tuple[Any, ...]  # arguments of the model's forward
    n_rows: int  # cells or mixtures of this process
    n_global: int  # of all processes


def cell_batches(
    dataset: Any, model: Any, batch_size: int, generator: torch.Generator, balanced: bool = False, extra: tuple = ()
) -> Iterator[Minibatch]:
    """Batches of cells in random order (`CellDataset.shuffled`), each with standard normal epsilon, (n_cells, *model.epsilon_shape).

    Epsilon is sampled for the cells of all processes, so that any number of processes trains the same model.
    """
    shape = getattr(model, "epsilon_shape", None) or (model.n_latent,)
    for batch in dataset.shuffled(batch_size, generator, parallel.RANK, parallel.N_RANKS, balanced):
        epsilon = torch.randn(batch.n_global, *shape, generator=generator, device=generator.device)
        epsilon = epsilon[parallel.RANK :: parallel.N_RANKS]
        yield Minibatch((batch, epsilon, *extra), batch.n_cells, batch.n_global)


def held_out_batches(dataset: Any, model: Any, batch_size: int, seed: int) -> Callable[[], Iterable[Minibatch]]:
    """`held_out` of `Trainer.fit`: batches of cells, in the same order and with the same epsilon in every epoch."""
    return lambda: cell_batches(dataset, model, batch_size, torch.Generator(dataset.device).manual_seed(seed))


def tensor_batches(data: tuple[torch.Tensor, ...], batch_size: int, generator: torch.Generator) -> Iterator[Minibatch]:
    """Rows of tensors in random order, each batch divided among the processes."""
    order = torch.randperm(len(data[0]), generator=generator).to(data[0].device)
    for batch in order.tensor_split(max(1, round(len(order) / batch_size))):
        rows = batch[parallel.RANK :: parallel.N_RANKS]
        yield Minibatch(tuple(part[rows] for part in data), len(rows), len(batch))


class Trainer:
    """Trains one model and writes `<name>.pt`, `<name>_last.pt` and `<name>_history.csv` to `folder` (the first process alone).

    The model's forward returns mean losses per row: `loss`, which is minimised, and, where early stopping uses another one,
    `stopping_criterion`. A model whose `mixed_precision` is true is trained in bfloat16 on a GPU. `generator` is that of batches and
    epsilon; `about` is kept in the checkpoints: stage, constants, model arguments, gene names, cell types, split.
    """

    def __init__(
        self, name: str, model: torch.nn.Module, optimizer: torch.optim.Optimizer, generator: torch.Generator,
        about: dict[str, Any], folder: Path,
    ):  # fmt: skip
        self.name, self.model, self.optimizer, self.generator, self.about = name, model, optimizer, generator, about
        self.folder, self.best_path, self.last_path = folder, folder / f"{name}.pt", folder / f"{name}_last.pt"
        self.history_path = folder / f"{name}_history.csv"
        self.history: list[dict[str, float]] = []
        self.best_epoch, self.best_criterion = 0, math.inf
        self.best_weights: dict[str, Any] = {}
        self.scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.3)
        self.patience: int | None = None

    @property
    def device_type(self) -> str:
        return next(self.model.parameters()).device.type

    def fit(
        self, epochs: int, batches: Callable[[int], Iterable[Minibatch]], held_out: Callable[[], Iterable[Minibatch]] | None,
        patience: int | None, max_gradient_norm: float = math.inf, keep_every: int | None = None,
    ) -> None:  # fmt: skip
        """Train until `epochs` are done or `patience` is exhausted; the model ends with the weights that are used.

        batches: of the number of the epoch (from 0), all training data once. held_out: batches of held-out data, the same in every
        epoch; None without early stopping. patience: epochs without a better held-out loss before training stops; after a third of
        them the learning rate is multiplied by 0.3; None: neither, and the last weights are used. Gradients above `max_gradient_norm`
        are scaled to it. After every `keep_every` epochs the weights are also written to `<name>_epoch<number>.pt`, which stays.
        """
        self.patience, self.scheduler.patience = patience, max(1, (patience or 0) // 3)
        shared, saved_at = parallel.shared(self.model), time.monotonic()
        events = self.folder / "tensorboard" / self.name / f"{datetime.datetime.now():%Y%m%d-%H%M%S}"
        writer = SummaryWriter(events) if parallel.IS_FIRST else None
        done, is_silent = len(self.history), not parallel.IS_FIRST
        try:
            with tqdm(total=epochs, initial=done, desc=self.name, unit="epoch", disable=is_silent) as progress:
                while len(self.history) < epochs and not self.out_of_patience:
                    started = time.monotonic()
                    train = self._train_epoch(shared, batches(len(self.history)), max_gradient_norm)
                    validation = {} if held_out is None else self._validate(held_out())
                    row = self._record(train, validation, time.monotonic() - started)
                    if writer is not None:
                        for key, value in row.items():
                            writer.add_scalar(re.sub("^(train|held_out)_", r"\1/", key), value, len(self.history))
                    progress.update()
                    progress.set_postfix(loss=f"{(validation or train)['loss']:.4g}", best_epoch=self.best_epoch)
                    if keep_every and len(self.history) % keep_every == 0:
                        path = self.folder / f"{self.name}_epoch{len(self.history)}.pt"
                        self._write(path, weights=self.model.state_dict())
                    if len(self.history) == 1 or time.monotonic() - saved_at > SAVE_EVERY_S:
                        self.save()
                        saved_at = time.monotonic()
        except BaseException:  # such as a signal, or a loss that is not finite
            if self.history:
                print(f"{self.name}: ended in epoch {len(self.history) + 1}; continue with RESUME (--resume)")
            raise
        finally:
            if writer is not None:
                writer.close()
        self.model.eval()
        self.save()
        if patience is not None:
            self.model.load_state_dict(self.best_weights)
        why = "no improvement" if self.out_of_patience else "all epochs done"
        used = "best on held-out data" if patience is not None else "last one"
        seconds = self.history_table()["seconds"].sum()
        print(
            f"{self.name}: {len(self.history)} epochs ({why}), {seconds:.0f} s; epoch {self.best_epoch} is used ({used})"
        )

    def _train_epoch(
        self, shared: torch.nn.Module, batches: Iterable[Minibatch], max_gradient_norm: float
    ) -> dict[str, float]:
        """One epoch; mean losses per row. shared: the model, with gradients averaged over the processes."""
        self.model.train()
        device, parts = self.device_type, []
        is_mixed = device == "cuda" and getattr(self.model, "mixed_precision", False)
        for inputs, n_rows, n_global in batches:
            self.optimizer.zero_grad()
            with torch.autocast(device, dtype=torch.bfloat16, enabled=is_mixed):
                losses = shared(*inputs)
            # processes average their gradients; this weight makes every row count equally
            (losses["loss"] * (n_rows / n_global * parallel.N_RANKS)).backward()
            clip_gradients(self.model, max_gradient_norm)
            self.optimizer.step()
            parts.append((n_rows, {name: value.detach() for name, value in losses.items()}))
        return parallel.mean_over(parts)

    @torch.no_grad()
    def _validate(self, batches: Iterable[Minibatch]) -> dict[str, float]:
        """Mean losses per row of held-out data, over all processes."""
        self.model.eval()
        return parallel.mean_over([(n_rows, self.model(*inputs)) for inputs, n_rows, _ in batches])

    def _record(self, train: dict[str, float], held_out: dict[str, float], seconds: float) -> dict[str, float]:
        """Add an epoch to the history; keep its weights if they are the best ones."""
        learning_rate = self.optimizer.param_groups[0]["lr"]
        row = {"epoch": len(self.history) + 1, "seconds": seconds, "learning_rate": learning_rate}
        row |= {f"train_{k}": v for k, v in train.items()} | {f"held_out_{k}": v for k, v in held_out.items()}
        bad = [name for name, value in row.items() if not math.isfinite(value)]
        if bad:
            raise ValueError(
                f"{self.name}: not finite in epoch {row['epoch']}: {', '.join(bad)}; expected finite numbers. The likely cause is a "
                f"step that was too large: lower LEARNING_RATE (now {learning_rate:g})"
            )
        self.history.append(row)
        if self.patience is None:
            self.best_epoch, self.best_criterion = len(self.history), train["loss"]
            return row
        criterion = held_out.get("stopping_criterion", held_out["loss"])
        self.scheduler.step(criterion)
        if criterion < self.best_criterion:
            self.best_epoch, self.best_criterion = len(self.history), criterion
            self.best_weights = {name: value.detach().cpu().clone() for name, value in self.model.state_dict().items()}
        return row

    @property
    def out_of_patience(self) -> bool:
        return self.patience is not None and len(self.history) - self.best_epoch >= self.patience

    def history_table(self) -> pd.DataFrame:
        """One row per epoch: losses of training and held-out data, learning rate, seconds."""
        return pd.DataFrame(self.history)

    def save(self) -> None:
        """Write both checkpoints and the history. The best one first: if the run is killed in between, resuming repeats it."""
        self.save_best()
        self._write(
            self.last_path, epoch=len(self.history), weights=self.model.state_dict(), optimizer=self.optimizer.state_dict(),
            scheduler=self.scheduler.state_dict(), history=self.history, device=self.device_type,
            rng={
                "generator": self.generator.get_state(), "torch": torch.get_rng_state(),
                "cuda": torch.cuda.get_rng_state() if self.device_type == "cuda" else None,
            },
        )  # fmt: skip
        if parallel.IS_FIRST:
            with replacing(self.history_path) as temporary:
                self.history_table().to_csv(temporary, index=False)

    def save_best(self, **more: Any) -> None:
        """Write the checkpoint to use; `more` is stored beside the weights."""
        weights = self.model.state_dict() if self.patience is None else self.best_weights
        self._write(self.best_path, weights=weights, **more)

    def _write(self, path: Path, **state: Any) -> None:
        if not parallel.IS_FIRST:
            return
        best = {"epoch": self.best_epoch, "best_epoch": self.best_epoch, "best_criterion": self.best_criterion}
        general = {"format": CHECKPOINT_FORMAT, "made_by": run.description()}
        buffer = io.BytesIO()  # torch raises errors of its own on a full disk, and its bytes depend on a file's name
        torch.save(self.about | general | best | state, buffer)
        with replacing(path) as temporary:
            temporary.write_bytes(buffer.getbuffer())

    def resume(self) -> None:
        """Continue from `<name>_last.pt`; ValueError if data, kind of device, or constants that affect the training are others."""
        about, path, stage = self.about, self.last_path, self.about["stage"]
        last = load_checkpoint(path, f"{stage} without RESUME")
        names = about["gene_names"], about["cell_types"]
        check_checkpoint(last, path, stage, *names, about["split_id"], "the data")
        if changed := _changed(last, about | {"device": self.device_type}):
            raise ValueError(f"{path} cannot be resumed: {'; '.join(changed)}; set it back, or train without RESUME")
        with reading(path, "a checkpoint of this model, with its optimizer"):
            self.model.load_state_dict(last["weights"])
            self.optimizer.load_state_dict(last["optimizer"])
            self.scheduler.load_state_dict(last["scheduler"])
            for name in ("history", "best_epoch", "best_criterion"):
                setattr(self, name, last[name])
            self.generator.set_state(last["rng"]["generator"])
            if parallel.IS_FIRST:
                torch.set_rng_state(last["rng"]["torch"])
                if self.device_type == "cuda":
                    torch.cuda.set_rng_state(last["rng"]["cuda"])
            else:  # dropout of its own
                torch.manual_seed(torch.initial_seed() + len(self.history))
        self.best_weights = load_checkpoint(self.best_path, stage)["weights"]
        print(f"resumed {self.name} after epoch {len(self.history)}")


def _changed(last: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What a checkpoint was trained with, if it is not the same now and affects the training."""
    changed = [
        f"{name} was {last['constants'].get(name)!r}, is {value!r}"
        for name, value in now["constants"].items()
        if name not in FREE_TO_CHANGE and last["constants"].get(name) != value
    ]
    if last.get("device") != now["device"]:  # the random numbers would differ
        changed.append(f"DEVICE was {last.get('device')}, is {now['device']}")
    epochs = [part.get("settings", {}).get("epochs") for part in (last, now)]
    if now.get("settings", {}).get("cycle") and epochs[0] != epochs[1]:  # the length of the learning rate's cycle
        changed.append(f"the number of epochs, on which the learning rate depends, was {epochs[0]:,}, is {epochs[1]:,}")
    return changed


def load_checkpoint(path: Path, stage: str) -> dict[str, Any]:
    """Read a checkpoint that `stage` has written; ValueError if it is damaged, of another stage, or of another version."""
    with reading(require(path, stage), "a checkpoint"):
        with zipfile.ZipFile(path) as archive:  # torch does not compare the checksums
            if (damaged := archive.testzip()) is not None:
                raise ValueError(f"wrong checksum of {damaged}")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    kept = checkpoint if isinstance(checkpoint, dict) else {}
    got, expected = (kept.get("format"), kept.get("stage")), (CHECKPOINT_FORMAT, stage.partition(" ")[0])
    if got != expected or "weights" not in kept:
        raise ValueError(
            f"{path} is no checkpoint of {expected[1]} in this version (format and stage are {got}, expected {expected}): "
            f"train again with {stage}"
        )
    return checkpoint


def check_checkpoint(
    checkpoint: dict[str, Any], path: Path, stage: str, gene_names: list[str], cell_types: list[str], split_id: str,
    data: object,
) -> None:  # fmt: skip
    """Refuse a model (ValueError) that was trained on other genes, other cell types, or another split than those of `data`."""
    check_same_names(checkpoint["cell_types"], path, list(cell_types), data, "cell types", f"{stage} again")
    check_same_names(checkpoint["gene_names"], path, list(gene_names), data, "genes", f"{stage} again")
    check_same_split(checkpoint["split_id"], path, split_id, data, stage)


def clip_gradients(model: torch.nn.Module, max_norm: float) -> None:
    """Scale all gradients so that their common norm is at most `max_norm`.

    On a CPU the norm is checked first, which saves a pass; on a GPU the check would wait for the device.
    """
    if not math.isfinite(max_norm):
        return
    parameters = [p for p in model.parameters() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    if norm.device.type == "cuda" or not norm <= max_norm:
        torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)


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
