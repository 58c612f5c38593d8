"""A run of a stage: its folders (one run at a time), its files (replaced only when complete), its log, and how it ends.

Outside of a run (tests, benchmarks, notebooks) there are no locks, no signal handlers and no log, and details are printed.
"""

import contextlib
import importlib.metadata
import io
import os
import platform
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from filelock import FileLock, Timeout

ROOT = Path(__file__).resolve().parent.parent
LOG = "log.txt"
LOCK = ".lock"  # in every folder that stages write to
MAX_LISTED = 10  # files that a stage lists in the shell
PACKAGES = ("torch", "numpy", "scipy", "pandas", "scanpy", "anndata", "h5py")
IS_FIRST = os.environ.get("RANK", "0") == "0"  # of the processes of torchrun: it locks, logs, and writes


class Run(NamedTuple):
    stage: str
    constants: Callable[[], dict[str, Any]]
    locks: dict[Path, FileLock]
    log: TextIO | None


_current: Run | None = None


class Stopped(KeyboardInterrupt):
    """The run was stopped by a signal, whose number is the argument."""


@contextlib.contextmanager
def started(stage: str, constants: Callable[[], dict[str, Any]], log_folder: Path) -> Iterator[None]:
    """Run a stage in this block: signals raise `Stopped`, folders are locked, what is printed is copied to the log."""
    global _current
    log = None
    with contextlib.suppress(OSError):  # without a place to write to, a run goes on without its log
        if IS_FIRST:
            log_folder.mkdir(parents=True, exist_ok=True)
            log = open(log_folder / LOG, "a", encoding="utf-8", buffering=1)  # noqa: SIM115  (closed below)
    _current = Run(stage, constants, {}, log)
    handlers = _handle_signals()
    try:
        _to_log(shlex.join(["--- python", stage, *sys.argv[1:]]))
        with contextlib.redirect_stdout(_Copied(sys.stdout)):
            yield
    except BaseException as error:
        _to_log(f"ended by {type(error).__name__}: {error}")
        raise
    finally:
        for lock in _current.locks.values():
            lock.release()
        if log is not None:
            with contextlib.suppress(OSError):
                log.close()
        _current = None
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _handle_signals() -> dict[int, Any]:
    """Raise `Stopped` on the first signal; a second one ends the process at once. Returns the former handlers."""

    def stop(number: int, _: object) -> None:
        signal.signal(number, signal.SIG_DFL)
        raise Stopped(number)

    if threading.current_thread() is not threading.main_thread():
        return {}
    numbers = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
    heeded = [n for n in numbers if signal.getsignal(n) is not signal.SIG_IGN]  # nohup, or a shell's "&"
    return {number: signal.signal(number, stop) for number in heeded}


def description() -> dict[str, Any]:
    """What makes the files of this run: stage, constants, versions, commit; empty outside of a run. The same for the same bytes."""
    if _current is None:
        return {}
    versions = {"python": platform.python_version()}
    versions |= {package: importlib.metadata.version(package) for package in PACKAGES}
    commit = git("rev-parse", "HEAD") if (ROOT / ".git").exists() else None
    if commit is not None:
        commit = commit.strip() + " + changes" * bool(git("status", "--porcelain", "--untracked-files=no"))
    return {"stage": _current.stage, "constants": _current.constants(), "versions": versions, "commit": commit}


def git(*words: str) -> str | None:
    """Output of a git command on the project; None if it fails."""
    command = ["git", "-C", str(ROOT), *words]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None


# --- folders and files


def folder(name: str) -> Path:
    """Path of a folder that a stage writes to, made if missing; a relative name starts at the project's folder, not the shell's.

    It is locked until the run ends (ValueError if another run uses it), and what killed runs have left half-written is removed.
    """
    path = ROOT / Path(name).expanduser()
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(
            f"{path} is not a folder and cannot be made one ({error.strerror or error}); choose another"
        ) from error
    if _current is not None and IS_FIRST and path not in _current.locks:
        lock = FileLock(path / LOCK, timeout=0)
        try:
            lock.acquire()
        except Timeout:
            raise ValueError(
                f"{path} is in use by another run; expected one run at a time: wait for it, or choose other folders"
            ) from None
        except (OSError, NotImplementedError):  # a folder that may only be read, or a disk without locks
            return path
        _current.locks[path] = lock
        for left in path.glob(".half-written-*"):
            print(f"removed {left}, which a run that was killed has left")
            left.unlink(missing_ok=True)
    return path


