"""Count files: written and read in blocks, checked, fingerprinted, and selected by type."""

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
import scanpy as sc
import scipy.sparse as sp
from helpers import fingerprint, simulated_dataset

from lib.data.counts import (
    hold_out,
    log_normalize,
    n_entries,
    read_counts,
    row_blocks,
    select_cells,
    select_per_type,
    selected_blocks,
    write_blocks,
    write_h5ad,
    write_mtx,
)  # fmt: skip


def test_log_normalisation_by_hand():
    found = log_normalize(sp.csr_matrix([[1.0, 0.0], [0.0, 0.0], [3.0, 1.0]]), 4)
    np.testing.assert_allclose(found.toarray(), np.log([[5, 1], [1, 1], [4, 2]]), rtol=1e-6)


def test_the_fingerprint_changes_with_anything_that_matters():
    adata = simulated_dataset(n_cells=30)
    count, label, barcode, gene = (adata.copy() for _ in range(4))
    count.X.data[0] += 1
    label.obs["cell_type"] = label.obs["cell_type"].cat.rename_categories({"type 0": "other"})
    barcode.obs_names = [f"x{name}" for name in adata.obs_names]
    gene.var_names = [f"x{name}" for name in adata.var_names]
    assert len({fingerprint(cells) for cells in (adata, count, label, barcode, gene)}) == 5
    assert fingerprint(adata.copy()) == fingerprint(adata)


@pytest.fixture
def whole() -> ad.AnnData:
    whole = simulated_dataset(n_cells=101)
    whole.uns["dataset"], whole.obsm["proportions"] = "simulated", np.eye(101, 3)
    return whole


def test_counts_written_in_blocks_are_read_back_in_blocks(whole, tmp_path):
    cells = ad.AnnData(obs=whole.obs.assign(filled_later=0.0), var=whole.var, uns=whole.uns, obsm=whole.obsm)

    def blocks():
        for rows, block in row_blocks(whole.X, size=40):
            cells.obs.iloc[rows, -1] = np.asarray(block.sum(axis=1)).ravel()
            yield block

    write_blocks(cells, blocks(), tmp_path / "cells.h5ad")
    on_disk = read_counts(tmp_path / "cells.h5ad", "-")
    assert on_disk.isbacked and n_entries(on_disk.X) == n_entries(whole.X) == whole.X.nnz
    np.testing.assert_array_equal(on_disk.obs["filled_later"], np.asarray(whole.X.sum(axis=1)).ravel())
    some = select_cells(on_disk, np.array([3, 50, 100]))
    np.testing.assert_array_equal(some.X.toarray(), whole.X[[3, 50, 100]].toarray())
    assert list(some.obs_names) == list(whole.obs_names[[3, 50, 100]])


@pytest.mark.parametrize("write", [write_h5ad, lambda cells, path: write_blocks(cells, [cells.X], path)])
def test_written_cells_can_be_used_in_backed_mode(whole, tmp_path, write):
    write(whole, tmp_path / "cells.h5ad")
    some = ad.read_h5ad(tmp_path / "cells.h5ad", backed="r")[:50].to_memory()
    np.testing.assert_array_equal(some.X.toarray(), whole.X[:50].toarray())
    np.testing.assert_array_equal(some.obsm["proportions"], np.eye(50, 3))
    assert some.raw is None and list(some.obs["cell_type"]) == list(whole.obs["cell_type"][:50])


@pytest.mark.parametrize(("part", "value"), [("indices", 60), ("indices", -1), ("indptr", 10_000)])
def test_a_block_that_is_not_valid_is_refused_when_it_is_read(whole, tmp_path, part, value):
    write_h5ad(whole, tmp_path / "cells.h5ad")  # of 60 genes
    with h5py.File(tmp_path / "cells.h5ad", "a") as file:
        file[f"X/{part}"][45] = value
    blocks = row_blocks(read_counts(tmp_path / "cells.h5ad", "-").X, size=40)
    with pytest.raises(ValueError, match="cells.h5ad could not be read .*expected valid sparse counts"):
        list(blocks)


def test_only_blocks_with_selected_rows_are_read():
    counts = sp.csr_matrix(np.arange(10_000)[:, None] + 1)
    rows = np.array([5, 4097, 9_999])
    parts = list(selected_blocks(counts, rows))
    assert len(parts) == 3 and [places for _, places in parts] == [slice(0, 1), slice(1, 2), slice(2, 3)]
    np.testing.assert_array_equal(sp.vstack([block for block, _ in parts]).toarray().ravel(), rows + 1)


def test_a_block_that_fails_leaves_the_old_file(whole, tmp_path):
    path = tmp_path / "cells.h5ad"
    write_blocks(whole, [whole.X], path)

    def broken():
        yield whole.X[:5]
        raise OSError("disk full")

    with pytest.raises(OSError, match="the old file, if any, is untouched"):
        write_blocks(whole, broken(), path)
    assert ad.read_h5ad(path).n_obs == 101 and [p.name for p in tmp_path.iterdir()] == ["cells.h5ad"]


def test_cells_are_selected_by_type_and_a_types_only_cell_is_never_held_out():
    types = np.repeat([0, 1, 2, -1], [40, 10, 1, 9])  # -1: unknown
    selected = select_per_type(types, 0.25, np.random.default_rng(0))
    assert np.bincount(types[selected]).tolist() == [10, 2, 1] and not selected[types == -1].any()
    held_out = hold_out(types, 0.25, np.random.default_rng(0))
    np.testing.assert_array_equal(held_out, selected & (types != 2))  # the same random numbers
    assert np.bincount(types[hold_out(types, 0.01, np.random.default_rng(0))]).tolist() == [1, 1]
    assert not hold_out(np.full(5, -1), 0.5, np.random.default_rng(0)).any()


def test_mtx_has_the_papers_form(tmp_path):
    """Read as the paper's code reads it: scanpy's read_mtx and its transpose, integer clusters in the column `partition`."""
    cells = simulated_dataset(n_cells=50)
    cells.obs["sample"] = "A"
    cells = cells[cells.obs["cell_type"] != "type 1"].copy()
    cells.obs["cell_type"] = cells.obs["cell_type"].cat.set_categories(["type 0", "type 1", "type 2"])
    folder = write_mtx(cells, tmp_path / "cells")
    np.testing.assert_array_equal(sc.read_mtx(folder / "counts.mtx").T.X.toarray(), cells.X.toarray())
    assert list(pd.read_csv(folder / "genes.csv")["gene"]) == list(cells.var_names)
    clusters = pd.read_csv(folder / "clusters.csv")
    assert list(clusters.columns) == ["barcode", "partition", "cell_type", "sample"]
    assert clusters["partition"].dtype == np.int64 and list(clusters["barcode"]) == list(cells.obs_names)
    assert [f"type {k}" for k in clusters["partition"]] == list(cells.obs["cell_type"]) == list(clusters["cell_type"])
