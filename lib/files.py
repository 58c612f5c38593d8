"""Files of the stages: where they are, how they are read and replaced without loss, and whether two of them belong together."""

import contextlib
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from lib import log, records, runs
from lib.records import Unusable
from lib.runs import ROOT

PROBE_BYTES = 1 << 20  # written after an error, to find out whether the disk is full
UNPACKED_RATIO = 200  # of a file's unpacked size to its size; tables of counts have 10-100, a compression bomb 1,000
MAX_LISTED = 10  # files that a stage lists in the shell
UNPACKED_BYTES = 1e9  # that any file may have, however small it is


def folder(name: str) -> Path:
    """Path of a folder that a stage writes to, created if missing; a relative name starts at the project's folder, not the shell's.

    Raises
    ------
    OSError
        If it cannot be made.
    ValueError
        If another run uses it.
    """
    path = ROOT / Path(name).expanduser()
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(
            f"{path} is not a folder and cannot be made one ({error.strerror or error}); choose another"
        ) from error
    runs.hold(path)
    return path


def user_path(name: str) -> Path:
    """Path of a file that the user names, looked up in the shell's folder, then in the project's.

    Raises
    ------
    FileNotFoundError
        If it is in neither folder.
    """
    for path in (Path(name).expanduser(), ROOT / name):
        if path.exists():
            with reading(path, "a file that may be read"):
                records.note_input(path.resolve())
            return path.resolve()
    raise FileNotFoundError(f"{name} does not exist: looked in {Path.cwd()} and {ROOT}")


def require(path: Path, stage: str) -> Path:
    """Return the path if an earlier stage has written it and nothing has changed it since.

    Raises
    ------
    FileNotFoundError
        If it is missing; the message names the stage to run first.
    Unusable
        If it does not fit its record (`lib.records`).
    """
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing: run {stage} first")
    with reading(path):
        records.check(path, f"run {stage} again")
    return path


@contextlib.contextmanager
def reading(path: Path, expected: str = "a complete file") -> Iterator[None]:
    """Turn every error of the library that reads a file in this block into one line.

    Raises
    ------
    Unusable
        It names the file, the library's reason, what was expected, and the stage that makes the file, if that is known.
    """
    try:
        yield
    except (Unusable, MemoryError):
        raise
    except Exception as error:
        maker = records.maker(path)
        remedy = f"run {maker} again" if maker else "save or download it again"
        raise Unusable(f"{path} could not be read ({_reason(error)}); expected {expected}: {remedy}") from error


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a temporary path in the same folder to write to; rename it to `path` and record it when the block ends without an error.

    The old file stays until then, so it survives a full disk or a killed process.

    Raises
    ------
    OSError
        If the file could not be written, whatever the library that writes it raises.
    """
    temporary = runs.half_written(path)
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        records.replace(temporary, path)
    except Exception as error:
        failure = error if isinstance(error, OSError) else _failure_to_write(temporary)
        if failure is None:
            raise
        raise _not_written(path, failure, "; the old file, if any, is untouched") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an error of the disk into one line that names what is written in this block.

    Raises
    ------
    OSError
        If it could not be written.
    """
    try:
        yield
    except OSError as error:
        raise _not_written(path, error) from error


def _not_written(path: Path, error: OSError, more: str = "") -> OSError:
    return OSError(
        f"{path} could not be written ({_reason(error)}){more}: "
        "make room on this disk, or choose a folder that may be written to, and run this again"
    )


def _reason(error: BaseException) -> str:
    """First line of an error's message."""
    text = (error.strerror if isinstance(error, OSError) else None) or str(error).partition("\n")[0]
    return text[:200] or type(error).__name__


def _failure_to_write(temporary: Path) -> OSError | None:
    """Why no more can be written to a file; None if it can. Libraries report a full disk with errors of any type."""
    try:
        with open(temporary, "ab", buffering=0) as file:
            if file.write(bytes(PROBE_BYTES)) < PROBE_BYTES:
                file.write(bytes(PROBE_BYTES))
            os.fsync(file.fileno())
    except OSError as error:
        return error
    return None


def check_unpacked(path: Path, n_bytes: int) -> None:
    """Refuse a file that would take much more memory than its size suggests, such as a damaged file or a compression bomb.

    Parameters
    ----------
    n_bytes
        What the file declares, or what was unpacked of it so far.

    Raises
    ------
    Unusable
        Above the limit: `UNPACKED_RATIO` times the size of the file, at least `UNPACKED_BYTES`; BULK2SC_MAX_GB sets another.
    """
    given = os.environ.get("BULK2SC_MAX_GB")
    try:
        limit = float(given) * 1e9 if given else max(UNPACKED_BYTES, UNPACKED_RATIO * path.stat().st_size)
    except ValueError:
        raise Unusable(
            f"the environment variable BULK2SC_MAX_GB is {given!r}; expected a number of gigabytes"
        ) from None
    if n_bytes > limit:
        raise Unusable(
            f"{path} ({path.stat().st_size / 1e6:,.1f} MB) unpacks to at least {n_bytes / 1e9:,.2f} GB, "
            f"expected at most {limit / 1e9:,.2f} GB: "
            "it is damaged, or set the environment variable BULK2SC_MAX_GB higher"
        )


def print_written(stage: str, written: list[Path], then: str) -> None:
    """Print the last lines of a stage: what it wrote (more than `MAX_LISTED` files: how many in each folder) and what to run next."""
    lines = []
    for path in written:
        shown = path.relative_to(ROOT) if path.is_relative_to(ROOT) else path
        lines.append(f"  {shown}  ({path.stat().st_size / 1e6:.1f} MB)" if path.is_file() else f"  {shown}/")
    print(f"\n{stage} wrote")
    if len(lines) > MAX_LISTED:
        log.detail("\n".join(lines))
        lines = [
            f"  {n_files} files in {place}/" for place, n_files in Counter(path.parent for path in written).items()
        ]
    print("\n".join(lines))
    print(f"next: {then}")


def check_same_split(split_id: str, what: object, expected_id: str, expected_by: object, remedy: str) -> None:
    """Refuse a file that belongs to another split than the other file.

    Raises
    ------
    ValueError
        If two files come from two data sets, or from two splits of one data set.
    """
    if split_id != expected_id:
        raise ValueError(
            f"{what} does not belong to {expected_by}: it comes from split {split_id}, expected split {expected_id} "
            f"(the data or their split have changed since); run {remedy} again"
        )


def check_same_names(
    got: list[str], got_by: object, expected: list[str], expected_by: object, kind: str, remedy: str
) -> None:
    """Refuse a file that has other genes or other cell types (`kind`) than the other file.

    Raises
    ------
    ValueError
        If the names or their order differ; the message names both files.
    """
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
