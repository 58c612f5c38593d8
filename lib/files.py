"""Files of the stages: where they are, how they are replaced without loss, and whether two of them belong together."""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def folder(name: str) -> Path:
    """Path of a folder that a stage writes to, created if missing; a relative name starts at the project's folder, not the shell's."""
    path = ROOT / name
    path.mkdir(parents=True, exist_ok=True)
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
            return path.resolve()
    raise FileNotFoundError(f"{name} does not exist: looked in {Path.cwd()} and {ROOT}")


def require(path: Path, stage: str) -> Path:
    """Return the path if an earlier stage has written it.

    Raises
    ------
    FileNotFoundError
        If it is missing; the message names the stage to run first.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing: run {stage} first")
    return path


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a temporary path in the same folder to write to; rename it to `path` when the block ends without an error.

    The old file stays until then, so it survives a full disk or a killed process.
    """
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=path.suffix, dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o666 & ~_umask())
        os.replace(temporary, path)
    except OSError as error:
        raise OSError(
            f"{path} could not be written ({error.strerror or error}); the old file, if any, is untouched"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def print_written(stage: str, written: list[Path], then: str) -> None:
    """Print the last lines of a stage: what it wrote and what to run next."""
    print(f"\n{stage} wrote")
    for path in written:
        shown = path.relative_to(ROOT) if path.is_relative_to(ROOT) else path
        print(f"  {shown}  ({path.stat().st_size / 1e6:.1f} MB)" if path.is_file() else f"  {shown}/")
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
