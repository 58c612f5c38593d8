"""Pseudo-bulk samples: mixtures of single cells, so that their cell-type proportions are known.

A mixing matrix (sparse, mixtures x cells) says how often each cell is in each mixture; times counts, it gives those of the mixtures.
"""

import itertools
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp
from anndata.abc import CSRDataset
from tqdm import tqdm

from lib.data.counts import n_entries, read_counts, read_h5ad, row_blocks
from lib.run import check_same_split, reading, require

STAGE = "_2_make_pseudobulk.py"
BLOCK = 250  # mixtures per thread and random stream: 250 x 16,000 genes are 16 MB, and 32 MB more as a sparse matrix
MIXED_BYTES = 256_000_000  # of the mixtures for which counts on disk are read once
BAND = 16_384  # cells on disk read at a time: 100-200 MB
ROWS_AT_ONCE = 500  # mixtures given to a reader at a time


def largest_remainder(proportions: np.ndarray, totals: np.ndarray | int) -> np.ndarray:
    """Whole numbers (samples x cell types) in these proportions, with exactly these row sums: Hamilton's method."""
    quotas = proportions * np.reshape(totals, (-1, 1))
    counts = np.floor(quotas + 1e-9).astype(np.int64)
    missing = totals - counts.sum(axis=1)
    rank = np.argsort(np.argsort(-(quotas - counts), axis=1, kind="stable"), axis=1)
    return counts + (rank < missing[:, None])


def sample_proportions(
    n_samples: int, composition: np.ndarray, shares: dict[str, float], rng: np.random.Generator
) -> np.ndarray:
    """Sample proportions, samples x cell types, in four ways, so that a network does not learn a single pattern.

    composition: (n_cell_types,) proportions of the reference cells. shares: of the samples that are "sparse" (half of the types are
    absent), "rare" (half of the types make up a few percent), or "near" (close to `composition`); the others are uniform.
    """
    n_types = len(composition)
    proportions = rng.dirichlet(np.ones(n_types), n_samples)
    edges = (np.cumsum([shares["sparse"], shares["rare"], shares["near"]]) * n_samples).round().astype(int)
    sparse, rare, near = (slice(a, b) for a, b in itertools.pairwise([0, *edges]))
    subset = rng.random((n_samples, n_types)) < 0.5
    # at least one type is neither absent nor rare
    subset[np.arange(n_samples), rng.integers(0, n_types, n_samples)] = False
    proportions[sparse] = np.where(subset[sparse], 0, proportions[sparse])
    proportions[rare] = np.where(subset[rare], proportions[rare] * 0.05, proportions[rare])
    proportions[near] = rng.dirichlet(20 * composition + 1e-3, edges[2] - edges[1])
    return rng.permutation(proportions / proportions.sum(axis=1, keepdims=True))


def sample_cells_per_type(
    n_samples: int, cells_per_sample: int, composition: np.ndarray, shares: dict[str, float], rng: np.random.Generator
) -> np.ndarray:
    """Numbers of cells, samples x cell types, in proportions of `sample_proportions`; 0 where `composition` is 0."""
    present = composition > 0
    proportions = np.zeros((n_samples, len(composition)))
    proportions[:, present] = sample_proportions(n_samples, composition[present], shares, rng)
    return largest_remainder(proportions, cells_per_sample)


def sample_cells(
    cells_per_type: np.ndarray, cell_type_idx: np.ndarray, rng: np.random.Generator, min_distinct: int | None = None
) -> sp.csr_matrix:
    """Sample the cells of each mixture, with replacement: the mixing matrix, samples x cells, float32.

    cells_per_type: samples x cell types. cell_type_idx: type of each cell; -1 for a cell that no mixture may hold. min_distinct: sample
    from a random subset of a type's cells, a new one for each mixture, of a log-uniform size from `min_distinct` to about all (None:
    from all), so that a type's mean profile varies as it does between donors, and a network cannot memorise single cells. ValueError
    for a type that has no cells.
    """
    n_samples = len(cells_per_type)
    rows, columns = [], []
    for k in np.flatnonzero(cells_per_type.any(axis=0)):
        pool = np.flatnonzero(cell_type_idx == k)
        if len(pool) == 0:
            raise ValueError(f"cell type number {k} has no cells to mix, expected at least one")
        row = np.arange(n_samples).repeat(cells_per_type[:, k])
        if min_distinct is None or len(pool) <= min_distinct:
            sampled = rng.integers(0, len(pool), len(row))
        else:
            largest = max(min_distinct, min(len(pool), cells_per_type.max()))
            subset = rng.integers(0, len(pool), (n_samples, largest))
            size = np.exp(rng.uniform(np.log(min_distinct), np.log(largest + 1), n_samples)).astype(np.int64)
            sampled = subset[row, (rng.random(len(row)) * size[row]).astype(np.int64)]
        rows.append(row)
        columns.append(pool[sampled])
    entries = np.concatenate(rows), np.concatenate(columns)
    return sp.csr_matrix((np.ones(len(entries[0]), np.float32), entries), shape=(n_samples, len(cell_type_idx)))


