"""Stage 1 on counts on disk: scanpy's quality metrics and doublets, with and without dask workers."""

import anndata as ad
import numpy as np
import pytest
import scanpy as sc
import scipy.sparse as sp
from helpers import simulated_cells, simulated_dataset

import _1_split_train_test as stage
from lib.data.counts import read_counts, write_h5ad
from lib.data.embedding import lazy, principal_components, quality_metrics, scheduler


def on_disk(cells: ad.AnnData, folder) -> ad.AnnData:
    cells.uns["dataset"] = "simulated"
    write_h5ad(cells, folder / "cells.h5ad")
    return read_counts(folder / "cells.h5ad", "-")


@pytest.fixture
def cells() -> ad.AnnData:
    """Cells in three blocks on disk, one of them without counts."""
    cells = simulated_dataset(n_cells=5_000, n_genes=80)
    cells.var_names = [f"mt-{i}" if i < 5 else name for i, name in enumerate(cells.var_names)]
    cells.X = sp.csr_matrix(cells.X.multiply((np.arange(5_000) != 7)[:, None]), dtype=np.float32)
    return cells


def test_quality_metrics_and_components_are_those_of_the_counts_in_memory(cells, tmp_path):
    dense, counts = cells.X.toarray(), on_disk(cells, tmp_path)
    metrics = quality_metrics(counts)
    np.testing.assert_array_equal(metrics["total_counts"], dense.sum(axis=1))
    np.testing.assert_array_equal(metrics["n_genes_by_counts"], (dense > 0).sum(axis=1))
    share = 100 * dense[:, :5].sum(axis=1) / np.maximum(dense.sum(axis=1), 1)
    np.testing.assert_allclose(metrics["pct_counts_mt"], share, rtol=1e-5)
    rows = np.flatnonzero(np.arange(5_000) % 3 > 0)
    in_memory = principal_components(cells[rows].copy(), 60, 5)
    for a, b in zip(principal_components(lazy(counts, rows), 60, 5).T, in_memory.T):
        assert abs(np.corrcoef(a, b)[0, 1]) > 0.999  # a component's sign is free


@pytest.mark.slow
def test_workers_of_a_running_scheduler_give_the_same(cells, tmp_path):
    distributed = pytest.importorskip("distributed")
    counts, rows = on_disk(cells, tmp_path), np.flatnonzero(np.arange(5_000) % 7 != 3)
    quality, pcs = quality_metrics(counts), principal_components(lazy(counts, rows), 50, 10)
    cluster = distributed.LocalCluster(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None)
    with cluster, scheduler(cluster.scheduler_address):
        assert distributed.default_client().scheduler.address == cluster.scheduler_address
        assert quality_metrics(counts).equals(quality)
        same_pcs = principal_components(lazy(counts, rows), 50, 10)
    np.testing.assert_allclose(np.abs(pcs), np.abs(same_pcs), atol=1e-3)  # a component's sign is free


def test_a_scheduler_that_does_not_answer_is_named(monkeypatch):
    pytest.importorskip("distributed")
    monkeypatch.setattr("lib.data.embedding.CONNECT_S", 1)
    with pytest.raises(ValueError, match="DASK_SCHEDULER is 'tcp://127.0.0.1:9', but"), scheduler("tcp://127.0.0.1:9"):
        pass


# Doublets


@pytest.fixture(scope="module")
def captures() -> ad.AnnData:
    """Two captures of other genes each: cells of four types, and at the end of each 60 sums of two cells of different types."""
    parts = []
    for capture in range(2):
        counts, types = simulated_cells(n_cells=400, n_genes=300, n_types=4, seed=capture + 1)
        pairs = np.random.default_rng(0).integers(0, 400, (1200, 2))
        pairs = pairs[types[pairs[:, 0]] != types[pairs[:, 1]]][:60]
        parts.append(sp.vstack([counts, counts[pairs[:, 0]] + counts[pairs[:, 1]]]))
    cells = ad.AnnData(sp.block_diag(parts, format="csr"))
    cells.obs["capture"] = np.repeat(["A", "B"], 460)
    cells.obs["is_doublet"] = np.tile(np.arange(460) >= 400, 2)
    return cells


def test_doublets_are_those_that_scrublet_calls_in_each_capture(captures, tmp_path, monkeypatch, capsys):
    theirs = captures.copy()
    sc.pp.scrublet(theirs, batch_key="capture", verbose=False)
    expected, planted = theirs.obs["predicted_doublet"].to_numpy(), captures.obs["is_doublet"]
    assert expected[planted].mean() > 0.3 > 0.05 > expected[~planted].mean()
    order = np.arange(920).reshape(2, 460).T.ravel()  # cells of both captures in turn
    mixed = on_disk(captures[order].copy(), tmp_path)
    monkeypatch.setattr(stage, "BATCH_KEY", "capture")
    np.testing.assert_array_equal(stage.without_doublets(mixed, np.arange(920)), np.flatnonzero(~expected[order]))
    few = np.flatnonzero(mixed.obs["capture"] == "A")[:50]
    np.testing.assert_array_equal(stage.without_doublets(mixed, few), few)
    assert "doublets: not looked for in A, 50 cells are too few" in capsys.readouterr().out


def test_without_captures_random_parts_are_scored(captures, tmp_path, monkeypatch, capsys):
    sizes = []

    def scrublet(cells, **_):  # the second part has no threshold
        sizes.append(cells.n_obs)
        cells.obs["predicted_doublet"] = (cells.obs_names == "5") & (len(sizes) == 1)
        cells.uns["scrublet"] = {"threshold": 0.3} if len(sizes) == 1 else {}

    monkeypatch.setattr(sc.pp, "scrublet", scrublet)
    monkeypatch.setattr(stage, "MAX_CELLS_SCRUBLET", 300)
    rows = np.arange(1, 920, 2)
    kept = stage.without_doublets(on_disk(captures.copy(), tmp_path), rows)
    assert sizes == [230, 230] and set(rows) - set(kept) <= {5}
    assert capsys.readouterr().out.count("have no threshold; none removed") == 1


def test_a_column_that_obs_lacks_is_named(captures, monkeypatch):
    monkeypatch.setattr(stage, "BATCH_KEY", "lane")
    with pytest.raises(ValueError, match="BATCH_KEY is 'lane', but obs has capture, is_doublet"):
        stage.check_constants(captures.obs)
