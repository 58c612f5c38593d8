"""Batches hold the rows of the matrix, in memory and on disk."""

import math

import anndata as ad
import numpy as np
import pytest
import scipy.sparse as sp
import torch
from helpers import CPU, simulated_cells

from lib.data.batches import CellDataset, log_factorials, transposed
from lib.data.counts import read_counts, write_h5ad


def shuffled(dataset: CellDataset, batch_size: int, *ranks, seed: int = 0, **options) -> list:
    return list(dataset.shuffled(batch_size, torch.Generator().manual_seed(seed), *ranks, **options))


def types_of(batches) -> np.ndarray:
    return torch.cat([batch.cell_type_idx for batch in batches]).numpy()


def test_a_batch_is_the_rows_of_the_matrix():
    counts, types = simulated_cells()
    batch = CellDataset(counts, types, CPU).in_memory_cells.batch(np.array([5, 2, 9]))
    dense = counts[[5, 2, 9]].toarray()
    np.testing.assert_array_equal(batch.raw().to_dense(), dense)
    np.testing.assert_array_equal(batch.library_size, dense.sum(axis=1))
    np.testing.assert_array_equal(batch.cell_type_idx, types[[5, 2, 9]])
    expected = np.log1p(dense / dense.sum(axis=1, keepdims=True) * 1000)
    x = batch.log_normalized(1000.0)
    np.testing.assert_allclose(x.to_dense(), expected, rtol=1e-5)
    np.testing.assert_allclose(transposed(x).to_dense(), expected.T, rtol=1e-5)


def test_selected_cells_are_those_cells():
    counts, types = simulated_cells()
    memory = CellDataset(counts, types, CPU).in_memory_cells
    selected = memory.batch(np.arange(5)).select(torch.tensor([False, True, True, False, True]))
    for name, value in vars(memory.batch(np.array([1, 2, 4]))).items():
        assert not isinstance(value, torch.Tensor) or torch.equal(getattr(selected, name), value), name


def test_log_factorials_of_small_and_large_counts():
    counts = np.array([1, 2, 5, 1022, 1023, 1024, 30_000], np.float32)
    np.testing.assert_allclose(log_factorials(counts), [math.lgamma(count + 1) for count in counts], rtol=1e-12)


@pytest.fixture
def on_disk(tmp_path, monkeypatch):
    """A data set on disk in many blocks and windows, the same in memory, and the rows that belong to it."""
    monkeypatch.setattr("lib.data.batches.SHUFFLED_CELLS", 16)
    monkeypatch.setattr("lib.data.batches.WINDOW_CELLS", 64)
    monkeypatch.setattr("lib.data.counts.BLOCK_CELLS", 50)
    counts, _ = simulated_cells(n_cells=403)
    write_h5ad(ad.AnnData(counts, uns={"dataset": "simulated"}), tmp_path / "cells.h5ad")
    mine = np.flatnonzero(np.arange(403) % 4 > 0)
    ids = np.arange(403)  # used as types, so that a batch shows which cells it holds
    backed = read_counts(tmp_path / "cells.h5ad", "-").X
    return CellDataset(backed, ids, CPU, mine, in_memory=False), CellDataset(counts, ids, CPU, mine), mine


def test_cells_on_disk_and_subsets_of_them_are_the_cells_in_memory(on_disk):
    disk, memory, mine = on_disk
    assert disk.in_memory_cells is None and memory.in_memory_cells is not None
    np.testing.assert_array_equal(disk.library_size, memory.library_size)
    places = np.array([0, 4, 70, 299])
    for dataset in (disk, memory):
        for part, chosen in ((dataset, slice(None)), (dataset.subset(places), places)):
            np.testing.assert_array_equal(types_of(part.in_order(7)), mine[chosen])
            whole = sp.vstack([counts for counts, _ in part.blocks()])
            np.testing.assert_array_equal(whole.toarray(), memory.counts.toarray()[chosen])


@pytest.mark.parametrize("where", [0, 1])
def test_corrected_cells_have_the_other_counts_however_they_are_read(on_disk, where):
    dataset, mine = on_disk[where], on_disk[2]
    corrected = dataset.corrected(lambda x, y: sp.csr_matrix(x.multiply((y + 2)[:, None]), dtype=np.float32))
    expected = on_disk[1].counts.toarray() * (mine + 2)[:, None]
    np.testing.assert_allclose(corrected.library_size, expected.sum(axis=1))
    assert dataset.library_size.sum() == on_disk[1].counts.sum()
    for part in (corrected, corrected.subset(np.arange(len(mine)))):
        np.testing.assert_array_equal(sp.vstack([block for block, _ in part.blocks()]).toarray(), expected)
        np.testing.assert_array_equal(torch.cat([b.raw().to_dense() for b in part.in_order(64)]), expected)
    for batch in shuffled(corrected, 64):
        np.testing.assert_array_equal(batch.raw().to_dense(), expected[np.searchsorted(mine, types_of([batch]))])


@pytest.mark.parametrize("where", [0, 1])
def test_an_epoch_holds_every_cell_once_in_a_seeded_order(on_disk, where):
    dataset, memory, mine = on_disk[where], *on_disk[1:]
    batches = shuffled(dataset, 12)
    first, again, other = types_of(batches), types_of(shuffled(dataset, 12)), types_of(shuffled(dataset, 12, seed=1))
    assert sorted(first) == list(mine) and list(first) == list(again) != list(other)
    assert np.ptp([batch.n_cells for batch in batches]) <= (1 if where else 3)  # windows differ in size
    spread = [np.ptp(batch.cell_type_idx.numpy()) for batch in batches]
    assert np.mean(spread) > 150  # cells of a batch come from the whole file, not from 64 consecutive cells
    of_memory = memory.in_memory_cells.batch(np.searchsorted(mine, types_of(batches[:1])))
    assert torch.equal(batches[0].counts, of_memory.counts) and torch.equal(batches[0].genes, of_memory.genes)


@pytest.mark.parametrize("where", [0, 1])
@pytest.mark.parametrize(("n_cells", "batch_size"), [(300, 12), (300, 3), (9, 1), (3, 12)])
@pytest.mark.parametrize("balanced", [False, True])
def test_each_of_many_processes_gets_its_share_of_each_batch(on_disk, where, n_cells, batch_size, balanced):
    part = on_disk[where].subset(np.linspace(0, len(on_disk[where]) - 1, n_cells).astype(int))
    shares = [shuffled(part, batch_size, rank, 5, balanced=balanced) for rank in range(5)]
    for batches in zip(*shares, strict=True):  # as many steps of each
        sizes = [batch.n_cells for batch in batches]
        assert min(sizes) > 0 and max(sizes) - min(sizes) <= 1 and {b.n_global for b in batches} == {sum(sizes)}
    ids = types_of([batch for batches in shares for batch in batches])
    if not balanced:
        assert set(ids) == set(part.cell_type_idx) and len(ids) == max(n_cells, 5)


def test_balanced_batches_hold_each_type_equally_often_and_skip_windows_without_labels(on_disk):
    disk = on_disk[0]
    is_labelled = disk.cells < 16  # in one block of 16 cells: 9 and 2 cells
    disk.cell_type_idx = np.where(is_labelled, disk.cells % 8 // 7, -1)
    types = types_of(shuffled(disk, 12, balanced=True))
    assert 0 < len(types) < 100 and (types >= 0).all() and 0.3 < types.mean() < 0.7
    disk.cell_type_idx[:] = -1
    assert not shuffled(disk, 12, balanced=True)
