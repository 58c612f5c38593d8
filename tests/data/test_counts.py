"""Count files: counts are checked, written and read in blocks, fingerprinted, and selected by type."""

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scanpy as sc
import scipy.sparse as sp
from helpers import read_dataset, simulated_dataset

from lib.data.counts import (
    fingerprint,
    hold_out,
    log_normalize,
    n_entries,
    read_counts,
    row_blocks,
    select_cells,
    select_per_type,
    write_blocks,
    write_mtx,
)
from lib.data.streams import CellStream


def stream(matrix) -> CellStream:
    barcodes, genes = ([f"{kind}{i}" for i in range(n)] for kind, n in zip("cg", matrix.shape))
    return CellStream(pd.DataFrame(index=barcodes), pd.Index(genes), [sp.csr_matrix(matrix)], "the matrix")


@pytest.mark.parametrize(
    ("matrix", "message"),
    [
        ([[0.0, 1.5], [2.0, 0.0]], "looks log-normalised: 50% of its non-zero values"),
        ([[0.0, 150.5], [2.0, 0.0]], "looks normalised"),
        ([[0.0, -1.0], [2.0, 0.0]], "negative"),
        ([[0.0, np.nan], [2.0, 0.0]], "NaN"),
        ([[0.0, 0.0], [0.0, 0.0]], "zeros only"),
        ([[0.0, 2.0**24]], "holds counts up to 16,777,216; expected less than 16,777,216"),
        (np.empty((0, 4)), "is empty: got 0 cells x 4 genes"),
    ],
)
def test_what_is_not_counts_is_refused(matrix, message):
    with pytest.raises(ValueError, match=message):
        stream(np.array(matrix)).tidy().in_memory()


def test_counts_come_out_as_clean_csr():
    dirty = sp.csr_matrix((np.array([0, 3, 2], dtype=np.int64), ([0, 1, 1], [0, 2, 1])), shape=(2, 3))
    counts = stream(dirty).tidy().in_memory().X
    assert counts.format == "csr" and counts.dtype == np.float32 and counts.nnz == 2 and counts.has_sorted_indices
    np.testing.assert_array_equal(counts.toarray(), [[0, 0, 0], [0, 2, 3]])


def test_the_largest_count_that_float32_holds_exactly_is_accepted():
    assert stream(np.array([[0, 2**24 - 1]])).tidy().in_memory().X.max() == 2**24 - 1


def test_log_normalisation_by_hand():
    found = log_normalize(sp.csr_matrix([[1.0, 0.0], [0.0, 0.0], [3.0, 1.0]]), 4)
    np.testing.assert_allclose(found.toarray(), np.log([[5, 1], [1, 1], [4, 2]]), rtol=1e-6)


def test_duplicate_genes_are_summed_with_a_message(capsys):
    cells = CellStream(
        pd.DataFrame(index=["c"]), pd.Index(["A", "B", "A"]), [sp.csr_matrix([[1.0, 2.0, 3.0]])], "-"
    ).tidy()
    np.testing.assert_array_equal(cells.in_memory().X.toarray(), [[4, 2]])
    assert list(cells.gene_names) == ["A", "B"]
    assert "1 duplicate gene names (such as A): their counts are summed" in capsys.readouterr().out


def test_the_fingerprint_changes_with_anything_that_matters():
    adata = simulated_dataset(n_cells=30)
    prints = {fingerprint(adata)}
    other = adata.copy()
    other.X[0, other.X[0].indices[0]] += 1
    prints.add(fingerprint(other))
    prints.add(fingerprint(ad.AnnData(adata.X, obs=adata.obs.set_axis([f"x{i}" for i in range(30)]), var=adata.var)))
    other = adata.copy()
    other.obs["cell_type"] = other.obs["cell_type"].cat.rename_categories({"type 0": "other"})
    prints.add(fingerprint(other))
    prints.add(
        fingerprint(ad.AnnData(adata.X, obs=adata.obs, var=adata.var.set_axis([f"x{i}" for i in range(adata.n_vars)])))
    )
    assert len(prints) == 5 and fingerprint(adata.copy()) in prints


def test_log_normalize_by_hand():
    np.testing.assert_allclose(
        log_normalize(sp.csr_matrix([[1.0, 3.0], [0.0, 0.0]]), 100).toarray(),
        [[np.log(26), np.log(76)], [0, 0]],
        rtol=1e-6,
    )


