"""Batches hold what the matrix holds."""

import numpy as np
import torch
from conftest import simulated_cells

from lib.batches import CellDataset


def test_a_batch_is_the_rows_of_the_matrix():
    counts, types = simulated_cells()
    batch = CellDataset(counts, types, torch.device("cpu")).held.batch(np.array([5, 2, 9]))
    dense = torch.zeros(3, counts.shape[1])
    dense[batch.cells, batch.genes] = batch.counts
    np.testing.assert_array_equal(dense, counts[[5, 2, 9]].toarray())
    np.testing.assert_array_equal(batch.library_size, counts[[5, 2, 9]].toarray().sum(axis=1))
    np.testing.assert_array_equal(batch.cell_type_idx, types[[5, 2, 9]])
    expected = np.log1p(dense.numpy() / dense.numpy().sum(axis=1, keepdims=True) * 1000)
    np.testing.assert_allclose(batch.log_normalized(1000.0).to_dense(), expected, rtol=1e-5)


def test_selected_cells_are_those_cells():
    counts, types = simulated_cells()
    dataset = CellDataset(counts, types, torch.device("cpu"))
    chosen = torch.tensor([False, True, True, False, True])
    selected, expected = dataset.held.batch(np.arange(5)).select(chosen), dataset.held.batch(np.array([1, 2, 4]))
    for name, value in vars(expected).items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(getattr(selected, name), value), name


def test_an_epoch_holds_every_cell_once_in_a_seeded_order():
    counts, types = simulated_cells(n_cells=103)
    dataset = CellDataset(counts, np.arange(103), torch.device("cpu"))
    orders = []
    for seed in (0, 0, 1):
        batches = list(dataset.shuffled(20, torch.Generator().manual_seed(seed)))
        assert max(b.n_cells for b in batches) - min(b.n_cells for b in batches) <= 1
        orders.append(torch.cat([b.cell_type_idx for b in batches]).tolist())
    assert sorted(orders[0]) == list(range(103))
    assert orders[0] == orders[1] != orders[2]
