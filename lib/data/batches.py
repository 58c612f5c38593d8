"""Mini-batches of cells from sparse counts, in memory or on disk; the counts are never dense as a whole."""

import copy
import functools
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch
import torch.nn.functional as F
from anndata.abc import CSRDataset
from scipy.special import gammaln

from lib.data.counts import read_rows, selected_blocks

SHUFFLED_CELLS = 256  # consecutive cells on disk that are read together when cells are shuffled
WINDOW_CELLS = 8_192  # cells of random blocks on disk that are in memory together and are shuffled
LOG_FACTORIALS = gammaln(np.arange(1024) + 1.0)
GPU_SHARE = 0.5  # of the GPU's free memory that the counts may take; larger sets stay in the computer's memory


@dataclass
class Batch:
    """Some cells: the non-zero entries of their rows of counts."""

    indptr: torch.Tensor  # (n_cells + 1,) index of each cell's first entry
    genes: torch.Tensor  # (n_entries,) its gene
    counts: torch.Tensor  # (n_entries,) its count, > 0
    cells: torch.Tensor  # (n_entries,) its cell
    library_size: torch.Tensor  # (n_cells,) sum of the cell's counts
    log_factorials: torch.Tensor  # (n_cells,) sum of log(count!), float64
    cell_type_idx: torch.Tensor  # (n_cells,) -1 where unknown
    n_genes: int
    all_labelled: bool  # whether all cells have a type, before `select` and `of_type`
    n_global: int  # cells of the batch over all processes that train together

    @property
    def n_cells(self) -> int:
        return len(self.library_size)

    def raw(self) -> torch.Tensor:
        """Counts, sparse, n_cells x n_genes."""
        return _csr(self.indptr, self.genes, self.counts, (self.n_cells, self.n_genes))

    def log_normalized(self, target: float | torch.Tensor) -> torch.Tensor:
        """log(1 + count x target / library size), sparse, n_cells x n_genes: the encoder's input."""
        values = torch.log1p(self.counts * (target / self.library_size)[self.cells])
        return _csr(self.indptr, self.genes, values, (self.n_cells, self.n_genes))

    def select(self, chosen: torch.Tensor) -> "Batch":
        """The cells of a mask (n_cells,) or of indices, which may repeat."""
        chosen = chosen.nonzero()[:, 0] if chosen.dtype == torch.bool else chosen
        n_entries = self.indptr.diff()[chosen]
        indptr = F.pad(n_entries.cumsum(0), (1, 0))
        cells = torch.repeat_interleave(n_entries)
        entries = torch.arange(len(cells), device=cells.device) + (self.indptr[chosen] - indptr[:-1])[cells]
        return replace(
            self,
            indptr=indptr,
            genes=self.genes[entries],
            counts=self.counts[entries],
            cells=cells,
            library_size=self.library_size[chosen],
            log_factorials=self.log_factorials[chosen],
            cell_type_idx=self.cell_type_idx[chosen],
        )

    def of_type(self, cell_type_idx: int) -> "Batch":
        """The same cells, all labelled with one type."""
        return replace(self, cell_type_idx=torch.full_like(self.cell_type_idx, cell_type_idx))

    def to(self, device: torch.device) -> "Batch":
        """The same batch on a device."""
        moved: dict[str, Any] = {
            name: value.to(device, non_blocking=True)
            for name, value in vars(self).items()
            if isinstance(value, torch.Tensor)
        }
        return replace(self, **moved)


