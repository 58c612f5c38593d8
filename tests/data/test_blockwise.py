"""Statistics in blocks of cells: by hand, and the same from the workers of a dask scheduler."""

import builtins

import anndata as ad
import numpy as np
import pytest
from helpers import simulated_dataset

import lib.data.blockwise
from lib.data.blockwise import map_blocks, n_cells_of_genes, n_genes_of_cells, quality, scheduler
from lib.data.counts import read_counts, write_blocks
from lib.data.doublets import doublet_scores
from lib.data.embedding import lazy, principal_components

WHOLE = simulated_dataset(n_cells=5_000, n_genes=80)  # three blocks
ROWS = np.flatnonzero(np.arange(5_000) % 7 != 3)


@pytest.fixture
def on_disk(tmp_path) -> ad.AnnData:
    cells = WHOLE.copy()
    cells.uns["dataset"] = "simulated"
    write_blocks(cells, [cells.X], tmp_path / "cells.h5ad")
    return read_counts(tmp_path / "cells.h5ad", "-")


def statistics(adata: ad.AnnData) -> list[np.ndarray]:
    mitochondrial = np.arange(80) < 5
    some_genes = np.arange(80) % 3 == 0
    return [*quality(adata, mitochondrial), n_cells_of_genes(adata, ROWS), n_genes_of_cells(adata, ROWS, some_genes)]


def test_statistics_are_those_of_the_dense_counts(on_disk):
    dense = WHOLE.X.toarray()
    total = dense.sum(axis=1)
    expected = [
        total, (dense > 0).sum(axis=1), 100 * dense[:, :5].sum(axis=1) / total, (dense[ROWS] > 0).sum(axis=0),
        (dense[ROWS][:, ::3] > 0).sum(axis=1),
    ]  # fmt: skip
    for adata in (on_disk, WHOLE):
        for found, right in zip(statistics(adata), expected, strict=True):
            np.testing.assert_allclose(found, right, rtol=1e-6)


def test_blocks_come_in_order_with_their_rows(on_disk):
    parts = list(map_blocks(lambda _, counts, rows: (counts.toarray(), rows), None, on_disk, ROWS))
    assert len(parts) == 3
    np.testing.assert_array_equal(np.concatenate([rows for (_, rows), _ in parts]), ROWS)
    np.testing.assert_array_equal(np.concatenate([counts for (counts, _), _ in parts]), WHOLE.X[ROWS].toarray())
    assert [places.start for _, places in parts] == [0, *(places.stop for _, places in parts[:-1])]


@pytest.mark.slow
def test_workers_give_the_same(on_disk):
    distributed = pytest.importorskip("distributed")
    alone = [*statistics(on_disk), doublet_scores(on_disk, ROWS, 150, 0)[0]]
    pcs = principal_components(lazy(on_disk, ROWS), 50, 10)
    cluster = distributed.LocalCluster(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None)
    with cluster, scheduler(cluster.scheduler_address):
        assert lib.data.blockwise._client is not None
        together = [*statistics(on_disk), doublet_scores(on_disk, ROWS, 150, 0)[0]]
        same_pcs = principal_components(lazy(on_disk, ROWS), 50, 10)
    assert lib.data.blockwise._client is None
    for a, b in zip(alone[:-1], together[:-1], strict=True):
        np.testing.assert_array_equal(a, b)
    assert np.mean(np.isclose(alone[-1], together[-1])) > 0.995  # neighbours at the same distance, up to rounding
    np.testing.assert_allclose(np.abs(pcs), np.abs(same_pcs), atol=1e-3)


def test_a_scheduler_that_does_not_answer_is_named(monkeypatch):
    pytest.importorskip("distributed")
    monkeypatch.setattr(lib.data.blockwise, "CONNECT_S", 1)
    message = "DASK_SCHEDULER is 'tcp://127.0.0.1:9', but no dask scheduler answers there"
    with pytest.raises(ValueError, match=message), scheduler("tcp://127.0.0.1:9"):
        pass


def test_without_distributed_the_message_says_what_to_install(monkeypatch):
    real = builtins.__import__

    def without(name, *arguments, **options):
        if name == "distributed":
            raise ImportError(name)
        return real(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ValueError, match="the package distributed is missing: pip install"), scheduler("local"):
        pass
    with scheduler(None):  # needs nothing
        pass
