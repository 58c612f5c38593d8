"""Mini-batches of cells, cut straight from the sparse count matrix; the whole set is never dense."""

import warnings
from dataclasses import dataclass, replace
from typing import Iterator

import numpy as np
import scipy.sparse as sp
import torch
import torch.nn.functional as F


@dataclass
class Batch:
    """Some cells, as the non-zero entries of their rows."""

    indptr: torch.Tensor  # (n_cells + 1,) where each cell's entries begin
    genes: torch.Tensor  # (n_entries,) gene of each entry
    counts: torch.Tensor  # (n_entries,) its count, > 0
    cells: torch.Tensor  # (n_entries,) cell of each entry
    library_size: torch.Tensor  # (n_cells,) counts of each cell
    cell_type_idx: torch.Tensor  # (n_cells,) -1 where unknown
    n_genes: int

    @property
    def n_cells(self) -> int:
        return len(self.library_size)

    def log_normalized(self, target: float | torch.Tensor) -> torch.Tensor:
        """log(1 + count x target / library size), sparse, n_cells x n_genes: what the encoder sees."""
        values = torch.log1p(self.counts * (target / self.library_size)[self.cells])
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
            return torch.sparse_csr_tensor(self.indptr, self.genes, values, (self.n_cells, self.n_genes), check_invariants=False)

    def select(self, chosen: torch.Tensor) -> "Batch":
        """Some of the cells, by a mask (n_cells,)."""
        entries = chosen[self.cells]
        place = chosen.cumsum(0) - 1
        n_entries = self.indptr.diff()[chosen]
        return Batch(
            indptr=F.pad(n_entries.cumsum(0), (1, 0)),
            genes=self.genes[entries],
            counts=self.counts[entries],
            cells=place[self.cells[entries]],
            library_size=self.library_size[chosen],
            cell_type_idx=self.cell_type_idx[chosen],
            n_genes=self.n_genes,
        )

    def of_type(self, cell_type_idx: int) -> "Batch":
        """The same cells, taken for cells of one type."""
        return replace(self, cell_type_idx=torch.full_like(self.cell_type_idx, cell_type_idx))


class CellDataset:
    """Counts and types of cells, from which batches are cut.

    Parameters
    ----------
    counts
        Cells x genes, CSR, raw counts.
    cell_type_idx
        Type of each cell, -1 where unknown.
    device
        Where the batches are wanted.
    """

    def __init__(self, counts: sp.csr_matrix, cell_type_idx: np.ndarray, device: torch.device):
        assert sp.issparse(counts) and counts.format == "csr"
        self.counts = counts
        self.cell_type_idx = np.asarray(cell_type_idx, dtype=np.int64)
        self.library_size = np.asarray(counts.sum(axis=1), dtype=np.float32).ravel()
        self.device = device

    def __len__(self) -> int:
        return self.counts.shape[0]

    def batch(self, cells: np.ndarray) -> Batch:
        rows = self.counts[cells]
        indptr = torch.from_numpy(rows.indptr.astype(np.int64))
        batch = Batch(
            indptr=indptr,
            genes=torch.from_numpy(rows.indices.astype(np.int64)),
            counts=torch.from_numpy(rows.data.astype(np.float32)),
            cells=torch.repeat_interleave(torch.arange(len(cells)), indptr.diff()),
            library_size=torch.from_numpy(self.library_size[cells]),
            cell_type_idx=torch.from_numpy(self.cell_type_idx[cells]),
            n_genes=rows.shape[1],
        )
        if self.device.type == "cpu":
            return batch
        tensors = {k: v.to(self.device, non_blocking=True) for k, v in vars(batch).items() if isinstance(v, torch.Tensor)}
        return replace(batch, **tensors)

    def in_order(self, batch_size: int) -> Iterator[Batch]:
        for start in range(0, len(self), batch_size):
            yield self.batch(np.arange(start, min(start + batch_size, len(self))))

    def shuffled(self, batch_size: int, generator: torch.Generator) -> Iterator[Batch]:
        """Every cell once, in an order drawn from `generator`; batches differ by one cell at most."""
        order = torch.randperm(len(self), generator=generator, device=generator.device).cpu().numpy()
        for cells in np.array_split(order, max(1, round(len(order) / batch_size))):
            yield self.batch(cells)
