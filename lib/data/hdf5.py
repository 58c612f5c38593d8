"""HDF5 files (.h5ad, 10x .h5): their structure is checked before they are read, and a full disk does not crash HDF5."""

import contextlib
import io
import json
import multiprocessing
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, TypeVar

import anndata as ad
import h5py
import numpy as np

from lib import records, runs
from lib.files import check_unpacked, reading, replacing
from lib.records import Unusable

ENTRIES_AT_ONCE = 1 << 22  # indices in memory at a time
CHECK_S = 60  # seconds that reading a block of a user's file may take

T = TypeVar("T")


def read_h5ad(path: Path, backed: Literal["r"] | None = None) -> ad.AnnData:
    """Read an .h5ad file, or open it with `X` on disk.

    Raises
    ------
    Unusable
        If it cannot be read or its structure is damaged.
    """
    with reading(path, "an .h5ad file"):
        if not records.is_intact(path):
            check_structure(path, ("obs", "var"))
        return ad.read_h5ad(path, backed=backed)


def check_structure(path: Path, needs: tuple[str, ...] = (), indices: bool = True) -> None:
    """Check what the readers of HDF5 files rely on, without holding more than a block of it.

    Parameters
    ----------
    needs
        Names that the file must hold.
    indices
        Whether all indices of sparse matrices are read and checked; otherwise their reader has to do it.

    Raises
    ------
    Unusable
        If a part is missing, a declared size is out of proportion (`check_unpacked`), or the index of a sparse matrix is not one.
    """
    with reading(path, "an HDF5 file"), h5py.File(path) as file:
        missing = [name for name in needs if name not in file]
        if missing:
            raise Unusable(
                f"{path} lacks {' and '.join(missing)}; expected {' and '.join(needs)}: save it again with AnnData.write_h5ad"
            )
        found: list[h5py.Group | h5py.Dataset] = []
        file.visititems(lambda _, item: found.append(item))  # returns None, so that the visit goes on
        datasets = [item for item in found if isinstance(item, h5py.Dataset) and item.shape]
        check_unpacked(path, sum(int(item.size) * item.dtype.itemsize for item in datasets))
        for item in found:
            if isinstance(item, h5py.Group) and {"data", "indices", "indptr"} <= set(item):
                check_sparse(item, path, indices)


def check_foreign(path: Path, needs: tuple[str, ...] = ()) -> None:
    """Check the structure of a user's file, and read all of it once, in a process of its own (`from_child`).

    Raises
    ------
    Unusable
        As `check_structure` and `from_child`.
    """

    def steps() -> Iterator[None]:
        check_structure(path, needs)
        yield
        with reading(path, "an HDF5 file"), h5py.File(path) as file:
            names: list[str] = []
            file.visit(names.append)  # returns None, so that the visit goes on
            for name in names:
                yield from _read_item(file[name])

    for _ in from_child(path, steps):
        pass


def from_child(path: Path, steps: Callable[[], Iterator[T]]) -> Iterator[T]:
    """Run a generator that reads a user's file in a process of its own, and yield its items.

    A damaged file can make HDF5 crash, or loop without end. The process reads one item ahead, while the last one is used.

    Raises
    ------
    Unusable
        If the process crashes, or does not give an item in `CHECK_S` seconds.
    ValueError, OSError, MemoryError
        Those of the generator.
    """
    if "fork" not in multiprocessing.get_all_start_methods():
        yield from steps()
        return
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_send_items, args=(steps, receiver, sender), daemon=True)
    child.start()
    sender.close()
    try:
        while True:
            if not receiver.poll(CHECK_S):
                raise Unusable(
                    f"{path} is damaged: HDF5 does not finish reading it, nothing came in {CHECK_S:.0f} s: save or download it again"
                )
            kind, value = receiver.recv()
            if kind == "end":
                return
            if kind == "error":
                raise value
            yield value
    except EOFError:
        raise Unusable(f"{path} is damaged: HDF5 crashes when it reads it: save or download it again") from None
    finally:
        child.kill()
        child.join()
        receiver.close()


def _send_items(steps: Callable[[], Iterator[Any]], receiver: Any, sender: Any) -> None:
    """Send the items of a generator, then its error or its end."""
    receiver.close()  # so that sending fails when the other process has ended
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        for item in steps():
            sender.send(("item", item))
        sender.send(("end", None))
    except BrokenPipeError:
        return
    except (ValueError, OSError, MemoryError) as error:
        sender.send(("error", error))


