"""Read tables of text: csv and tsv files, gzipped or not, and the first sheet of an Excel file.

What a file may look like (compression, encoding, separator) is decided in `open_text` and `separator` alone.
"""

import csv
import gzip
from pathlib import Path
from typing import TextIO

import pandas as pd

from lib.run import reading

EXPECTED = "a complete csv or tsv file in UTF-8, gzipped if it is called .gz"


def open_text(path: Path) -> TextIO:
    """Open a text file, gzipped or not."""
    if path.suffix.lower() == ".gz":
        return gzip.open(path, "rt", encoding="utf-8-sig", newline="")
    return open(path, encoding="utf-8-sig", newline="")


def separator(path: Path) -> str:
    """Comma or tab, whichever is more frequent in the first line; ValueError if the file holds NUL bytes, where pandas ends a number."""
    with reading(path, EXPECTED), open_text(path) as file:
        part = header = file.readline()
        while part:
            if "\0" in part:
                raise ValueError("it holds bytes that are no text")
            part = file.read(1 << 20)
    return "\t" if header.count("\t") > header.count(",") else ","


def read_rows(path: Path) -> list[list[str]]:
    """All lines of a table as text, without empty lines.

    ValueError if a row has another number of fields than the others (the first may lack one) or a line break.
    """
    if path.suffix.lower() in (".xlsx", ".xls"):
        with reading(path, "an Excel file"):
            lines = pd.read_excel(path, header=None, dtype=str, keep_default_na=False).to_numpy().tolist()
    else:
        delimiter = separator(path)
        with reading(path, EXPECTED), open_text(path) as file:
            lines = list(csv.reader(file, delimiter=delimiter))
    rows = [line for line in lines if any(map(str.strip, line))]
    width = len(rows[1]) if len(rows) > 1 else None
    for number, row in enumerate(rows, start=1):
        is_short_header = number == 1 and width in (None, len(row) + 1)
        if (len(row) != width and not is_short_header) or any("\n" in field for field in row):
            raise ValueError(
                f"{path} is cut short or damaged: its row {number:,} has {len(row):,} fields, others have {width or 0:,}; "
                "expected as many in every row, and no line breaks inside them: save or download it again"
            )
    return rows


def read_table(path: Path) -> pd.DataFrame:
    """A table with a header as text; names without blanks around them, "" for the row names of R's write.table.

    ValueError if a row is incomplete, or two columns have the same name.
    """
    header, *rows = read_rows(path) or [[]]
    header = [name.strip() for name in header]
    if rows and len(header) == len(rows[0]) - 1:
        header = ["", *header]
    for name in header:
        if header.count(name) > 1:
            raise ValueError(f"{path} has two columns called {name!r}; expected names of their own: rename one of them")
    return pd.DataFrame(rows, columns=header, dtype=object)
