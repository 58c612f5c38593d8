"""Pseudo-bulk samples: mixtures of single cells, so that their cell-type proportions are known.

A mixing matrix (sparse, mixtures x cells) says how often each cell is in each mixture. The counts of the mixtures are this
matrix times the counts of the cells, without a loop over cells.
"""

import itertools
import os
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp
from anndata.abc import CSRDataset
from tqdm import tqdm

from lib.data.counts import check_same_split, n_entries, read_counts, row_blocks
from lib.data.hdf5 import new_hdf5, read_h5ad, write_described
from lib.files import reading, replacing, require

BLOCK = 250  # mixtures per thread at a time: 250 x 16,000 genes are 16 MB, and 32 MB more as a sparse matrix
MIXED_BYTES = 256_000_000  # of the mixtures for which counts on disk are read once
BAND = 16_384  # cells on disk read at a time: 100-200 MB
ROWS_AT_ONCE = 500  # mixtures given to a reader at a time
ALL = slice(None)


def largest_remainder(proportions: np.ndarray, totals: np.ndarray | int) -> np.ndarray:
    """Whole numbers in these proportions whose row sums are exactly `totals` (Hamilton's method).

    Parameters
    ----------
    proportions
        Samples x cell types, non-negative, rows sum to 1.
    totals
        Number of cells of each sample, or one number for all samples.
    """
    quotas = proportions * np.reshape(totals, (-1, 1))
    counts = np.floor(quotas + 1e-9).astype(np.int64)
    missing = np.broadcast_to(totals, len(counts)) - counts.sum(axis=1)
    rank = np.argsort(np.argsort(-(quotas - counts), axis=1, kind="stable"), axis=1)
    return counts + (rank < missing[:, None])


def sample_proportions(
    n_samples: int, composition: np.ndarray, shares: dict[str, float], rng: np.random.Generator
) -> np.ndarray:
    """Sample cell-type proportions in four ways, so that a network does not learn a single pattern.

    Parameters
    ----------
    composition
        (n_cell_types,) proportions of the reference cells, summing to 1.
    shares
        Share of the samples that are "sparse" (a random half of the types is absent), "rare" (a random half of the types
        makes up a few percent), or "near" (close to `composition`). The rest is uniform on the simplex.

    Returns
    -------
    Samples x cell types, rows sum to 1.
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
    """Sample the cells of each mixture, with replacement; returns the mixing matrix.

    Parameters
    ----------
    cells_per_type
        Samples x cell types, whole numbers.
    cell_type_idx
        Type of each cell; -1 for a cell that no mixture may hold.
    min_distinct
        None: sample from all cells of a type. A number: sample from a random subset of the type's cells, a new subset for each
        mixture and type. Its size is log-uniform, from `min_distinct` to about all cells (the subset itself is sampled with
        replacement). The mean profile of a type then varies between mixtures as it does between donors, and a network cannot
        memorise single cells.

    Returns
    -------
    Samples x cells, float32; each row sums to the sample's number of cells.

    Raises
    ------
    ValueError
        If a mixture needs a type that has no cells.
    """
    n_samples = len(cells_per_type)
    rows, columns = [], []
    for k in range(cells_per_type.shape[1]):
        pool = np.flatnonzero(cell_type_idx == k)
        n_cells = cells_per_type[:, k]
        if len(pool) == 0 and n_cells.any():
            raise ValueError(f"cell type number {k} has no cells to mix, expected at least one")
        if n_cells.any():
            row = np.repeat(np.arange(n_samples), n_cells)
            if min_distinct is None or len(pool) <= min_distinct:
                sampled = rng.integers(0, len(pool), len(row))
            else:
                largest = max(min_distinct, min(len(pool), cells_per_type.max()))
                subset = rng.integers(0, len(pool), (n_samples, largest))
                size = np.exp(rng.uniform(np.log(min_distinct), np.log(largest + 1), n_samples)).astype(np.int64)
                sampled = subset[row, (rng.random(len(row)) * size[row]).astype(np.int64)]
            rows.append(row)
            columns.append(pool[sampled])
    row_idx, cell_idx = np.concatenate(rows), np.concatenate(columns)
    ones = np.ones(len(row_idx), np.float32)
    return sp.csr_matrix((ones, (row_idx, cell_idx)), shape=(n_samples, len(cell_type_idx)))


def weighted(mixing: sp.csr_matrix, cell_type_idx: np.ndarray, weight: pd.Series | None) -> sp.csr_matrix:
    """The mixing matrix with every cell times the weight of its type (1 for a cell of unknown type); None changes nothing."""
    if weight is None:
        return mixing
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


def simulate(
    cells_per_type: np.ndarray,
    cell_type_idx: np.ndarray,
    counts: sp.csr_matrix | CSRDataset,
    seed: int,
    min_distinct: int | None = None,
    weight: pd.Series | None = None,
    genes: np.ndarray | None = None,
) -> Iterator[np.ndarray]:
    """Yield the counts of random mixtures, several blocks at a time: samples x genes, float32.

    Each block of mixtures has its own random stream, so the result does not depend on the number of blocks at a time.
    Parameters as in `sample_cells`, `weighted` and `mix`.
    """
    starts = range(0, len(cells_per_type), BLOCK)
    streams = [np.random.default_rng(stream) for stream in np.random.SeedSequence(seed).spawn(len(starts))]
    blocks = [(cells_per_type[start : start + BLOCK], stream) for start, stream in zip(starts, streams)]
    n_genes = counts.shape[1] if genes is None else len(genes)
    at_once = max(1, MIXED_BYTES // (4 * BLOCK * n_genes))
    for first in range(0, len(blocks), at_once):
        some = blocks[first : first + at_once]
        sampled = [sample_cells(cells, cell_type_idx, rng, min_distinct) for cells, rng in some]
        yield mix(weighted(sp.vstack(sampled, format="csr"), cell_type_idx, weight), counts, genes)


def true_proportions(mixing: sp.csr_matrix, cell_type: pd.Series) -> pd.DataFrame:
    """Share of each type among the cells of each mixture: samples x cell types, rows sum to 1."""
    indicator = pd.get_dummies(cell_type).to_numpy(dtype=np.float64)
    cells_per_type = mixing @ indicator
    return pd.DataFrame(cells_per_type / cells_per_type.sum(axis=1, keepdims=True), columns=cell_type.cat.categories)


def tpm(counts: np.ndarray, gene_length_bp: np.ndarray | None = None) -> np.ndarray:
    """Transcripts per million: (count / length), scaled so that each sample sums to 1,000,000.

    Parameters
    ----------
    counts
        Samples x genes.
    gene_length_bp
        Length of each gene in base pairs. None for UMI counts, which count molecules of any length once: counts per million.

    Raises
    ------
    ValueError
        If a sample has no counts.
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


