"""What a stage prints is also in a log, and details are only there: data/log.txt, all runs one after the other.

Outside of a run (tests, benchmarks, notebooks) there is no log, and details are printed.
"""

import contextlib
import io
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

NAME = "log.txt"
_logger = logging.getLogger("bulk2sc")
_logger.propagate = False
_logger.setLevel(logging.INFO)


class _Handler(logging.FileHandler):
    """Without a disk to write to, a run goes on without its log."""

    def emit(self, record: logging.LogRecord) -> None:
        with contextlib.suppress(OSError):
            super().emit(record)

    def handleError(self, record: logging.LogRecord) -> None:
        pass


class _Copied(io.TextIOBase):
    """The shell, whose lines are copied to the log."""

    def __init__(self, shell: TextIO):
        self.shell, self.line = shell, ""

    def write(self, text: str) -> int:
        *lines, self.line = (self.line + text).split("\n")
        for line in lines:
            _logger.info(line)
        return self.shell.write(text)

    def flush(self) -> None:
        self.shell.flush()

    def isatty(self) -> bool:
        return self.shell.isatty()


@contextlib.contextmanager
def to_file(folder: Path, command: str) -> Iterator[None]:
    """Copy what this block prints to the end of the log in this folder. Of the processes of torchrun, only the first one does."""
    if os.environ.get("RANK", "0") != "0":
        yield
        return
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
    handler = _Handler(folder / NAME, encoding="utf-8", delay=True)
    handler.setFormatter(logging.Formatter("%(asctime)s  %(message)s", "%Y-%m-%d %H:%M:%S"))
    _logger.addHandler(handler)
    try:
        detail(f"--- {command}")
        with contextlib.redirect_stdout(_Copied(sys.stdout)):
            yield
    except BaseException as error:
        detail(f"ended by {type(error).__name__}: {error}")
        raise
    finally:
        _logger.removeHandler(handler)
        with contextlib.suppress(OSError):
            handler.close()


def detail(text: str) -> None:
    """Write a detail to the log; print it where there is none."""
    if not any(isinstance(handler, _Handler) for handler in _logger.handlers):
        print(text)
        return
    for line in text.split("\n"):
        _logger.info(line)
