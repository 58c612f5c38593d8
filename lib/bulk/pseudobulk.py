"""Bulk samples made of single cells, whose composition is therefore known.

A mixture is a row of a sparse matrix, mixtures x cells, that says how often each cell is in it; the mixtures' counts are
that matrix times the cells' counts. Nothing loops over cells.
"""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
import scipy.sparse as sp
from anndata.abc import CSRDataset

from lib.data.counts import row_blocks
from lib.files import require

BLOCK = (
    250  # mixtures computed at a time and thread: 250 x 16,000 genes are 16 MB, and 32 MB more while they are sparse
)
BLOCKS_AT_ONCE = 8  # blocks for which counts on disk are read once
BAND = 16_384  # cells on disk read at a time: 100-200 MB


def largest_remainder(proportions: np.ndarray, totals: np.ndarray | int) -> np.ndarray:
    """Whole numbers in these proportions whose row sums are exactly `totals` (Hamilton's method).

    Parameters
    ----------
    proportions
        Samples x cell types, non-negative, rows sum to 1.
    totals
        Number of cells of each sample, or one for all.
    """
    quotas = proportions * np.reshape(totals, (-1, 1))
    counts = np.floor(quotas + 1e-9).astype(np.int64)
    missing = np.broadcast_to(totals, len(counts)) - counts.sum(axis=1)
    rank = np.argsort(np.argsort(-(quotas - counts), axis=1, kind="stable"), axis=1)
    return counts + (rank < missing[:, None])


def sample_proportions(
    n_samples: int, composition: np.ndarray, shares: dict[str, float], rng: np.random.Generator
) -> np.ndarray:
    """Compositions to mix, drawn in four ways so that no one pattern is learned.

    Parameters
    ----------
    composition
        Of the reference cells, one number a type, summing to 1.
    shares
        What part of the samples is drawn "sparse" (a random half of the types is absent), "rare" (a random half of the
        types makes up 5 % at most) or "near" (the reference's own composition, varied); the rest is uniform on the simplex.

    Returns
    -------
    Samples x cell types, rows sum to 1.
    """
    n_types = len(composition)
    proportions = rng.dirichlet(np.ones(n_types), n_samples)
    edges = (np.cumsum([shares["sparse"], shares["rare"], shares["near"]]) * n_samples).round().astype(int)
    sparse, rare, near = (slice(a, b) for a, b in zip([0, *edges], edges))
    subset = rng.random((n_samples, n_types)) < 0.5
    subset[np.arange(n_samples), rng.integers(0, n_types, n_samples)] = (
        False  # at least one type is neither absent nor rare
    )
    proportions[sparse] = np.where(subset[sparse], 0, proportions[sparse])
    proportions[rare] = np.where(subset[rare], proportions[rare] * 0.05, proportions[rare])
    proportions[near] = rng.dirichlet(20 * composition + 1e-3, edges[2] - edges[1])
    return rng.permutation(proportions / proportions.sum(axis=1, keepdims=True))


def sample_cells(
    cells_per_type: np.ndarray, cell_type_idx: np.ndarray, rng: np.random.Generator, min_distinct: int | None = None
) -> sp.csr_matrix:
    """A mixing matrix: cells of each type drawn with replacement.

    Parameters
    ----------
    cells_per_type
        Samples x cell types, whole numbers.
    cell_type_idx
        Type of each cell; -1 for a cell that is in no mixture.
    min_distinct
        None draws from all cells of a type. A number draws, for every mixture and type anew, from a random handful of its
        cells: about this many to about all, log-uniform (the handful itself is drawn with replacement). So a type's profile varies from mixture to mixture as it does from
        donor to donor, and a network cannot learn the cells by heart.

    Returns
    -------
    Samples x cells, float32; each row sums to the sample's number of cells.

    Raises
    ------
    ValueError
        If a type is asked for that has no cells.
    """
    n_samples = len(cells_per_type)
    rows, columns = [], []
    for k in range(cells_per_type.shape[1]):
        pool = np.flatnonzero(cell_type_idx == k)
        n_draws = cells_per_type[:, k]
        if len(pool) == 0 and n_draws.any():
            raise ValueError(f"cell type number {k} has no cells to mix, expected at least one")
        if n_draws.any():
            row = np.repeat(np.arange(n_samples), n_draws)
            if min_distinct is None or len(pool) <= min_distinct:
                drawn = rng.integers(0, len(pool), len(row))
            else:
                most = max(min_distinct, min(len(pool), cells_per_type.max()))
                handful = rng.integers(0, len(pool), (n_samples, most))
                size = np.exp(rng.uniform(np.log(min_distinct), np.log(most + 1), n_samples)).astype(np.int64)
                drawn = handful[row, (rng.random(len(row)) * size[row]).astype(np.int64)]
            rows.append(row)
            columns.append(pool[drawn])
    rows, columns = np.concatenate(rows), np.concatenate(columns)
    return sp.csr_matrix((np.ones(len(rows), np.float32), (rows, columns)), shape=(n_samples, len(cell_type_idx)))