def _read_item(item: h5py.Group | h5py.Dataset) -> Iterator[None]:
    """Read all attributes of an item, and a dataset block by block."""
    for name in item.attrs:
        item.attrs[name]
    if isinstance(item, h5py.Dataset) and item.shape:
        rows = max(1, ENTRIES_AT_ONCE // max(1, item.size // max(1, len(item))))
        for start in range(0, len(item), rows):
            item[start : start + rows]
            yield


def check_sparse(group: Any, path: Path, indices: bool = True) -> None:
    """Check one CSR or CSC matrix: its index pointers rise from 0 to the number of entries, its indices are those of its columns (rows).

    Parameters
    ----------
    group
        HDF5 or zarr group.
    indices
        Whether its indices are read and checked.
    """
    shape = group["shape"][()] if "shape" in group else group.attrs.get("shape", group.attrs.get("h5sparse_shape"))
    data, columns, indptr = group["data"], group["indices"], group["indptr"][()]
    kind = group.attrs.get("encoding-type", group.attrs.get("h5sparse_format", "csc"))  # 10x: genes x cells, by cells
    is_csr = (kind.decode() if isinstance(kind, bytes) else str(kind)).startswith("csr")
    if shape is None or len(shape) != 2:
        raise Unusable(
            f"{path}: the sparse matrix {group.name} has no shape, expected two numbers: save the file again"
        )
    n_major, n_minor = (int(n) for n in (shape if is_csr else shape[::-1]))
    problem = None
    if data.shape != columns.shape or len(data.shape) != 1:
        problem = f"{data.shape} values and {columns.shape} indices, expected as many of both"
    elif (
        len(indptr) != n_major + 1
        or indptr[0] != 0
        or indptr[-1] != data.shape[0]
        or (np.diff(indptr.astype(np.int64)) < 0).any()
    ):
        pointers = f"{len(indptr):,} index pointers from {indptr[0]:,} to {indptr[-1]:,}"
        problem = f"{pointers}, expected {n_major + 1:,} that rise from 0 to {data.shape[0]:,}"
    elif indices:
        for start in range(0, columns.shape[0], ENTRIES_AT_ONCE):
            check_indices(columns[start : start + ENTRIES_AT_ONCE], n_minor, group.name, path)
    if problem is not None:
        raise Unusable(
            f"{path} is damaged: its sparse matrix {group.name} has {problem}: save or download the file again"
        )


def check_indices(indices: np.ndarray, n: int, name: str, path: Path) -> None:
    """Refuse indices of a sparse matrix that are not 0 to n - 1."""
    if len(indices) and (indices.min() < 0 or indices.max() >= n):
        index = indices.min() if indices.min() < 0 else indices.max()
        raise Unusable(
            f"{path} is damaged: its sparse matrix {name} has an index {index:,}, expected 0 to {n - 1:,}: "
            "save or download the file again"
        )


def write_h5ad(adata: ad.AnnData, path: Path) -> None:
    """Write an AnnData that is in memory; uns["made_by"] says which run did it (`runs.description`, as JSON)."""
    with replacing(path) as temporary, new_hdf5(temporary) as (file, _):
        write_described(adata, file)


def write_described(adata: ad.AnnData, file: h5py.File) -> None:
    """Write an AnnData and its uns["made_by"] to an open file; columns of text become categories, as in AnnData.write_h5ad."""
    describe(adata)
    ad.io.write_elem(file, "/", adata)


def describe(adata: ad.AnnData) -> None:
    """Set uns["made_by"], if a stage runs, and turn columns of text into categories."""
    if runs.current() is not None:
        adata.uns["made_by"] = json.dumps(runs.description(), default=str)
    adata.strings_to_categoricals()


@contextlib.contextmanager
def new_hdf5(path: Path) -> Iterator[tuple[h5py.File, "Disk"]]:
    """Open a new HDF5 file. A failed write is raised when the block ends, or earlier by `Disk.check`.

    Raises
    ------
    OSError
        If a write failed, such as on a full disk.
    """
    with Disk(path) as disk:
        try:
            with h5py.File(disk, "w") as file:
                yield file, disk
        finally:
            disk.check()


class Disk(io.FileIO):
    """A new file for HDF5 that keeps the first failed write for `check`, and pretends to HDF5 that nothing failed.

    HDF5 cannot close a file after a failed write: the process would end with a segmentation fault.
    """

    failure: OSError | None = None

    def __init__(self, path: Path):
        super().__init__(path, "w+")

    def check(self) -> None:
        if self.failure is not None:
            raise self.failure

    def _attempt(self, write: Callable[[], Any]) -> None:
        if self.failure is None:
            try:
                write()
            except OSError as error:
                self.failure = error

    def write(self, data: Any) -> int:
        left = memoryview(data).cast("B")
        size = len(left)

        def write_all() -> None:
            nonlocal left
            while left:
                left = left[io.FileIO.write(self, left) :]

        self._attempt(write_all)
        return size

    def truncate(self, size: int | None = None) -> int:
        self._attempt(lambda: io.FileIO.truncate(self, size))
        return size or 0

    def readinto(self, buffer: Any) -> int:
        got = io.FileIO.readinto(self, buffer) or 0
        if self.failure is not None:  # what was not written reads as zeros
            view = memoryview(buffer).cast("B")
            view[got:] = bytes(len(view) - got)
        return got