# --- the mixtures of train cells


class Recipe(NamedTuple):
    """How the mixtures of train cells are made: the same ones whenever and wherever they are made."""

    cells_per_sample: int
    fit_types: np.ndarray  # (n_train_cells,) type of each cell in the mixtures to train on; -1: in none
    validation_types: np.ndarray  # the same for the mixtures of held-out cells
    seed: int
    min_distinct: int  # as in `sample_cells`; 0: none
    weight: np.ndarray  # of the cells of each type, as in `weighted`


def make_train_mixtures(
    mixtures: ad.AnnData, train: ad.AnnData, memory_gb: float, genes: np.ndarray | None = None
) -> Iterator[np.ndarray]:
    """Yield the counts of the mixtures that `mixtures` describes: its proportions, roles and recipe.

    memory_gb: that the train cells may take; a larger set is read from disk several times. genes: as in `mix`.
    """
    recipe = Recipe(**mixtures.uns["recipe"])
    counts = train.X[:] if n_entries(train.X) * 8 <= memory_gb * 1e9 else train.X
    cells_per_type = np.rint(mixtures.obsm["proportions"] * recipe.cells_per_sample).astype(np.int64)
    is_fit, seed, distinct = is_for_fit(mixtures), int(recipe.seed), int(recipe.min_distinct) or None
    weight = pd.Series(recipe.weight) if np.any(recipe.weight != 1) else None
    yield from simulate(cells_per_type[is_fit], recipe.fit_types, counts, seed, distinct, weight, genes)
    yield from simulate(cells_per_type[~is_fit], recipe.validation_types, counts, seed + 1, None, weight, genes)


def train_mixtures(
    mixtures: ad.AnnData, train: ad.AnnData | None, genes: np.ndarray | None = None, memory_gb: float = 0.0
) -> Iterator[tuple[slice, np.ndarray]]:
    """The counts of some genes (None: all) of the mixtures, `ROWS_AT_ONCE` at a time, with the rows of each block.

    They are read from the file of stage 2 if it holds them; otherwise they are made of the train cells (`make_train_mixtures`).
    """
    has_counts = "X" in mixtures.file if mixtures.isbacked else mixtures.X is not None
    if has_counts:
        starts = range(0, mixtures.n_obs, ROWS_AT_ONCE)
        every_gene = (mixtures.X[start : start + ROWS_AT_ONCE] for start in starts)
        parts = (part if genes is None else part[:, genes] for part in every_gene)
    else:
        assert train is not None
        made = make_train_mixtures(mixtures, train, memory_gb, genes)
        parts = (block[start : start + ROWS_AT_ONCE] for block in made for start in range(0, len(block), ROWS_AT_ONCE))
    done = 0
    with tqdm(total=mixtures.n_obs, desc="mixtures of train cells", unit="", leave=False) as progress:
        for part in parts:
            yield slice(done, done + len(part)), part
            done += len(part)
            progress.update(len(part))