def weighted(mixing: sp.csr_matrix, cell_type_idx: np.ndarray, weight: np.ndarray) -> sp.csr_matrix:
    """The mixing matrix with every cell times the weight of its type (1 for a cell of unknown type)."""
    return (mixing @ sp.diags(np.append(weight, 1.0)[cell_type_idx].astype(np.float32))).tocsr()


def mix(mixing: sp.csr_matrix, counts: sp.csr_matrix | CSRDataset, genes: np.ndarray | None = None) -> np.ndarray:
    """mixing @ counts[:, genes]: mixtures x genes, float32. Counts on disk are read once, in bands of cells."""
    mixed = np.zeros((mixing.shape[0], counts.shape[1] if genes is None else len(genes)), np.float32)
    parts = [slice(start, start + BLOCK) for start in range(0, mixing.shape[0], BLOCK)]
    by_cell = [mixing[part].tocsc() for part in parts]

    def add(part: slice, weights: sp.csc_matrix, cells: slice, band: sp.csr_matrix) -> None:
        mixed[part] += (weights[:, cells].tocsr() @ band).toarray()

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for cells, band in row_blocks(counts, counts.shape[0] if sp.issparse(counts) else BAND):
            band = band if genes is None else band[:, genes]
            list(pool.map(add, parts, by_cell, itertools.repeat(cells), itertools.repeat(band)))
    return mixed


def mixing_blocks(
    cells_per_type: np.ndarray, cell_type_idx: np.ndarray, seed: int, min_distinct: int | None, weight: np.ndarray
) -> Iterator[sp.csr_matrix]:
    """Yield the matrices of `sample_cells`, `weighted`, `BLOCK` mixtures at a time, each from a random stream of its own."""
    starts = range(0, len(cells_per_type), BLOCK)
    for start, stream in zip(starts, np.random.SeedSequence(seed).spawn(len(starts))):
        cells = cells_per_type[start : start + BLOCK]
        mixing = sample_cells(cells, cell_type_idx, np.random.default_rng(stream), min_distinct)
        yield weighted(mixing, cell_type_idx, weight)


def tpm(counts: np.ndarray, gene_length_bp: np.ndarray | None = None) -> np.ndarray:
    """Transcripts per million, samples x genes: (count / length), scaled so that each sample sums to 1,000,000.

    Without lengths: counts per million, right for UMI counts, which count molecules of any length once.
    """
    rate = np.asarray(counts, dtype=np.float64) / (1 if gene_length_bp is None else gene_length_bp)
    return rate * (1e6 / sample_totals(rate))


def sample_totals(values: np.ndarray) -> np.ndarray:
    """Sum of each sample over the given genes, samples x 1; ValueError for a sample without expression in these genes."""
    total = values.sum(axis=1, keepdims=True)
    if (total <= 0).any():
        n_empty, n_genes = np.sum(total <= 0), values.shape[1]
        raise ValueError(f"{n_empty} of {len(values)} bulk samples have no expression in the {n_genes:,} genes used")
    return total


class Recipe(NamedTuple):
    """How the mixtures of train cells are made: the same ones whenever and wherever they are made."""

    cells_per_sample: int
    fit_types: np.ndarray  # (n_train_cells,) type of each cell in the mixtures to train on; -1: in none
    validation_types: np.ndarray  # the same for the mixtures of held-out cells
    seed: int
    min_distinct: int  # as in `sample_cells`; 0: none
    weight: np.ndarray  # of the cells of each type, as in `weighted`


def train_mixtures(
    mixtures: ad.AnnData, train: ad.AnnData | None, genes: np.ndarray | None = None, memory_gb: float = 0.0
) -> Iterator[tuple[slice, np.ndarray]]:
    """Yield rows and counts of the mixtures, `ROWS_AT_ONCE` at a time, of some genes (None: all).

    They are read from the file of stage 2 if it holds them, or made of the train cells, which may take `memory_gb` in memory.
    """
    if "X" in mixtures.file if mixtures.isbacked else mixtures.X is not None:
        blocks = _read(mixtures, genes)
    else:
        assert train is not None
        blocks = _make(mixtures, train, genes, memory_gb)
    start = 0
    with tqdm(total=mixtures.n_obs, desc="mixtures of train cells", unit="", leave=False) as progress:
        for block in blocks:
            yield slice(start, start + len(block)), block
            start += len(block)
            progress.update(len(block))


