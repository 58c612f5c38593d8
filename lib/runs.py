"""A run of a stage: what it reads and with which constants, the folders that it holds, and how it ends when it is stopped.

Outside of a run (tests, benchmarks, notebooks) there are no locks, no signal handlers and no description.
"""

import contextlib
import importlib.metadata
import os
import platform
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

try:
    import fcntl
except ImportError:  # Windows: folders are not locked
    fcntl = None  # type: ignore[assignment]

ROOT = Path(__file__).resolve().parent.parent
RECORDS = ".records"  # folder in every folder that stages write to: records of the files (`lib.records`), and the lock
LOCK = "lock"  # file in RECORDS; its text names the run that holds the folder
HALF_WRITTEN = re.compile(r"\..*\.half-(?P<host>.+)-(?P<pid>\d+)-(?P<start>\d+)(\..*)?")
OTHER_HOST_S = 86_400  # age from which a half-written file of another computer is removed
STOPPED_BY = {name: getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)}
PACKAGES = ("torch", "numpy", "scipy", "pandas", "scanpy", "anndata", "h5py")


class Run(NamedTuple):
    stage: str
    constants: Callable[[], dict[str, Any]]
    inputs: dict[str, str]  # file: its SHA-256
    locks: dict[Path, int]  # folder: descriptor of its lock file
    started: str
    clock: float  # `time.monotonic` at the start, seconds


class Stopped(KeyboardInterrupt):
    """The run was stopped by a signal."""

    def __init__(self, number: int):
        super().__init__(number)
        self.number = number

    def __str__(self) -> str:
        return "Ctrl-C" if self.number == signal.SIGINT else signal.Signals(self.number).name


_current: Run | None = None


def current() -> Run | None:
    """The run of this process, if a stage was started from its command line."""
    return _current


@contextlib.contextmanager
def started(stage: str, constants: Callable[[], dict[str, Any]]) -> Iterator[None]:
    """Be a run of this stage: signals raise `Stopped`, folders are locked, and files record what made them."""
    global _current
    _current = Run(stage, constants, {}, {}, time.strftime("%Y-%m-%d %H:%M:%S"), time.monotonic())
    before = _handle_signals()
    try:
        yield
    finally:
        for descriptor in _current.locks.values():
            os.close(descriptor)  # releases the lock
        _current = None
        for number, handler in before.items():
            signal.signal(number, handler)


def _handle_signals() -> dict[int, Any]:
    """Raise `Stopped` on the first signal; a second one ends the process at once. Returns the former handlers."""

    def stop(number: int, _: object) -> None:
        signal.signal(number, signal.SIG_DFL)
        raise Stopped(number)

    if threading.current_thread() is not threading.main_thread():
        return {}
    numbers = [n for n in STOPPED_BY.values() if signal.getsignal(n) is not signal.SIG_IGN]  # nohup, or a shell's "&"
    return {number: signal.signal(number, stop) for number in numbers}


def description() -> dict[str, Any]:
    """What makes the files of this run: stage, constants, input files with their SHA-256, versions; empty outside of a run."""
    if _current is None:
        return {}
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return {
        "stage": _current.stage,
        "constants": _current.constants(),
        "inputs": dict(_current.inputs),
        "versions": versions,
        "commit": _commit(),
    }


def invocation() -> dict[str, Any]:
    """The command that started this run, and the seconds since then; empty outside of a run.

    They are kept apart from `description`, which is the same for two runs that make the same bytes.
    """
    if _current is None:
        return {}
    n_processes = os.environ.get("WORLD_SIZE", "1")
    program = ["python"] if n_processes == "1" else ["torchrun", "--nproc-per-node", n_processes]
    command = shlex.join([*program, _current.stage, *sys.argv[1:]])
    return {"command": command, "seconds": round(time.monotonic() - _current.clock, 1)}


def _commit() -> str | None:
    """The git commit of the project, "+ changes" if tracked files differ from it; None if it is no clone."""
    commit = git("rev-parse", "HEAD") if (ROOT / ".git").exists() else None
    return commit and commit.strip() + " + changes" * bool(git("status", "--porcelain", "--untracked-files=no"))


def git(*words: str) -> str | None:
    """Output of a git command on the project; None if it fails."""
    command = ["git", "-C", str(ROOT), *words]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None


def hold(folder: Path) -> None:
    """Lock a folder until the run ends, and remove the half-written files that dead processes left there.

    Of the processes that torchrun starts, only the first one locks. A folder that may not be written to, or a disk without
    locks, is used without a lock.

    Raises
    ------
    ValueError
        If another run holds the folder.
    """
    if _current is None or folder in _current.locks or os.environ.get("RANK", "0") != "0":
        return
    try:
        (folder / RECORDS).mkdir(exist_ok=True)
        descriptor = os.open(folder / RECORDS / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError:
        return
    _current.locks[folder] = descriptor
    if fcntl is not None:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(descriptor, 200).decode(errors="replace")
            raise ValueError(
                f"{folder} is in use by another run ({holder}); expected one run at a time: wait for it, or choose other folders"
            ) from None
        except OSError:
            return
    with contextlib.suppress(OSError):  # a full disk: the text only serves the message
        os.truncate(descriptor, 0)
        os.pwrite(descriptor, f"{_current.stage}, process {os.getpid()}, since {_current.started}".encode(), 0)
    for place in (folder, folder / RECORDS):
        remove_half_written(place)


def half_written(path: Path) -> Path:
    """Temporary name of a file that this process writes, in the same folder and with the same suffix."""
    owner = f"{socket.gethostname()}-{os.getpid()}-{_start_of(os.getpid())}"
    return path.with_name(f".{path.stem}.half-{owner}{path.suffix}")


def remove_half_written(folder: Path) -> None:
    """Remove the half-written files of dead processes; those of living ones, and new ones of other computers, stay."""
    for path in folder.iterdir():
        match = HALF_WRITTEN.fullmatch(path.name)
        if match and not _is_alive(match, path):
            print(f"removed {path}, which a run that was killed has left")
            path.unlink(missing_ok=True)


def _is_alive(match: re.Match[str], path: Path) -> bool:
    if match["host"] != socket.gethostname():
        return time.time() - path.stat().st_mtime < OTHER_HOST_S
    return _start_of(int(match["pid"])) == int(match["start"])


def _start_of(pid: int) -> int:
    """When a process was started, in clock ticks since the computer was (0 where there is no /proc); -1 if there is none."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    except OSError:
        pass
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return -1
    except OSError:
        pass
    return 0
