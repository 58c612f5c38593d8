"""Doublet scores of all cells against simulated doublets of some of them, so that time and memory stay in proportion to the cells.

The method is Scrublet's (Wolock, Lopez and Klein, Cell Systems 2019), with scanpy's defaults: the share of simulated doublets
among the nearest neighbours of a cell, and the minimum between the two modes of the simulated doublets' scores as threshold.
Scrublet compares all cells with twice as many doublets; here, above `n_reference` cells, all are compared with the same reference
cells and with twice as many doublets of these.
"""

from typing import NamedTuple

import anndata as ad
import numpy as np
import scanpy as sc
import scipy.sparse as sp
from skimage.filters import threshold_minimum
from sklearn.decomposition import PCA
from sklearn.neighbors import NearestNeighbors

from lib.data.blockwise import map_blocks
from lib.data.counts import row_blocks, select_cells

DOUBLETS_PER_CELL = 2  # simulated, for each reference cell
EXPECTED_RATE = 0.05  # of doublets among the cells; it scales the scores and their threshold alike
N_PCS = 30
MIN_CELLS = 3  # reference cells that hold a gene


class DoubletReference(NamedTuple):
    """Reference cells and doublets of them, in principal components of standardised counts per million."""

    rows: np.ndarray  # of the reference cells in the file, ascending
    genes: np.ndarray  # variable genes, indices
    mean: np.ndarray
    std: np.ndarray
    pca: PCA
    neighbours: NearestNeighbors  # of reference cells, then doublets
    is_doublet: np.ndarray

    def components(self, counts: sp.csr_matrix) -> np.ndarray:
        """Principal components of cells, (n_cells, N_PCS), from their counts of the variable genes."""
        return self.pca.transform((per_million(counts).toarray() - self.mean) / self.std)

    def score(self, pcs: np.ndarray, itself: str) -> np.ndarray:
        """Posterior of being a doublet: Wolock et al., equation 3, by the nearest k - 1 others of the reference.

        Parameters
        ----------
        itself
            "cell" or "doublet" of the reference, or "absent" from it.
        """
        n_doublets, n_cells = self.is_doublet.sum(), np.sum(~self.is_doublet)
        k = round(round(0.5 * np.sqrt(n_cells)) * (1 + n_doublets / n_cells))
        nearest = self.neighbours.kneighbors(pcs, k - (itself == "absent"), return_distance=False)
        q = (self.is_doublet[nearest].sum(axis=1) - (itself == "doublet") + 1) / (k + 2)
        rho, r = EXPECTED_RATE, n_doublets / n_cells
        return q * rho / r / (1 - rho - q * (1 - rho - rho / r))


def per_million(counts: sp.csr_matrix) -> sp.csr_matrix:
    """Counts per million of the cell's counts in these genes."""
    total = np.asarray(counts.sum(axis=1)).ravel()
    return sp.csr_matrix(sp.diags_array((1e6 / np.maximum(total, 1)).astype(np.float32)) @ counts)


def doublet_scores(adata: ad.AnnData, rows: np.ndarray, n_reference: int, seed: int) -> tuple[np.ndarray, float | None]:
    """Doublet score of each of these cells, and the threshold above which cells are doublets.

    Parameters
    ----------
    adata
        Count file.
    rows
        Its cells that are compared, ascending.
    n_reference
        Number of cells, at random, whose doublets are simulated.

    Returns
    -------
    Scores (n_rows,) and their threshold; None if the scores of simulated doublets have no two modes.
    """
    chosen = rows[np.sort(np.random.default_rng(seed).permutation(len(rows))[:n_reference])]
    reference, simulated = make_reference(select_cells(adata, chosen), chosen, seed)
    scores = np.concatenate([of_block for of_block, _ in map_blocks(_score_block, reference, adata, rows)])
    try:
        return scores, float(threshold_minimum(reference.score(simulated, "doublet")))
    except RuntimeError:
        return scores, None


def _score_block(reference: DoubletReference, counts: sp.csr_matrix, rows: np.ndarray) -> np.ndarray:
    """Scores of a block of cells."""
    scores = np.empty(len(rows))
    inside = np.isin(rows, reference.rows)
    for of_kind, itself in ((inside, "cell"), (~inside, "absent")):
        if of_kind.any():
            scores[of_kind] = reference.score(reference.components(counts[of_kind][:, reference.genes]), itself)
    return scores


def make_reference(cells: ad.AnnData, rows: np.ndarray, seed: int) -> tuple[DoubletReference, np.ndarray]:
    """The reference of these cells, which are these rows of the file, and the principal components of its doublets."""
    counts = cells.X
    common = np.flatnonzero(counts.getnnz(axis=0) >= MIN_CELLS)
    normalised = ad.AnnData(counts[:, common])
    sc.pp.normalize_total(normalised)
    sc.pp.log1p(normalised)
    sc.pp.highly_variable_genes(normalised)
    genes = common[normalised.var["highly_variable"].to_numpy()]
    doublets = sc.pp.scrublet_simulate_doublets(
        ad.AnnData(counts[:, genes]), sim_doublet_ratio=DOUBLETS_PER_CELL, random_seed=seed
    )
    real = per_million(counts[:, genes]).toarray()
    mean, std = real.mean(axis=0), real.std(axis=0, ddof=1)
    std[std == 0] = 1
    n_pcs = min(N_PCS, cells.n_obs // 2, len(genes) - 1)
    pca = PCA(n_pcs, svd_solver="arpack", random_state=seed).fit((real - mean) / std)
    n_cells, simulated = cells.n_obs, sp.csr_matrix(doublets.X)
    is_doublet = np.arange(n_cells + simulated.shape[0]) >= n_cells
    reference = DoubletReference(rows, genes, mean, std, pca, NearestNeighbors(algorithm="brute"), is_doublet)
    of_cells, of_doublets = (
        np.concatenate([reference.components(block) for _, block in row_blocks(part)])
        for part in (counts[:, genes], simulated)
    )
    reference.neighbours.fit(np.concatenate([of_cells, of_doublets]))
    return reference, of_doublets
