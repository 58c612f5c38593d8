"""Statistics of a count file, block by block of cells: in this process, or by the workers of a dask scheduler."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any, TypeVar

import anndata as ad
import h5py
import numpy as np
import scipy.sparse as sp
from anndata.abc import CSRDataset

from lib.data.counts import BLOCK_CELLS, read_rows, selected_blocks

CONNECT_S = 20  # seconds that a scheduler has to answer

T = TypeVar("T")
_client: Any = None  # of the scheduler in use; None: this process does the work


@contextlib.contextmanager
def scheduler(address: str | None) -> Iterator[None]:
    """Let dask workers do the work of this block: `map_blocks`, and all dask arrays.

    Parameters
    ----------
    address
        None: this process; "local": one process per processor of this computer; otherwise the address of a running scheduler, such
        as tcp://node1:8786. Its workers need this project, its packages and the same path of the data.

    Raises
    ------
    ValueError
        If `distributed` is not installed, or no scheduler answers.
    """
    global _client
    if address is None:
        yield
        return
    try:
        from distributed import Client
    except ImportError as error:
        raise ValueError(
            f"DASK_SCHEDULER is {address!r}, but the package distributed is missing: pip install 'dask[distributed]', or set it to none"
        ) from error
    local = {"processes": True, "threads_per_worker": 1, "dashboard_address": None}
    try:
        client = Client(**local) if address == "local" else Client(address, timeout=CONNECT_S)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"DASK_SCHEDULER is {address!r}, but no dask scheduler answers there ({error}); start one with dask scheduler, "
            "or set it to local or none"
        ) from error
    with client:
        _client = client
        try:
            yield
        finally:
            _client = None


def map_blocks(
    function: Callable[[Any, sp.csr_matrix, np.ndarray], T], shared: Any, adata: ad.AnnData, rows: np.ndarray
) -> Iterator[tuple[T, slice]]:
    """Apply a function to blocks of cells, in order.

    Parameters
    ----------
    function
        Of `shared`, the counts of a block of cells, and their rows in the file; importable from lib, so that workers know it.
    shared
        The same for all blocks.
    adata
        Count file, or cells in memory.
    rows
        Its cells that are used, ascending.

    Yields
    ------
    The result of a block, and its places in `rows`.
    """
    if _client is None or not isinstance(adata.X, CSRDataset):
        for counts, places in selected_blocks(adata.X, rows):
            yield function(shared, counts, rows[places]), places
        return
    starts = range(0, adata.n_obs, BLOCK_CELLS)
    bounds = np.searchsorted(rows, [*starts, adata.n_obs])
    parts = [slice(int(a), int(b)) for a, b in pairwise(bounds)]
    path = adata.X.group.file.filename
    common = _client.scatter((function, shared, path), broadcast=True, hash=False)
    futures = _client.map(_of_block, [rows[part] for part in parts], starts, common=common, pure=False)
    for future, part in zip(futures, parts):
        yield future.result(), part
        future.release()


def _of_block(rows: np.ndarray, start: int, common: tuple[Callable[..., T], Any, str]) -> T:
    function, shared, path = common
    counts = _open(path)
    return function(
        shared, read_rows(counts, slice(start, min(start + BLOCK_CELLS, counts.shape[0])))[rows - start], rows
    )


@functools.lru_cache(maxsize=2)
def _open(path: str) -> CSRDataset:
    """The counts of a file, opened once in each worker."""
    return ad.io.sparse_dataset(h5py.File(path)["X"])


def quality(adata: ad.AnnData, mitochondrial: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Counts, detected genes and percentage of mitochondrial counts (genes of a mask) of each cell."""
    values = np.empty((3, adata.n_obs))
    for of_block, places in map_blocks(_quality, mitochondrial.astype(np.float32), adata, np.arange(adata.n_obs)):
        values[:, places] = of_block
    return values[0], values[1], values[2]


def _quality(mitochondrial: np.ndarray, counts: sp.csr_matrix, _: np.ndarray) -> np.ndarray:
    n_counts = np.asarray(counts.sum(axis=1), dtype=np.float64).ravel()
    return np.stack([n_counts, np.diff(counts.indptr), 100 * (counts @ mitochondrial) / np.maximum(n_counts, 1)])


def n_cells_of_genes(adata: ad.AnnData, rows: np.ndarray) -> np.ndarray:
    """Number of these cells in which each gene is detected."""
    n_cells = np.zeros(adata.n_vars, dtype=np.int64)
    for of_block, _ in map_blocks(_n_cells_of_genes, None, adata, rows):
        n_cells += of_block
    return n_cells


def _n_cells_of_genes(_: None, counts: sp.csr_matrix, __: np.ndarray) -> np.ndarray:
    return np.bincount(counts.indices, minlength=counts.shape[1])


def n_genes_of_cells(adata: ad.AnnData, rows: np.ndarray, genes: np.ndarray) -> np.ndarray:
    """Number of these genes (a mask) that are detected in each of these cells."""
    return np.concatenate([n_genes for n_genes, _ in map_blocks(_n_genes_of_cells, genes, adata, rows)])


def _n_genes_of_cells(genes: np.ndarray, counts: sp.csr_matrix, _: np.ndarray) -> np.ndarray:
    return np.diff(counts[:, genes].indptr)