def user_path(name: str) -> Path:
    """Path of a file that the user names, in the shell's folder or the project's; FileNotFoundError if it is in neither."""
    for path in (Path(name).expanduser(), ROOT / name):
        if path.exists():
            return path.resolve()
    raise FileNotFoundError(f"{name} does not exist: looked in {Path.cwd()} and {ROOT}")


def require(path: Path, stage: str) -> Path:
    """The path of a file of an earlier stage; FileNotFoundError, which names the stage to run, if it is missing."""
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing: run {stage} first")
    return path


@contextlib.contextmanager
def reading(path: Path, expected: str = "a complete file") -> Iterator[None]:
    """Turn every error of the library that reads a file in this block into a ValueError of one line, which names the file."""
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:
        if isinstance(error, (ValueError, FileNotFoundError)) and str(path) in str(error):  # our own message
            raise
        reason = (str(error).partition("\n")[0] or type(error).__name__)[:200]
        raise ValueError(
            f"{path} could not be read ({reason}); expected {expected}: make or download it again"
        ) from error


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a temporary path in the same folder to write to; rename it to `path` when the block ends without an error.

    The old file stays until then, so it survives a full disk or a killed process.
    """
    temporary = path.with_name(f".half-written-{os.getpid()}-{path.name}")
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise OSError(
            f"{path} could not be written ({error.strerror or error}); the old file, if any, is untouched: "
            "make room on this disk, or choose a folder that may be written to, and run this again"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


# --- what belongs together


def check_same_split(split_id: str, what: object, expected_id: str, expected_by: object, remedy: str) -> None:
    """Refuse a file (ValueError) that comes from another data set or split than the other file."""
    if split_id != expected_id:
        raise ValueError(
            f"{what} does not belong to {expected_by}: it comes from split {split_id}, expected split {expected_id} "
            f"(the data or their split have changed since); run {remedy} again"
        )


def check_same_names(
    got: list[str], got_by: object, expected: list[str], expected_by: object, kind: str, remedy: str
) -> None:
    """Refuse a file (ValueError) that has other genes or other cell types (`kind`), or another order, than the other file."""
    if list(got) == list(expected):
        return
    only_got = [name for name in got if name not in set(expected)]
    only_expected = [name for name in expected if name not in set(got)]
    difference = "the same names in another order"
    if only_got or only_expected:
        difference = f"unexpected: {_some(only_got)}; missing: {_some(only_expected)}"
    raise ValueError(
        f"{got_by} has {len(got):,} {kind}, {expected_by} has {len(expected):,}, and they differ ({difference}); run {remedy}"
    )


def _some(names: list[str]) -> str:
    """The first three names, and the number of the others."""
    if len(names) > 3:
        return f"{', '.join(names[:3])} and {len(names) - 3:,} more"
    return ", ".join(names) or "none"


# --- what a stage prints


class _Copied(io.TextIOBase):
    """The shell, whose lines are copied to the log."""

    def __init__(self, shell: TextIO):
        self.shell, self.line = shell, ""

    def write(self, text: str) -> int:
        *lines, self.line = (self.line + text).split("\n")
        for line in lines:
            _to_log(line)
        return self.shell.write(text)

    def flush(self) -> None:
        self.shell.flush()


def _to_log(text: str) -> None:
    if _current is not None and _current.log is not None:
        with contextlib.suppress(OSError):
            for line in text.split("\n"):
                _current.log.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {line}\n")


def detail(text: str) -> None:
    """Write a detail to the log; print it outside of a run."""
    if _current is None:
        print(text)
    _to_log(text)


def print_written(stage: str, written: list[Path], then: str) -> None:
    """Print what a stage wrote (more than `MAX_LISTED` files: how many in each folder) and what to run next."""
    lines = []
    for path in written:
        shown = path.relative_to(ROOT) if path.is_relative_to(ROOT) else path
        lines.append(f"  {shown}  ({path.stat().st_size / 1e6:.1f} MB)" if path.is_file() else f"  {shown}/")
    print(f"\n{stage} wrote")
    if len(lines) > MAX_LISTED:
        detail("\n".join(lines))
        lines = [f"  {n} files in {place}/" for place, n in Counter(path.parent for path in written).items()]
    print("\n".join(lines))
    print(f"next: {then}")