def mix(mixing: sp.csr_matrix, counts: sp.csr_matrix | CSRDataset) -> np.ndarray:
    """mixing @ counts: mixtures x genes, float32. The counts may be on disk; they are read once, in bands."""
    mixed = np.zeros((mixing.shape[0], counts.shape[1]), np.float32)
    parts = [slice(start, start + BLOCK) for start in range(0, mixing.shape[0], BLOCK)]
    by_cell = [mixing[part].tocsc() for part in parts]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for cells, band in row_blocks(counts, counts.shape[0] if sp.issparse(counts) else BAND):

            def add(part: slice, weights: sp.csc_matrix) -> None:
                mixed[part] += (weights[:, cells].tocsr() @ band).toarray()

            list(pool.map(add, parts, by_cell))
    return mixed


def simulate(
    cells_per_type: np.ndarray,
    cell_type_idx: np.ndarray,
    counts: sp.csr_matrix | CSRDataset,
    seed: int,
    min_distinct: int | None = None,
) -> Iterator[np.ndarray]:
    """Pseudo-bulk counts of random mixtures, some at a time: samples x genes, float32.

    Each block of mixtures has a random stream of its own, so the result does not depend on how many are made at once.
    """
    starts = range(0, len(cells_per_type), BLOCK)
    streams = [np.random.default_rng(stream) for stream in np.random.SeedSequence(seed).spawn(len(starts))]
    blocks = [(cells_per_type[start : start + BLOCK], stream) for start, stream in zip(starts, streams)]
    for first in range(0, len(blocks), BLOCKS_AT_ONCE):
        drawn = [
            sample_cells(cells, cell_type_idx, rng, min_distinct)
            for cells, rng in blocks[first : first + BLOCKS_AT_ONCE]
        ]
        yield mix(sp.vstack(drawn, format="csr"), counts)


def tpm(counts: np.ndarray, gene_length_bp: np.ndarray | None = None) -> np.ndarray:
    """Transcripts per million: (count / length) scaled so that each sample sums to 1,000,000.

    Parameters
    ----------
    counts
        Samples x genes.
    gene_length_bp
        One length a gene, in base pairs. None for UMI counts, which count molecules whatever their length: counts per million.

    Raises
    ------
    ValueError
        For a sample without counts.
    """
    rate = np.asarray(counts, dtype=np.float64)
    if gene_length_bp is not None:
        rate = rate / gene_length_bp
    total = rate.sum(axis=1, keepdims=True)
    if (total <= 0).any():
        raise ValueError(
            f"{np.sum(total <= 0)} of {len(total)} bulk samples have no counts in these genes; expected at least one each"
        )
    return rate * (1e6 / total)


def read_test_mixtures(data_folder: Path, split_id: str, by_length: bool) -> tuple[pd.DataFrame, pd.DataFrame]:
    """TPM and true proportions of the mixtures of test cells (stage 2); refused if they are of another split or scale.

    The header of the sample column names the split, and whether TPM were divided by gene length: the tables know where they
    belong. `by_length` is what the network was trained on.
    """
    tables = []
    for name in ("tpm", "proportions"):
        path = require(data_folder / f"pseudobulk_test_{name}.csv", "_2_make_pseudobulk.py")
        table = pd.read_csv(path, index_col=0)
        expected = sample_header(split_id, by_length)
        if table.index.name != expected:
            raise ValueError(
                f"{path} does not belong to data/test.h5ad and models/sctape.pt: it is headed {table.index.name!r}, expected {expected!r}; "
                "run _2_make_pseudobulk.py and _4_train_sctape.py again"
            )
        tables.append(table)
    return tuple(tables)


def sample_header(split_id: str, by_length: bool) -> str:
    return f"sample of split {split_id}" + (" by gene length" if by_length else "")