# --- the files of stage 2


def write_train_mixtures(mixtures: ad.AnnData, blocks: Iterable[np.ndarray] | None, path: Path) -> None:
    """Write the training mixtures: all that describes them, and their counts block by block, if there are any."""
    with replacing(path) as temporary, new_hdf5(temporary) as (file, disk):
        write_described(mixtures, file)
        if blocks is None:
            return
        X = file.create_dataset("X", mixtures.shape, np.float32)
        X.attrs.update({"encoding-type": "array", "encoding-version": "0.2.0"})
        written = 0
        for block in blocks:
            X[written : written + len(block)] = block
            disk.check()
            written += len(block)


def read_train_mixtures(data_folder: Path) -> tuple[ad.AnnData, ad.AnnData]:
    """Mixtures of train cells (stage 2), and the train cells, both with counts on disk; refused if their splits differ.

    The first: obsm["proportions"] (columns: uns["cell_types"]), obs["role"] ("fit" or "validation"), var["gene_length_bp"] if the
    bulk profiles are divided by gene length, uns["rna_per_cell"] if the cells have these mRNA contents, uns["recipe"] (`Recipe`);
    X, counts (mixtures x genes), if stage 2 wrote them: `train_mixtures` gives them in either case.
    """
    path, train_path = data_folder / "pseudobulk_train.h5ad", data_folder / "train.h5ad"
    mixtures = read_h5ad(require(path, "_2_make_pseudobulk.py"), backed="r")
    recipe = mixtures.uns.get("recipe")
    if (
        not {"cell_types", "split_id"} <= mixtures.uns.keys()
        or not isinstance(recipe, Mapping)
        or set(recipe) != set(Recipe._fields)
        or "proportions" not in mixtures.obsm
        or "role" not in mixtures.obs
    ):
        raise ValueError(
            f"{path} was not written by _2_make_pseudobulk.py: it lacks the proportions, the split or the recipe; run it again"
        )
    train = read_counts(train_path, "_1_split_train_test.py")
    check_same_split(mixtures.uns["split_id"], path, train.uns["split_id"], train_path, "_2_make_pseudobulk.py")
    return mixtures, train


def is_for_fit(mixtures: ad.AnnData) -> np.ndarray:
    """Mask of the mixtures to train on; the others consist of held-out train cells."""
    return (mixtures.obs["role"] == "fit").to_numpy()


def gene_lengths(mixtures: ad.AnnData, genes: np.ndarray | slice = ALL) -> np.ndarray | None:
    """Lengths (bp) of some genes by which bulk profiles are divided, NaN where unknown; None if they are not divided."""
    lengths = mixtures.var.get("gene_length_bp")
    return None if lengths is None else lengths.to_numpy()[genes]


def require_test_mixtures(data_folder: Path) -> None:
    """Refuse missing or changed mixtures of test cells, before any work."""
    for name in ("tpm", "proportions"):
        require(data_folder / f"pseudobulk_test_{name}.csv", "_2_make_pseudobulk.py")


def read_test_mixtures(
    data_folder: Path, split_id: str, by_length: bool, by_content: bool
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """TPM and true proportions of the mixtures of test cells (stage 2); refused if their split or scale is another.

    The header of the sample column names the split, and says whether TPM were divided by gene length, and whether the cells have
    the mRNA contents of RNA_PER_CELL.

    Parameters
    ----------
    split_id
        Split of the test cells.
    by_length, by_content
        Whether models/sctape.pt was trained on profiles divided by gene length, and on mixtures with these mRNA contents.
    """
    expected = sample_header(split_id, by_length, by_content)

    def read(name: str) -> pd.DataFrame:
        path = require(data_folder / f"pseudobulk_test_{name}.csv", "_2_make_pseudobulk.py")
        with reading(path, "a table of numbers"):
            table = pd.read_csv(path, index_col=0).astype(np.float64)
        if table.index.name != expected:
            raise ValueError(
                f"{path} does not belong to data/test.h5ad and models/sctape.pt: its header is {table.index.name!r}, "
                f"expected {expected!r}; run _2_make_pseudobulk.py and _4_train_sctape.py again"
            )
        return table

    return read("tpm"), read("proportions")


def sample_header(split_id: str, by_length: bool, by_content: bool) -> str:
    """Header of the sample column in the tables of test mixtures."""
    return f"sample of split {split_id}" + " by gene length" * by_length + " with mRNA contents" * by_content
