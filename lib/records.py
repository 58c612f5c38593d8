"""A record of every file that a stage writes: its size and SHA-256, and what made it.

The record of data/train.h5ad is data/.records/train.h5ad.json. A file that no longer fits its record is refused before work
begins. Deleting the record makes the file usable as it is.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from lib import runs

_known: dict[Path, tuple[tuple[int, ...], str]] = {}  # files hashed by this process: their state on disk, their SHA-256


class Unusable(ValueError):
    """A file that cannot be used; the message says what, got, expected and remedy."""


def record_path(path: Path) -> Path:
    return path.parent / runs.RECORDS / f"{path.name}.json"


def sha256(path: Path) -> str:
    """SHA-256 of a file, hashed once per process while the file stays the same; of a folder: of its files' names and sizes."""
    if path.is_dir():
        listed = sorted((f.name, f.stat().st_size) for f in path.iterdir() if f.is_file())
        return hashlib.sha256(repr(listed).encode()).hexdigest()
    stat = path.stat()
    state = stat.st_ino, stat.st_size, stat.st_mtime_ns
    if path not in _known or _known[path][0] != state:
        with open(path, "rb") as file:
            _known[path] = state, hashlib.file_digest(file, "sha256").hexdigest()
    return _known[path][1]


def replace(temporary: Path, path: Path) -> None:
    """Rename a complete file to its final name and record it. A kill in between leaves the old or the new file, both usable."""
    if runs.current() is None:  # what makes the file is not known
        os.replace(temporary, path)
        record_path(path).unlink(missing_ok=True)
        return
    new = runs.description() | runs.invocation() | _state(temporary)
    old = read(path)
    if old is not None:
        _write(path, new | {"replaces": old["sha256"]})
    os.replace(temporary, path)
    _write(path, new)


def add(path: Path, **about: Any) -> None:
    """Record a complete file that is already in its place."""
    _write(path, about | _state(path))


def _state(path: Path) -> dict[str, Any]:
    return {"size": path.stat().st_size, "sha256": sha256(path)}


def _write(path: Path, record: dict[str, Any]) -> None:
    target = record_path(path)
    target.parent.mkdir(exist_ok=True)
    temporary = runs.half_written(target)
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            json.dump(record, file, indent=1, default=str)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def read(path: Path) -> dict[str, Any] | None:
    """The record of a file; None if there is none, or if it is damaged and thus of no use."""
    try:
        record = json.loads(record_path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) and {"size", "sha256"} <= record.keys() else None


def is_intact(path: Path) -> bool:
    """Whether a file has a record and fits it."""
    record = read(path)
    return record is not None and record["sha256"] == sha256(path)


def maker(path: Path) -> str | None:
    """The stage that has written a file, if that is known."""
    return (read(path) or {}).get("stage")


def note_input(path: Path) -> str:
    """Add a file to the inputs of this run; returns its SHA-256."""
    got = sha256(path)
    if (run := runs.current()) is not None:
        run.inputs[str(path.relative_to(runs.ROOT)) if path.is_relative_to(runs.ROOT) else str(path)] = got
    return got


def check(path: Path, remedy: str) -> None:
    """Refuse a file that has changed since it was written; note it as an input of this run.

    Raises
    ------
    Unusable
        If its size or SHA-256 is not the recorded one; the message names both.
    """
    record, got = read(path), note_input(path)
    if record is None and record_path(path).exists():
        raise Unusable(
            f"{record_path(path)} is damaged, so {path} cannot be checked: {remedy}, or delete {record_path(path)} to use the file as it is"
        )
    if record is None or got in (record["sha256"], record.get("replaces")):
        return
    size = path.stat().st_size
    difference = f"{size:,} bytes, expected {record['size']:,}"
    if size == record["size"]:
        difference = f"SHA-256 {got[:12]}..., expected {record['sha256'][:12]}..."
    origin = f"{record['stage']} wrote" if "stage" in record else "was used before"
    raise Unusable(
        f"{path} is not the file that {origin}: {difference}: {remedy}, "
        f"or delete {record_path(path)} to use the file as it is"
    )
