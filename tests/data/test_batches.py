"""Batches hold the rows of the matrix, in memory and on disk."""

import math

import anndata as ad
import numpy as np
import pytest
import scipy.sparse as sp
import torch
from helpers import simulated_cells

from lib.data.batches import CellDataset, log_factorials, transposed
from lib.data.counts import read_counts, write_h5ad


def test_a_batch_is_the_rows_of_the_matrix():
    counts, types = simulated_cells()
    batch = CellDataset(counts, types, torch.device("cpu")).in_memory_cells.batch(np.array([5, 2, 9]))
    dense = torch.zeros(3, counts.shape[1])
    dense[batch.cells, batch.genes] = batch.counts
    np.testing.assert_array_equal(dense, counts[[5, 2, 9]].toarray())
    np.testing.assert_array_equal(batch.library_size, counts[[5, 2, 9]].toarray().sum(axis=1))
    np.testing.assert_array_equal(batch.cell_type_idx, types[[5, 2, 9]])
    expected = np.log1p(dense.numpy() / dense.numpy().sum(axis=1, keepdims=True) * 1000)
    np.testing.assert_allclose(batch.log_normalized(1000.0).to_dense(), expected, rtol=1e-5)


def test_log_factorials_of_small_and_large_counts():
    counts = np.array([1, 2, 5, 1022, 1023, 1024, 30_000], np.float32)
    np.testing.assert_allclose(log_factorials(counts), [math.lgamma(count + 1) for count in counts], rtol=1e-12)


@pytest.mark.parametrize("in_memory", [True, False])
def test_corrected_cells_have_the_other_counts_however_they_are_read(tmp_path, in_memory):
    counts, types = simulated_cells()
    adata = ad.AnnData(counts, uns={"dataset": "x"})
    adata.obs["cell_type"] = "a"
    write_h5ad(adata, tmp_path / "x.h5ad")
    rows = np.arange(0, len(types), 2)
    dataset = CellDataset(read_counts(tmp_path / "x.h5ad", "").X, types, torch.device("cpu"), rows, in_memory)
    corrected = dataset.corrected(lambda x, y: sp.csr_matrix(x.multiply((y + 2)[:, None]), dtype=np.float32))
    expected = counts[rows].toarray() * (types[rows] + 2)[:, None]
    assert corrected.library_size.sum() == expected.sum() and dataset.library_size.sum() == counts[rows].sum()
    for part in (corrected, corrected.subset(np.arange(len(rows)))):
        np.testing.assert_array_equal(sp.vstack([block for block, _ in part.blocks()]).toarray(), expected)
    in_order = torch.cat([batch.raw().to_dense() for batch in corrected.in_order(64)])
    np.testing.assert_array_equal(in_order, expected)
    shuffled = torch.cat([b.raw().to_dense() for b in corrected.shuffled(64, torch.Generator().manual_seed(0))])
    np.testing.assert_array_equal(np.sort(shuffled.sum(dim=1)), np.sort(expected.sum(axis=1)))


def test_selected_cells_are_those_cells():
    counts, types = simulated_cells()
    dataset = CellDataset(counts, types, torch.device("cpu"))
    chosen = torch.tensor([False, True, True, False, True])
    selected, expected = (
        dataset.in_memory_cells.batch(np.arange(5)).select(chosen),
        dataset.in_memory_cells.batch(np.array([1, 2, 4])),
    )
    for name, value in vars(expected).items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(getattr(selected, name), value), name


def test_an_epoch_holds_every_cell_once_in_a_seeded_order():
    counts, _ = simulated_cells(n_cells=103)
    dataset = CellDataset(counts, np.arange(103), torch.device("cpu"))
    orders = []
    for seed in (0, 0, 1):
        batches = list(dataset.shuffled(20, torch.Generator().manual_seed(seed)))
        assert max(b.n_cells for b in batches) - min(b.n_cells for b in batches) <= 1
        orders.append(torch.cat([b.cell_type_idx for b in batches]).tolist())
    assert sorted(orders[0]) == list(range(103))
    assert orders[0] == orders[1] != orders[2]


@pytest.fixture
def on_disk(tmp_path, monkeypatch):
    """A data set on disk in many blocks and windows, the same in memory, and the rows that belong to it."""
    monkeypatch.setattr("lib.data.batches.SHUFFLED_CELLS", 16)
    monkeypatch.setattr("lib.data.batches.WINDOW_CELLS", 64)
    monkeypatch.setattr("lib.data.counts.BLOCK_CELLS", 50)
    counts, _ = simulated_cells(n_cells=403)
    adata = ad.AnnData(counts, uns={"dataset": "simulated"})
    write_h5ad(adata, tmp_path / "cells.h5ad")
    mine = np.flatnonzero(np.arange(403) % 4 > 0)
    ids = np.arange(403)  # used as types, so that a batch shows which cells it holds
    cpu = torch.device("cpu")
    backed = read_counts(tmp_path / "cells.h5ad", "-").X
    return CellDataset(backed, ids, cpu, mine, in_memory=False), CellDataset(counts, ids, cpu, mine), mine


