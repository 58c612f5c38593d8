"""Read tables (csv, tsv, gzipped or not, and xlsx): every row complete, every byte text, no more than a file of its size may unpack to."""

import csv
import gzip
import io
import zipfile
from pathlib import Path
from typing import IO, Any

import pandas as pd

from lib.files import check_unpacked, reading
from lib.records import Unusable

MAX_LINE = 1 << 27  # characters of the first line: more than the names of 10 million cells
EXPECTED = "a complete csv or tsv file in UTF-8, gzipped if it is called .gz"


class _CheckedBytes(io.RawIOBase):
    """The bytes of a file, unpacked; refused where they are no text or too many."""

    def __init__(self, path: Path):
        self.path, self.n_bytes = path, 0
        self.source: Any = gzip.open(path) if path.suffix == ".gz" else open(path, "rb")  # noqa: SIM115  (closed by close)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        read = self.source.read(len(buffer))
        self.n_bytes += len(read)
        check_unpacked(self.path, self.n_bytes)
        if b"\0" in read:
            raise Unusable(f"{self.path} holds bytes that are no text; expected {EXPECTED}: save it again")
        buffer[: len(read)] = read
        return len(read)

    def close(self) -> None:
        self.source.close()
        super().close()


def open_text(path: Path) -> IO[str]:
    """Open a text file, gzipped or not."""
    return io.TextIOWrapper(io.BufferedReader(_CheckedBytes(path), 1 << 17), encoding="utf-8-sig", newline="")


def separator(path: Path) -> str:
    """Comma or tab, whichever is more frequent in the first line."""
    with reading(path, EXPECTED), open_text(path) as file:
        line = file.readline(MAX_LINE)
        if len(line) == MAX_LINE:
            raise Unusable(f"{path} has a line of more than {MAX_LINE:,} characters; expected {EXPECTED}")
    return "\t" if line.count("\t") > line.count(",") else ","


def read_header(path: Path) -> list[str]:
    """Fields of the first line, unchanged. R's write.table does not name the row names, so its header is one field short."""
    delimiter = separator(path)
    with reading(path, EXPECTED), open_text(path) as file:
        return next(csv.reader(file, delimiter=delimiter), [])


def read_rows(path: Path) -> list[list[str]]:
    """All lines of a table (of an xlsx file: of its first sheet) as text, without empty lines.

    Raises
    ------
    Unusable
        If a row has another number of fields than the others (the first may lack one) or a line break: it is cut short or damaged.
    """
    if path.suffix.lower() in (".xlsx", ".xls"):
        lines = _excel_rows(path)
    else:
        delimiter = separator(path)
        with reading(path, EXPECTED), open_text(path) as file:
            lines = list(csv.reader(file, delimiter=delimiter))
    rows = [line for line in lines if any(map(str.strip, line))]
    broken = next((number for number, row in enumerate(rows, start=1) if any("\n" in field for field in row)), None)
    if broken is not None:
        raise Unusable(
            f"{path} has a line break inside a field of row {broken:,}; expected one row per line: is a quotation mark not closed?"
        )
    width = len(rows[1]) if len(rows) > 1 else 0
    for number, row in enumerate(rows[1:], start=2):
        if len(row) != width:
            raise Unusable(
                f"{path} is cut short or damaged: its row {number:,} has {len(row):,} fields, the rows before it have {width:,}; "
                "expected as many in every row: save or download it again"
            )
    if rows and width and len(rows[0]) not in (width, width - 1):
        raise Unusable(
            f"{path} has {len(rows[0]):,} fields in its header and {width:,} in its rows; expected as many in every row: save it again"
        )
    return rows


def read_table(path: Path) -> pd.DataFrame:
    """A table with a header as text; names without blanks around them, "" for the row names of R's write.table.

    Raises
    ------
    Unusable
        If a row is incomplete, or two columns have the same name.
    """
    header, *rows = read_rows(path) or [[]]
    header = [name.strip() for name in header]
    if rows and len(header) == len(rows[0]) - 1:
        header = ["", *header]
    repeated = sorted({name for name in header if header.count(name) > 1})
    if repeated:
        raise Unusable(
            f"{path} has two columns called {repeated[0]!r}; expected names of their own: rename one of them"
        )
    return pd.DataFrame(rows, columns=header, dtype=object)


def _excel_rows(path: Path) -> list[list[str]]:
    """All rows of the first sheet of an Excel file, as text."""
    with reading(path, "an Excel file"):
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                check_unpacked(path, sum(part.file_size for part in archive.infolist()))
        return pd.read_excel(path, header=None, dtype=str, keep_default_na=False).to_numpy().tolist()
