"""Read tables: csv and tsv, gzipped or not, whose separator is recognised, and xlsx."""

import csv
import gzip
from pathlib import Path
from typing import IO

import pandas as pd


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


def read_text_table(path: Path) -> pd.DataFrame:
    """Read a table with a header, every field as text: csv, tsv, or the first sheet of an xlsx; empty fields are ""."""
    if path.suffix.lower() in (".xlsx", ".xls"):
        cells = pd.read_excel(path, header=None, dtype=str, keep_default_na=False)
        return cells.iloc[1:].reset_index(drop=True).set_axis(cells.iloc[0].to_list(), axis=1)
    return pd.read_csv(path, sep=separator(path), dtype=str, keep_default_na=False)