def test_cells_on_disk_are_the_cells_in_memory(on_disk):
    disk, memory, mine = on_disk
    assert disk.in_memory_cells is None and memory.in_memory_cells is not None
    np.testing.assert_array_equal(disk.library_size, memory.library_size)
    for dataset in (disk, memory):
        batches = list(dataset.in_order(7))
        np.testing.assert_array_equal(torch.cat([b.cell_type_idx for b in batches]), mine)
        whole = sp.vstack([counts for counts, _ in dataset.blocks()])
        np.testing.assert_array_equal(whole.toarray(), memory.counts.toarray())


def test_a_subset_is_some_of_the_cells_of_its_data_set(on_disk):
    *datasets, mine = on_disk
    places = np.array([0, 4, 70, 299])
    for dataset in datasets:
        subset = dataset.subset(places)
        np.testing.assert_array_equal(torch.cat([b.cell_type_idx for b in subset.in_order(7)]), mine[places])
        whole = sp.vstack([counts for counts, _ in subset.blocks()])
        np.testing.assert_array_equal(whole.toarray(), datasets[1].counts.toarray()[places])


def test_an_epoch_from_disk_holds_every_cell_once_and_mixes_distant_cells(on_disk):
    disk, memory, mine = on_disk
    batches = list(disk.shuffled(12, torch.Generator().manual_seed(0)))
    ids = torch.cat([b.cell_type_idx for b in batches]).numpy()
    assert sorted(ids) == list(mine)
    spread = [np.ptp(b.cell_type_idx.numpy()) for b in batches]
    assert np.mean(spread) > 150  # cells of a batch come from the whole file, not from 64 consecutive cells
    of_memory = memory.in_memory_cells.batch(np.searchsorted(mine, batches[0].cell_type_idx.numpy()))
    assert torch.equal(batches[0].counts, of_memory.counts) and torch.equal(batches[0].genes, of_memory.genes)
    again = torch.cat([b.cell_type_idx for b in disk.shuffled(12, torch.Generator().manual_seed(0))]).numpy()
    np.testing.assert_array_equal(ids, again)


@pytest.mark.parametrize("where", [0, 1])
def test_processes_share_every_batch(on_disk, where):
    whole = list(on_disk[where].shuffled(12, torch.Generator().manual_seed(3)))
    shares = [list(on_disk[where].shuffled(12, torch.Generator().manual_seed(3), rank, 3)) for rank in range(3)]
    for batch, *parts in zip(whole, *shares, strict=True):
        assert sorted(torch.cat([p.cell_type_idx for p in parts]).tolist()) == sorted(batch.cell_type_idx.tolist())
        assert all(p.n_global == batch.n_cells for p in parts)
        assert max(p.n_cells for p in parts) - min(p.n_cells for p in parts) <= 1


@pytest.mark.parametrize("where", [0, 1])
@pytest.mark.parametrize(("n_cells", "batch_size"), [(300, 3), (9, 1), (3, 12)])
@pytest.mark.parametrize("balanced", [False, True])
def test_each_of_many_processes_gets_a_cell_of_each_batch(on_disk, where, n_cells, batch_size, balanced):
    part = on_disk[where].subset(np.linspace(0, len(on_disk[where]) - 1, n_cells).astype(int))
    generators = [torch.Generator().manual_seed(3) for _ in range(5)]
    shares = [list(part.shuffled(batch_size, g, rank, 5, balanced)) for rank, g in enumerate(generators)]
    for batches in zip(*shares, strict=True):  # as many steps of each
        assert min(b.n_cells for b in batches) > 0 and sum(b.n_cells for b in batches) == batches[0].n_global
    ids = torch.cat([b.cell_type_idx for batches in shares for b in batches]).tolist()
    if not balanced:
        assert set(ids) == set(part.cell_type_idx) and len(ids) == max(n_cells, 5)


def test_balanced_batches_hold_each_type_equally_often_and_skip_windows_without_labels(on_disk):
    disk = on_disk[0]
    disk.cell_type_idx = np.where(
        disk.cells < 16, disk.cells % 8 // 7, -1
    )  # labels in one block of 16 cells: 9 and 2 cells
    types = torch.cat([b.cell_type_idx for b in disk.shuffled(12, torch.Generator().manual_seed(0), balanced=True)])
    assert 0 < len(types) < 100 and (types >= 0).all() and 0.3 < types.double().mean() < 0.7
    disk.cell_type_idx[:] = -1
    assert not list(disk.shuffled(12, torch.Generator().manual_seed(0), balanced=True))


def test_the_transpose_in_csr_form():
    counts, types = simulated_cells()
    x = CellDataset(counts, types, torch.device("cpu")).in_memory_cells.batch(np.arange(20)).log_normalized(1000.0)
    assert torch.equal(transposed(x).to_dense(), x.to_dense().T)