def _csr(indptr: torch.Tensor, indices: torch.Tensor, values: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
        return torch.sparse_csr_tensor(indptr, indices, values, shape, check_invariants=False)


def transposed(x: torch.Tensor) -> torch.Tensor:
    """Transpose a sparse CSR matrix to CSR, the form that fast products need."""
    indptr, indices, values = x.crow_indices(), x.col_indices(), x.values()
    if x.device.type == "cpu":
        columns = sp.csr_matrix((values.numpy(), indices.numpy(), indptr.numpy()), shape=x.shape).tocsc()
        starts, rows = (torch.from_numpy(a.astype(np.int64)) for a in (columns.indptr, columns.indices))
        return _csr(starts, rows, torch.from_numpy(columns.data), x.shape[::-1])
    by_column = indices.argsort(stable=True)
    rows = torch.repeat_interleave(indptr.diff(), output_size=len(indices))[by_column]
    n_entries = torch.zeros(x.shape[1], dtype=torch.int64, device=x.device).index_add_(
        0, indices, torch.ones_like(indices)
    )
    return _csr(F.pad(n_entries.cumsum(0), (1, 0)), rows, values[by_column], x.shape[::-1])


def log_factorials(counts: np.ndarray) -> np.ndarray:
    """log(count!) of whole numbers, float64; small ones from a table, which takes a tenth of the time."""
    logs = LOG_FACTORIALS[np.minimum(counts, len(LOG_FACTORIALS) - 1).astype(np.int64)]
    large = counts >= len(LOG_FACTORIALS)
    logs[large] = gammaln(counts[large].astype(np.float64) + 1)
    return logs


class InMemoryCells:
    """Cells in memory, their counts sparse; on the GPU if they fit."""

    def __init__(self, counts: sp.csr_matrix, cell_type_idx: np.ndarray, device: torch.device):
        self.device = device
        self.n_genes = counts.shape[1]
        self.indptr = counts.indptr.astype(np.int64)
        self.genes, self.counts = torch.from_numpy(counts.indices), torch.from_numpy(counts.data)
        self.library_size = torch.from_numpy(np.asarray(counts.sum(axis=1), dtype=np.float32).ravel())
        logs = sp.csr_matrix((log_factorials(counts.data), counts.indices, counts.indptr), shape=counts.shape)
        self.log_factorials = torch.from_numpy(np.asarray(logs.sum(axis=1)).ravel())
        self.cell_type_idx = torch.from_numpy(cell_type_idx)
        self.is_labelled = cell_type_idx >= 0
        if (
            device.type == "cuda"
            and self.genes.nbytes + self.counts.nbytes < GPU_SHARE * torch.cuda.mem_get_info(device)[0]
        ):
            for name in ("genes", "counts", "library_size", "log_factorials", "cell_type_idx"):
                setattr(self, name, getattr(self, name).to(device))

    def __len__(self) -> int:
        return len(self.library_size)

    def batch(self, cells: np.ndarray, n_global: int | None = None) -> Batch:
        """Make a batch of these cells. `indptr` stays on the CPU and gives all sizes, so that the CPU does not wait for the GPU."""
        begin, n_entries = self.indptr[cells], self.indptr[cells + 1] - self.indptr[cells]
        indptr = np.concatenate([[0], n_entries.cumsum()])
        memory = self.counts.device
        first, n_entries, rows = (
            torch.from_numpy(a).to(memory, non_blocking=True) for a in (begin - indptr[:-1], n_entries, cells)
        )
        cell_of_entry = torch.repeat_interleave(n_entries, output_size=int(indptr[-1]))
        entries = torch.arange(int(indptr[-1]), device=memory) + first[cell_of_entry]
        return Batch(
            indptr=torch.from_numpy(indptr).to(memory, non_blocking=True),
            genes=self.genes[entries].long(),
            counts=self.counts[entries],
            cells=cell_of_entry,
            library_size=self.library_size[rows],
            log_factorials=self.log_factorials[rows],
            cell_type_idx=self.cell_type_idx[rows],
            n_genes=self.n_genes,
            all_labelled=bool(self.is_labelled[cells].all()),
            n_global=len(cells) if n_global is None else n_global,
        ).to(self.device)


class CellDataset:
    """Counts and types of cells, as batches.

    Parameters
    ----------
    counts
        Cells x genes, CSR, raw counts: a matrix in memory, or on disk (`X` of a backed AnnData).
    cell_type_idx
        Type of each cell, -1 where unknown.
    device
        Of the batches.
    cells
        Rows that belong to the data set, ascending; None for all.
    in_memory
        Whether counts on disk are read into memory at once; otherwise at most `WINDOW_CELLS` at a time.
    """

    def __init__(
        self, counts: sp.csr_matrix | CSRDataset, cell_type_idx: np.ndarray, device: torch.device,
        cells: np.ndarray | None = None, in_memory: bool = True,
    ):  # fmt: skip
        assert isinstance(counts, CSRDataset) or counts.format == "csr"
        self.n_genes = counts.shape[1]
        self.cells = np.arange(counts.shape[0]) if cells is None else cells
        self.cell_type_idx = np.asarray(cell_type_idx, dtype=np.int64)[self.cells]
        self.device = device
        self.correct: Callable[[sp.csr_matrix, np.ndarray], sp.csr_matrix] | None = None
        self.counts, self.in_memory_cells = counts, None
        if in_memory:
            self.counts = (
                sp.vstack([block for block, _ in self.blocks()], format="csr")
                if cells is not None or not sp.issparse(counts)
                else counts
            )
            self.in_memory_cells = InMemoryCells(self.counts, self.cell_type_idx, device)

    @functools.cached_property
    def library_size(self) -> np.ndarray:
        """Sum of each cell's counts, (n_cells,)."""
        return np.concatenate([np.asarray(counts.sum(axis=1)).ravel() for counts, _ in self.blocks()])

    def __len__(self) -> int:
        return len(self.cells)

    def subset(self, places: np.ndarray) -> "CellDataset":
        """Some of the cells, read block by block. places: their numbers in this data set, ascending."""
        rows = places if self.in_memory_cells is not None else self.cells[places]
        cell_type_idx = np.full(self.counts.shape[0], -1)
        cell_type_idx[rows] = self.cell_type_idx[places]
        part = CellDataset(self.counts, cell_type_idx, self.device, rows, in_memory=False)
        part.correct = self.correct
        return part

    def corrected(self, correct: Callable[[sp.csr_matrix, np.ndarray], sp.csr_matrix]) -> "CellDataset":
        """The same cells with other counts. correct: of counts and types of some cells, their other counts."""
        other = copy.copy(self)
        other.__dict__.pop("library_size", None)
        if self.in_memory_cells is None:
            other.correct = correct  # whenever cells are read
        else:
            other.counts = correct(self.counts, self.cell_type_idx)
            other.in_memory_cells = InMemoryCells(other.counts, self.cell_type_idx, self.device)
        return other

    def blocks(self) -> Iterator[tuple[sp.csr_matrix, np.ndarray]]:
        """All cells in order, in blocks: counts and types."""
        rows = np.arange(len(self)) if self.in_memory_cells is not None else self.cells
        for counts, places in selected_blocks(self.counts, rows):
            types = self.cell_type_idx[places]
            yield counts if self.correct is None else self.correct(counts, types), types

    def in_order(self, batch_size: int) -> Iterator[Batch]:
        """Every cell once, in order, in batches of at most `batch_size` cells."""
        parts = (InMemoryCells(*block, self.device) for block in self.blocks())
        for part in parts if self.in_memory_cells is None else [self.in_memory_cells]:
            for start in range(0, len(part), batch_size):
                yield part.batch(np.arange(start, min(start + batch_size, len(part))))

    def shuffled(
        self, batch_size: int, generator: torch.Generator, rank: int = 0, n_ranks: int = 1, balanced: bool = False
    ) -> Iterator[Batch]:
        """Every cell once, in random order, in batches of about `batch_size` cells.

        Cells on disk are shuffled in windows: random blocks of consecutive cells are read, and the cells of these blocks are
        shuffled. Of several processes, each gets its share of every batch. `balanced` samples as many cells with replacement
        instead: every type of the window equally often, no cell of unknown type.
        """
        for part in self._windows(generator) if self.in_memory_cells is None else [self.in_memory_cells]:
            if balanced:
                types = part.cell_type_idx.to(generator.device)
                weights = torch.where(types < 0, 0.0, 1 / types[types >= 0].bincount()[types.clamp(min=0)])
                order = torch.multinomial(weights, len(types), replacement=True, generator=generator)
            else:
                order = torch.randperm(len(part), generator=generator, device=generator.device)
            for cells in np.array_split(order.cpu().numpy(), max(1, round(len(order) / batch_size))):
                yield part.batch(cells[rank::n_ranks], len(cells))

    def _windows(self, generator: torch.Generator) -> Iterator[InMemoryCells]:
        """Windows of random blocks of cells; the next window is read while the current one is used."""
        n_blocks = -(-self.counts.shape[0] // SHUFFLED_CELLS)
        order = torch.randperm(n_blocks, generator=generator, device=generator.device).cpu().numpy()
        windows = np.array_split(order, max(1, round(n_blocks * SHUFFLED_CELLS / WINDOW_CELLS)))
        with ThreadPoolExecutor(1) as reader:
            reading = reader.submit(self._read, windows[0])
            for following in [*windows[1:], None]:
                window = reading.result()
                if following is not None:
                    reading = reader.submit(self._read, following)
                if len(window):
                    yield window

    def _read(self, blocks: np.ndarray) -> InMemoryCells:
        """Read the data set's cells in these blocks of the file."""
        parts, cell_type_idx = [], []
        for start in np.sort(blocks) * SHUFFLED_CELLS:
            rows = slice(start, min(start + SHUFFLED_CELLS, self.counts.shape[0]))
            places = slice(*np.searchsorted(self.cells, [rows.start, rows.stop]))
            block, chosen = read_rows(self.counts, rows), self.cells[places] - start
            parts.append(block if len(chosen) == block.shape[0] else block[chosen])
            cell_type_idx.append(self.cell_type_idx[places])
        counts, types = sp.vstack(parts, format="csr"), np.concatenate(cell_type_idx)
        return InMemoryCells(counts if self.correct is None else self.correct(counts, types), types, self.device)
