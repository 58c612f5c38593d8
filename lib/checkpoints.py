"""Checkpoints: how they are written, read, and refused where they do not belong to the data or to the training at hand.

A checkpoint is a plain dict of tensors and builtins that loads with `weights_only=True`. `<name>.pt` holds the weights with the
best held-out loss (without early stopping, those of the last epoch), to use. `<name>_last.pt` also holds the state of the optimizer
and of the random generators, so that a resumed training gives the same result as an uninterrupted one (`lib.training`).
"""

import io
import zipfile
from pathlib import Path
from typing import Any

import torch

from lib.files import check_same_names, check_same_split, check_unpacked, reading, replacing, require
from lib.records import Unusable

CHECKPOINT_FORMAT = 6  # raised when checkpoints of older versions cannot be used any more
EVERY_CHECKPOINT = ("stage", "constants", "arguments", "gene_names", "cell_types", "split_id", "weights", "epoch")
TO_RESUME = ("device", "optimizer", "scheduler", "history", "rng")  # what a checkpoint also needs to be continued
FREE_TO_CHANGE = {
    "EPOCHS",
    "PATIENCE",
    "KEEP_EVERY",
    "OTHER_EPOCHS",
    "OTHER_PATIENCE",
    "RESUME",
    "DATA_DIR",
    "MODELS_DIR",
    "FIG_DIR",
}  # may change when a run is resumed


def load_checkpoint(path: Path, stage: str) -> dict[str, Any]:
    """Read a checkpoint that `stage` has written.

    Raises
    ------
    FileNotFoundError
        If the stage was not run.
    ValueError
        If it is damaged, no checkpoint of this stage, or written by another version of this project.
    """
    with reading(require(path, stage), "a checkpoint"):
        checkpoint = torch.load(_checked_archive(path), map_location="cpu", weights_only=True)
    if not isinstance(checkpoint, dict) or not checkpoint.keys() & {"format", "weights"}:
        raise ValueError(
            f"{path} is no checkpoint of this project (it holds a {type(checkpoint).__name__}): train again with {stage}"
        )
    if checkpoint.get("format") != CHECKPOINT_FORMAT:
        raise ValueError(
            f"{path} was written by another version of this project (format {checkpoint.get('format', 1)}, "
            f"expected {CHECKPOINT_FORMAT}): train again with {stage}"
        )
    missing = [name for name in EVERY_CHECKPOINT if name not in checkpoint]
    wrote, wanted = str(checkpoint.get("stage")), stage.partition(" ")[0]
    if missing or wrote != wanted:
        lacks = f" and lacks {', '.join(missing)}" if missing else ""
        raise ValueError(
            f"{path} was written by {wrote}{lacks}, expected a checkpoint of {wanted}: train again with {stage}"
        )
    return checkpoint


def _checked_archive(path: Path) -> Path:
    """The path of a checkpoint whose parts have the checksums that the file states; torch does not compare them.

    Raises
    ------
    Unusable
        If a part has another checksum.
    """
    with zipfile.ZipFile(path) as archive:
        check_unpacked(path, sum(part.file_size for part in archive.infolist()))
        damaged = archive.testzip()
    if damaged is not None:
        raise Unusable(
            f"{path} is damaged (its part {damaged} has another checksum than it states): train again, or copy it again"
        )
    return path


def write_checkpoint(checkpoint: dict[str, Any], path: Path) -> None:
    """Write a checkpoint, by way of memory: on a full disk torch would raise errors of its own, and its bytes depend on the name."""
    buffer = io.BytesIO()
    torch.save(checkpoint, buffer)
    with replacing(path) as temporary:
        temporary.write_bytes(buffer.getbuffer())


def check_checkpoint(
    checkpoint: dict[str, Any],
    path: Path,
    stage: str,
    gene_names: list[str],
    cell_types: list[str],
    split_id: str,
    data: object,
) -> None:
    """Check that a model belongs to `data`.

    Raises
    ------
    ValueError
        If it was trained on other genes, other cell types, or another split; the message names both sides.
    """
    check_same_names(checkpoint["cell_types"], path, list(cell_types), data, "cell types", f"{stage} again")
    check_same_names(checkpoint["gene_names"], path, list(gene_names), data, "genes", f"{stage} again")
    check_same_split(checkpoint["split_id"], path, split_id, data, stage)


def load_resumable(path: Path, about: dict[str, Any], device_type: str) -> dict[str, Any]:
    """Read a checkpoint to continue the training that `about` describes (as in `lib.training.Trainer`).

    Raises
    ------
    ValueError
        If it was trained on other data, on another kind of device, or with other constants.
    """
    last = load_checkpoint(path, f"{about['stage']} without RESUME")
    check_checkpoint(
        last, path, about["stage"], about["gene_names"], about["cell_types"], about["split_id"], "the data"
    )
    missing = [name for name in TO_RESUME if name not in last]
    if missing:
        raise ValueError(f"{path} lacks {', '.join(missing)}, so it cannot be continued: train again without RESUME")
    settings = about.get("settings", {})
    if "cycle" in settings and last["settings"]["epochs"] != settings["epochs"]:
        raise ValueError(
            f"{path} was trained with a learning rate that depends on the number of epochs, {last['settings']['epochs']:,}, "
            f"expected {settings['epochs']:,}: set the epochs back, or start a new training without RESUME"
        )
    if last["device"] != device_type:
        raise ValueError(
            f"{path} was trained on {last['device']} and cannot be continued with the same random numbers on "
            f"{device_type}; set DEVICE to {last['device']}, or start a new training without RESUME"
        )
    ours, theirs = about["constants"], last["constants"]
    changed = [
        f"{k} was {theirs.get(k)!r}, is {v!r}"
        for k, v in ours.items()
        if k not in FREE_TO_CHANGE and theirs.get(k) != v
    ]
    if changed:
        raise ValueError(
            f"{path} cannot be resumed with other constants: {'; '.join(changed)}; "
            "set them back, or start a new training without RESUME"
        )
    return last
