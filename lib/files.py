"""Where the stages read and write, and how: always to a temporary name first, so that a kill loses nothing."""

import contextlib
import os
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def folder(name: str) -> Path:
    """A folder that a stage writes to, made if need be; a relative name starts at the project, not at the shell's folder."""
    path = ROOT / name
    path.mkdir(parents=True, exist_ok=True)
    return path


def user_path(name: str) -> Path:
    """A file that the user names: as the shell sees it, or else starting at the project.

    Raises
    ------
    FileNotFoundError
        If it is in neither place.
    """
    for path in (Path(name).expanduser(), ROOT / name):
        if path.exists():
            return path.resolve()
    raise FileNotFoundError(f"{name} does not exist: looked in {Path.cwd()} and {ROOT}")


def require(path: Path, stage: str) -> Path:
    """The path itself, if an earlier stage has written it.

    Raises
    ------
    FileNotFoundError
        Naming the stage to run first.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing: run {stage} first")
    return path


@contextlib.contextmanager
def replacing(path: Path):
    """A temporary name beside `path` to write to; it takes the place of `path` only when the block ends without an error.

    Until then the old file stands, so a full disk or a kill between write and rename costs nothing.
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


def report(stage: str, written: list[Path], then: str) -> None:
    """The last lines of a stage: what it wrote and what to run next."""
    print(f"\n{stage} wrote")
    for path in written:
        shown = path.relative_to(ROOT) if path.is_relative_to(ROOT) else path
        print(f"  {shown}  ({path.stat().st_size / 1e6:.1f} MB)" if path.is_file() else f"  {shown}/")
    print(f"next: {then}")
