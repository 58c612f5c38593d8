"""Recognise the form of csv and tsv files, gzipped or not."""

import csv
import gzip
from pathlib import Path
from typing import IO


def open_text(path: Path) -> IO[str]:
    """Open a text file, gzipped or not."""
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8", newline="")
    return open(path, encoding="utf-8", newline="")


def separator(path: Path) -> str:
    """Comma or tab, whichever is more frequent in the first line."""
    with open_text(path) as file:
        line = file.readline()
    return "\t" if line.count("\t") > line.count(",") else ","


def read_header(path: Path) -> list[str]:
    """Fields of the first line, unchanged. R's write.table does not name the row names, so its header is one field short."""
    with open_text(path) as file:
        return next(csv.reader(file, delimiter=separator(path)), [])
