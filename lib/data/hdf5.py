"""HDF5 files (.h5ad, 10x .h5): their structure is checked before they are read, and a full disk does not crash HDF5."""

import contextlib
import io
import json
import multiprocessing
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import anndata as ad
import h5py
import numpy as np

from lib import records, runs
from lib.files import Unusable, check_unpacked, reading, replacing

ENTRIES_AT_ONCE = 1 << 22  # indices in memory at a time
CHECK_S = 60  # seconds that reading a user's file may take, and more for large files
CHECK_BYTES_PER_S = 5e6


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


def check_structure(path: Path, needs: tuple[str, ...] = ()) -> None:
    """Check what the readers of HDF5 files rely on, without holding more than a block of it.

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
                _check_sparse(item, path)


def check_foreign(path: Path, needs: tuple[str, ...] = ()) -> None:
    """Check the structure of a user's file, and read all of it once, in a process of its own.

    A damaged file can make HDF5 crash, or loop without end.

    Raises
    ------
    Unusable
        As `check_structure`, and if that process crashes or does not end in time.
    """
    with reading(path, "an HDF5 file"):
        limit_s = CHECK_S + path.stat().st_size / CHECK_BYTES_PER_S
        if "fork" not in multiprocessing.get_all_start_methods():
            check_structure(path, needs)
            return
        context = multiprocessing.get_context("fork")
        receiver, sender = context.Pipe(duplex=False)
        child = context.Process(target=_check_and_tell, args=(path, needs, sender), daemon=True)
        child.start()
        sender.close()
        message = f"{path} is damaged: HDF5 does not finish reading it in {limit_s:.0f} s: save or download it again"
        try:
            if receiver.poll(limit_s):
                message = receiver.recv()
        except EOFError:
            message = f"{path} is damaged: HDF5 crashes when it reads it: save or download it again"
        finally:
            child.kill()
            child.join()
        if message:
            raise Unusable(message)


def _check_and_tell(path: Path, needs: tuple[str, ...], sender: Any) -> None:
    """Send "" if a file can be read, else what is wrong with it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        check_structure(path, needs)
        with reading(path, "an HDF5 file"), h5py.File(path) as file:
            file.visititems(_read_item)
        sender.send("")
    except (Unusable, MemoryError) as error:
        sender.send(str(error) or f"{path} takes more memory than there is")


def _read_item(_: str, item: h5py.Group | h5py.Dataset) -> None:
    """Read all attributes of an item, and a dataset block by block."""
    for name in item.attrs:
        item.attrs[name]
    if isinstance(item, h5py.Dataset) and item.shape:
        rows = max(1, ENTRIES_AT_ONCE // max(1, item.size // max(1, len(item))))
        for start in range(0, len(item), rows):
            item[start : start + rows]


def _check_sparse(group: h5py.Group, path: Path) -> None:
    """Check one CSR or CSC matrix: its index pointers rise from 0 to the number of entries, its indices are those of its columns (rows)."""
    shape = group["shape"][()] if "shape" in group else group.attrs.get("shape", group.attrs.get("h5sparse_shape"))
    data, indices, indptr = group["data"], group["indices"], group["indptr"][()]
    kind = group.attrs.get("encoding-type", group.attrs.get("h5sparse_format", "csc"))  # 10x: genes x cells, by cells
    is_csr = (kind.decode() if isinstance(kind, bytes) else str(kind)).startswith("csr")
    if shape is None or len(shape) != 2:
        raise Unusable(
            f"{path}: the sparse matrix {group.name} has no shape, expected two numbers: save the file again"
        )
    n_major, n_minor = (int(n) for n in (shape if is_csr else shape[::-1]))
    problem = None
    if data.shape != indices.shape or len(data.shape) != 1:
        problem = f"{data.shape} values and {indices.shape} indices, expected as many of both"
    elif (
        len(indptr) != n_major + 1
        or indptr[0] != 0
        or indptr[-1] != len(data)
        or (np.diff(indptr.astype(np.int64)) < 0).any()
    ):
        pointers = f"{len(indptr):,} index pointers from {indptr[0]:,} to {indptr[-1]:,}"
        problem = f"{pointers}, expected {n_major + 1:,} that rise from 0 to {len(data):,}"
    else:
        for start in range(0, len(indices), ENTRIES_AT_ONCE):
            block = indices[start : start + ENTRIES_AT_ONCE]
            if block.min() < 0 or block.max() >= n_minor:
                problem = f"an index {block.min() if block.min() < 0 else block.max():,}, expected 0 to {n_minor - 1:,}"
                break
    if problem is not None:
        raise Unusable(
            f"{path} is damaged: its sparse matrix {group.name} has {problem}: save or download the file again"
        )


def write_h5ad(adata: ad.AnnData, path: Path) -> None:
    """Write an AnnData that is in memory; uns["made_by"] says which run did it (`runs.description`, as JSON)."""
    with replacing(path) as temporary, new_hdf5(temporary) as (file, _):
        write_described(adata, file)


def write_described(adata: ad.AnnData, file: h5py.File) -> None:
    """Write an AnnData and its uns["made_by"] to an open file; columns of text become categories, as in AnnData.write_h5ad."""
    if runs.current() is not None:
        adata.uns["made_by"] = json.dumps(runs.description(), default=str)
    adata.strings_to_categoricals()
    ad.io.write_elem(file, "/", adata)


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
