"""First looks at csv and tsv files, gzipped or not."""

import csv
import gzip
from pathlib import Path


def open_text(path: Path):
    return (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8", newline="")


def separator(path: Path) -> str:
    """Comma or tab, by what the first line holds more of."""
    with open_text(path) as file:
        line = file.readline()
    return "\t" if line.count("\t") > line.count(",") else ","


def read_header(path: Path) -> list[str]:
    """The fields of the first line, as they are; one fewer than the columns in what R's write.table writes."""
    with open_text(path) as file:
        return next(csv.reader(file, delimiter=separator(path)), [])
