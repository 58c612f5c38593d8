"""Principal components of standardised genes, fitted block by block and inverted: what Generative genomics models and classifies.

    c = ((x - mean) / scale) @ vectors,   x = log(1 + counts per 10,000); mean and scale (standard deviation) of each gene

The components are fitted to one block of cells after another (sklearn's IncrementalPCA), so only one block is dense at a time.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import numpy as np
import scipy.sparse as sp
from sklearn.decomposition import IncrementalPCA

from lib.data.counts import log_normalize

TARGET = 1e4  # counts per cell to which expression is scaled before log1p
BLOCK_CELLS = 1024  # cells in one step, at least, dense: 50-100 MB
MIN_SCALE = 1e-3  # a gene that hardly varies is divided by this at least


class Components(NamedTuple):
    """Principal components of the genes; all arrays float32."""

    mean: np.ndarray  # (n_genes,)
    scale: np.ndarray  # (n_genes,)
    vectors: np.ndarray  # (n_genes, n_components), orthonormal

    def of(self, counts: sp.csr_matrix) -> np.ndarray:
        """Components of cells, (n_cells, n_components), from raw counts, n_cells x n_genes."""
        weights = self.vectors / self.scale[:, None]
        return np.asarray(log_normalize(counts, TARGET) @ weights) - self.mean @ weights


def n_components(wanted: int, n_cells: int, n_genes: int) -> int:
    """As many components as asked for, at most as many as cells or genes; a message says so."""
    possible = min(wanted, n_cells, n_genes)
    if possible < wanted:
        print(f"{possible:,} principal components instead of {wanted:,}: {n_cells:,} cells, {n_genes:,} genes")
    return possible


def fit_components(blocks: Callable[[], Iterable[sp.csr_matrix]], n: int) -> Components:
    """Fit `n` components to cells.

    Parameters
    ----------
    blocks
        Gives the raw counts of the cells, block by block; called twice.
    n
        At most as many as there are cells and genes (`n_components`).
    """
    mean, scale = _mean_and_scale(blocks())
    pca = IncrementalPCA(n)
    for cells in _dense_blocks(blocks(), max(BLOCK_CELLS, n)):
        pca.partial_fit((cells - mean) / scale)
    return Components(mean, scale, pca.components_.T.astype(np.float32))


def _mean_and_scale(blocks: Iterable[sp.csr_matrix]) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of each gene over all cells, of log(1 + counts per 10,000)."""
    total = squares = np.zeros(())
    n_cells = 0
    for counts in blocks:
        x = log_normalize(counts, TARGET).astype(np.float64)
        total = total + np.asarray(x.sum(axis=0)).ravel()
        squares = squares + np.asarray(x.power(2).sum(axis=0)).ravel()
        n_cells += x.shape[0]
    mean = total / n_cells
    scale = np.sqrt(np.maximum(squares / n_cells - mean**2, 0))
    return mean.astype(np.float32), np.maximum(scale, MIN_SCALE).astype(np.float32)


def _dense_blocks(blocks: Iterable[sp.csr_matrix], size: int) -> Iterator[np.ndarray]:
    """The cells as log(1 + counts per 10,000), dense, in blocks of at least `size` cells (if there are so many)."""
    rest: sp.csr_matrix | None = None
    for counts in blocks:
        x = log_normalize(counts, TARGET)
        rest = x if rest is None else sp.vstack([rest, x], format="csr")
        while rest.shape[0] >= 2 * size:
            yield rest[:size].toarray()
            rest = rest[size:]
    assert rest is not None
    yield rest.toarray()
