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
GPU_SHARE = 0.5  # of the GPU's free memory that the counts may take; more stay in the computer's memory


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
        if chosen.dtype == torch.bool:
            chosen = chosen.nonzero()[:, 0]
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
        tensors: dict[str, Any] = {name: value for name, value in vars(self).items() if isinstance(value, torch.Tensor)}
        return replace(self, **{name: value.to(device, non_blocking=True) for name, value in tensors.items()})


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
    n_entries = indptr.new_zeros(x.shape[1]).index_add_(0, indices, torch.ones_like(indices))
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
        self.device, self.n_genes = device, counts.shape[1]
        self.indptr = counts.indptr.astype(np.int64)
        self.genes, self.counts = torch.from_numpy(counts.indices), torch.from_numpy(counts.data)
        self.library_size = torch.from_numpy(np.asarray(counts.sum(axis=1), dtype=np.float32).ravel())
        logs = sp.csr_matrix((log_factorials(counts.data), counts.indices, counts.indptr), shape=counts.shape)
        self.log_factorials = torch.from_numpy(np.asarray(logs.sum(axis=1)).ravel())
        self.cell_type_idx = torch.from_numpy(cell_type_idx)
        self.is_labelled = cell_type_idx >= 0
        n_bytes = self.genes.nbytes + self.counts.nbytes
        if device.type == "cuda" and n_bytes < GPU_SHARE * torch.cuda.mem_get_info(device)[0]:
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
    """Counts and types of cells, as batches on a device.

    counts: a CSR matrix in memory, or `X` of a backed AnnData; cell_type_idx: type of each of its rows, -1 where unknown; cells: rows
    of this data set, ascending (None: all); in_memory: whether counts on disk are read into memory at once, otherwise about
    `WINDOW_CELLS` at a time. `rows` are the rows of these cells in the attribute `counts`.
    """

    def __init__(
        self, counts: sp.csr_matrix | CSRDataset, cell_type_idx: np.ndarray, device: torch.device,
        cells: np.ndarray | None = None, in_memory: bool = True,
    ):  # fmt: skip
        assert isinstance(counts, CSRDataset) or counts.format == "csr"
        self.counts, self.device, self.n_genes = counts, device, counts.shape[1]
        self.cells = self.rows = np.arange(counts.shape[0]) if cells is None else cells
        self.cell_type_idx = np.asarray(cell_type_idx, dtype=np.int64)[self.cells]
        self.correct: Callable[[sp.csr_matrix, np.ndarray], sp.csr_matrix] | None = None
        self.in_memory_cells = None
        if in_memory:
            if cells is not None or not sp.issparse(counts):
                self.counts = sp.vstack([block for block, _ in self.blocks()], format="csr")
            self.rows = np.arange(len(self))
            self.in_memory_cells = InMemoryCells(self.counts, self.cell_type_idx, device)

    def __len__(self) -> int:
        return len(self.cells)

    def _copy(self) -> "CellDataset":
        other = copy.copy(self)
        other.__dict__.pop("library_size", None)
        return other

    @functools.cached_property
    def library_size(self) -> np.ndarray:
        """Sum of each cell's counts, (n_cells,)."""
        return np.concatenate([np.asarray(counts.sum(axis=1)).ravel() for counts, _ in self.blocks()])

    def subset(self, places: np.ndarray) -> "CellDataset":
        """Some of the cells, read block by block. places: their numbers in this data set, ascending."""
        part = self._copy()
        part.cells, part.rows, part.cell_type_idx = self.cells[places], self.rows[places], self.cell_type_idx[places]
        part.in_memory_cells = None
        return part

    def corrected(self, correct: Callable[[sp.csr_matrix, np.ndarray], sp.csr_matrix]) -> "CellDataset":
        """The same cells with other counts. correct: of counts and types of some cells, their other counts."""
        other = self._copy()
        if self.in_memory_cells is None:
            other.correct = correct  # whenever cells are read
        else:
            other.counts = correct(self.counts, self.cell_type_idx)
            other.in_memory_cells = InMemoryCells(other.counts, self.cell_type_idx, self.device)
        return other

    def blocks(self) -> Iterator[tuple[sp.csr_matrix, np.ndarray]]:
        """All cells in order, in blocks: counts and types."""
        for counts, places in selected_blocks(self.counts, self.rows):
            yield self._corrected(counts, places)

    def _corrected(self, counts: sp.csr_matrix, places: slice | np.ndarray) -> tuple[sp.csr_matrix, np.ndarray]:
        """The counts to use of these cells, and their types."""
        types = self.cell_type_idx[places]
        return counts if self.correct is None else self.correct(counts, types), types

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

        Cells on disk are shuffled in windows of random blocks of consecutive cells. Of `n_ranks` processes each reads all windows and
        gets its share of every batch, at least one cell (some repeat if there are too few). `balanced` samples as many cells with
        replacement: every type of the window equally often, no cell of unknown type.
        """
        for part in self._windows(generator) if self.in_memory_cells is None else [self.in_memory_cells]:
            types = part.cell_type_idx.to(generator.device)
            if not balanced:
                random = torch.randperm(len(part), generator=generator, device=generator.device)
            elif part.is_labelled.any():
                weights = torch.where(types < 0, 0.0, 1 / types[types >= 0].bincount()[types.clamp(min=0)])
                random = torch.multinomial(weights, len(part), replacement=True, generator=generator)
            else:
                continue
            order = np.resize(random.cpu().numpy(), max(len(part), n_ranks))
            n_batches = min(round(len(order) / batch_size), len(order) // n_ranks)
            for cells in np.array_split(order, max(1, n_batches)):
                yield part.batch(cells[rank::n_ranks], len(cells))

    def _windows(self, generator: torch.Generator) -> Iterator[InMemoryCells]:
        """Windows of about as many cells each, from random blocks; the next one is read while the current one is used."""
        n_cells = np.bincount(self.rows // SHUFFLED_CELLS, minlength=-(-self.counts.shape[0] // SHUFFLED_CELLS))
        order = torch.randperm(len(n_cells), generator=generator, device=generator.device).cpu().numpy()
        order = order[n_cells[order] > 0]
        n_windows = max(1, round(len(self) / WINDOW_CELLS))
        starts = np.arange(1, n_windows) * len(self) / n_windows
        windows = np.split(order, np.searchsorted(n_cells[order].cumsum(), starts))
        with ThreadPoolExecutor(1) as reader:
            following = reader.submit(self._read, windows[0])
            for blocks in windows[1:]:
                window, following = following.result(), reader.submit(self._read, blocks)
                yield window
            yield following.result()

    def _read(self, blocks: np.ndarray) -> InMemoryCells:
        """Read the data set's cells in these blocks of the file."""
        counts, places = [], []
        for start in np.sort(blocks) * SHUFFLED_CELLS:
            rows = slice(start, min(start + SHUFFLED_CELLS, self.counts.shape[0]))
            places.append(np.arange(*np.searchsorted(self.rows, [rows.start, rows.stop])))
            counts.append(read_rows(self.counts, rows)[self.rows[places[-1]] - start])
        return InMemoryCells(*self._corrected(sp.vstack(counts, format="csr"), np.concatenate(places)), self.device)