def _read(mixtures: ad.AnnData, genes: np.ndarray | None) -> Iterator[np.ndarray]:
    for start in range(0, mixtures.n_obs, ROWS_AT_ONCE):
        block = sp.csr_matrix(mixtures.X[start : start + ROWS_AT_ONCE])
        yield (block if genes is None else block[:, genes]).toarray()


def _make(mixtures: ad.AnnData, train: ad.AnnData, genes: np.ndarray | None, memory_gb: float) -> Iterator[np.ndarray]:
    recipe, is_fit = Recipe(**mixtures.uns["recipe"]), is_for_fit(mixtures)
    counts = train.X[:] if n_entries(train.X) * 8 <= memory_gb * 1e9 else train.X
    cells = np.rint(mixtures.obsm["proportions"] * recipe.cells_per_sample).astype(np.int64)
    seed, distinct = int(recipe.seed), int(recipe.min_distinct) or None
    fit = mixing_blocks(cells[is_fit], recipe.fit_types, seed, distinct, recipe.weight)
    validation = mixing_blocks(cells[~is_fit], recipe.validation_types, seed + 1, None, recipe.weight)
    blocks, n_genes = itertools.chain(fit, validation), train.n_vars if genes is None else len(genes)
    while some := list(itertools.islice(blocks, max(1, MIXED_BYTES // (4 * BLOCK * n_genes)))):
        mixed = mix(sp.vstack(some, format="csr"), counts, genes)
        yield from np.split(mixed, range(ROWS_AT_ONCE, len(mixed), ROWS_AT_ONCE))


def read_train_mixtures(data_folder: Path) -> tuple[ad.AnnData, ad.AnnData]:
    """Mixtures of train cells, and the train cells, both with counts on disk; ValueError if their splits differ.

    Of the mixtures: obsm["proportions"] (columns: uns["cell_types"]), obs["role"] ("fit" or "validation"), uns["recipe"] (`Recipe`),
    X if stage 2 wrote it; with gene lengths var["gene_length_bp"], with mRNA contents uns["rna_per_cell"].
    """
    path, train_path = data_folder / "pseudobulk_train.h5ad", data_folder / "train.h5ad"
    mixtures = read_h5ad(require(path, STAGE), backed="r")
    if set(mixtures.uns.get("recipe", ())) != set(Recipe._fields):
        raise ValueError(f"{path} was not written by {STAGE}, or by an older one: it lacks the recipe; run it again")
    train = read_counts(train_path, "_1_split_train_test.py")
    check_same_split(mixtures.uns["split_id"], path, train.uns["split_id"], train_path, STAGE)
    return mixtures, train


def is_for_fit(mixtures: ad.AnnData) -> np.ndarray:
    """Mask of the mixtures to train on; the others consist of held-out train cells."""
    return (mixtures.obs["role"] == "fit").to_numpy()


def gene_lengths(mixtures: ad.AnnData, genes: np.ndarray | slice = slice(None)) -> np.ndarray | None:
    """Lengths (bp) of some genes by which bulk profiles are divided, NaN where unknown; None if they are not divided."""
    lengths = mixtures.var.get("gene_length_bp")
    return None if lengths is None else lengths.to_numpy()[genes]


def require_test_mixtures(data_folder: Path) -> list[Path]:
    """Tables of TPM and proportions of the mixtures of test cells; FileNotFoundError if one is missing."""
    return [require(data_folder / f"pseudobulk_test_{name}.csv", STAGE) for name in ("tpm", "proportions")]


def read_test_mixtures(
    data_folder: Path, split_id: str, by_length: bool, by_content: bool
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """TPM and true proportions of the mixtures of test cells; ValueError if they have another split or scale."""
    expected, tables = sample_header(split_id, by_length, by_content), []
    for path in require_test_mixtures(data_folder):
        with reading(path, "a table of numbers"):
            tables.append(pd.read_csv(path, index_col=0).astype(np.float64))
        if tables[-1].index.name != expected:
            header = f"its header is {tables[-1].index.name!r}, expected {expected!r}"
            raise ValueError(f"{path} does not belong to models/sctape.pt: {header}; run {STAGE} and stage 4 again")
    return tables[0], tables[1]


def sample_header(split_id: str, by_length: bool, by_content: bool) -> str:
    """Header of the sample column in the tables of test mixtures, which says what they must share with models/sctape.pt."""
    return f"sample of split {split_id}" + " by gene length" * by_length + " with mRNA contents" * by_content