def test_counts_written_in_blocks_are_read_back_in_blocks(tmp_path):
    whole = simulated_dataset(n_cells=101)
    whole.uns["dataset"] = "simulated"
    cells = ad.AnnData(obs=whole.obs.assign(filled_later=0.0), var=whole.var, uns=whole.uns)

    def blocks():
        for rows, block in row_blocks(whole.X, size=40):
            cells.obs.iloc[rows, -1] = np.asarray(block.sum(axis=1)).ravel()
            yield block

    write_blocks(cells, blocks(), tmp_path / "cells.h5ad")
    on_disk = read_counts(tmp_path / "cells.h5ad", "-")
    assert on_disk.isbacked and n_entries(on_disk.X) == n_entries(whole.X) == whole.X.nnz
    np.testing.assert_array_equal(ad.read_h5ad(tmp_path / "cells.h5ad").X.toarray(), whole.X.toarray())
    np.testing.assert_array_equal(on_disk.obs["filled_later"], np.asarray(whole.X.sum(axis=1)).ravel())
    some = select_cells(on_disk, np.array([3, 50, 100]))
    np.testing.assert_array_equal(some.X.toarray(), whole.X[[3, 50, 100]].toarray())
    assert list(some.obs_names) == list(whole.obs_names[[3, 50, 100]])


def test_a_block_that_fails_leaves_the_old_file(tmp_path):
    whole = simulated_dataset(n_cells=20)
    whole.uns["dataset"] = "simulated"
    path = tmp_path / "cells.h5ad"
    write_blocks(whole, [whole.X], path)

    def broken():
        yield whole.X[:5]
        raise OSError("disk full")

    with pytest.raises(OSError, match="the old file, if any, is untouched"):
        write_blocks(whole, broken(), path)
    assert ad.read_h5ad(path).n_obs == 20 and [p.name for p in tmp_path.iterdir()] == ["cells.h5ad"]


# Selection by type

TYPES = np.repeat([0, 1, 2, -1], [40, 10, 1, 9])  # -1: unknown


def test_this_fraction_of_each_type_is_selected():
    selected = select_per_type(TYPES, 0.25, np.random.default_rng(0))
    assert np.bincount(TYPES[selected]).tolist() == [10, 2, 1] and not selected[TYPES == -1].any()


def test_a_types_only_cell_is_never_held_out():
    selected = select_per_type(TYPES, 0.25, np.random.default_rng(0))
    held_out = hold_out(TYPES, 0.25, np.random.default_rng(0))
    np.testing.assert_array_equal(held_out, selected & (TYPES != 2))  # the same random numbers
    assert np.bincount(TYPES[hold_out(TYPES, 0.01, np.random.default_rng(0))]).tolist() == [1, 1]
    assert not hold_out(np.full(5, -1), 0.5, np.random.default_rng(0)).any()


def test_hold_out_leaves_the_random_stream_where_select_per_type_does():
    a, b = np.random.default_rng(7), np.random.default_rng(7)
    select_per_type(TYPES, 0.25, a), hold_out(TYPES, 0.25, b)
    assert a.random() == b.random()


def test_mtx_has_the_papers_form(tmp_path):
    """Read as the paper's code reads it: scanpy's read_mtx and its transpose, integer clusters in the column `partition`."""
    cells = simulated_dataset(n_cells=50)
    cells.obs["sample"] = "A"
    cells = cells[cells.obs["cell_type"] != "type 1"].copy()
    cells.obs["cell_type"] = cells.obs["cell_type"].cat.set_categories(["type 0", "type 1", "type 2"])
    folder = write_mtx(cells, tmp_path / "cells")
    read = sc.read_mtx(folder / "counts.mtx").T
    np.testing.assert_array_equal(read.X.toarray(), cells.X.toarray())
    assert list(pd.read_csv(folder / "genes.csv")["gene"]) == list(cells.var_names)
    clusters = pd.read_csv(folder / "clusters.csv")
    assert list(clusters.columns) == ["barcode", "partition", "cell_type", "sample"]
    assert clusters["partition"].dtype == np.int64 and list(clusters["barcode"]) == list(cells.obs_names)
    assert [f"type {k}" for k in clusters["partition"]] == list(cells.obs["cell_type"]) == list(clusters["cell_type"])
    again = read_dataset(folder)  # stage 0 takes it
    np.testing.assert_array_equal(again.X.toarray(), cells.X.toarray())
    assert list(again.obs["cell_type"]) == list(cells.obs["cell_type"])
