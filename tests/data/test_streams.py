"""Counts of every storage order arrive by cell, whatever their number; zarr; what is read of an HDF5 file, and how often."""

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.io
import scipy.sparse as sp
from helpers import Workplace, read_dataset, simulated_dataset

import lib.data.anndata_files
import lib.data.hdf5
import lib.data.mtx
import lib.data.streams
from lib.data.counts import fingerprint
from lib.data.readers import open_dataset
from lib.data.streams import Entries, sorted_by_cell

CELLS = simulated_dataset(n_cells=150, n_genes=40)


@pytest.fixture
def small_parts(monkeypatch):
    """Limits so small that these cells are read in many blocks and sorted in many parts."""
    for module, name, value in (
        (lib.data.streams, "BLOCK_CELLS", 16), (lib.data.streams, "ENTRIES_AT_ONCE", 400), (lib.data.mtx, "ENTRIES_AT_ONCE", 400),
        (lib.data.streams, "PART_ENTRIES", 300), (lib.data.streams, "MAX_PARTS", 7),
    ):  # fmt: skip
        monkeypatch.setattr(module, name, value)


def written(folder, form: str):
    adata = CELLS.copy()
    if form == "csr":
        adata.write_h5ad(folder / "cells.h5ad", compression="gzip")
    elif form == "csc":
        adata.X = adata.X.tocsc()
        adata.write_h5ad(folder / "cells.h5ad")
    elif form == "dense":
        adata.X = adata.X.toarray()
        adata.write_h5ad(folder / "cells.h5ad")
    elif form == "raw":
        adata.raw = adata
        adata.X = adata.X.log1p()
        adata[:, :5].copy().write_h5ad(folder / "cells.h5ad")
    elif form.startswith("zarr"):
        adata.X = {"zarr": sp.csr_matrix, "zarr, by gene": sp.csc_matrix, "zarr, dense": np.asarray}[form](
            adata.X if form != "zarr, dense" else adata.X.toarray()
        )
        adata.write_zarr(folder / "cells.zarr")
        return folder / "cells.zarr"
    else:
        counts = adata.X if form == "mtx, cells in rows" else adata.X.T
        scipy.io.mmwrite(
            folder / "matrix.mtx", sp.coo_matrix(counts.tocsr()), field="real" if "real" in form else "integer"
        )
        for name, names in (("genes", adata.var_names), ("barcodes", adata.obs_names)):
            (folder / f"{name}.txt").write_text("".join(f"{name}\n" for name in names))
        return folder
    return folder / "cells.h5ad"


FORMS = ["csr", "csc", "dense", "raw", "zarr", "zarr, by gene", "zarr, dense", "mtx", "mtx, real", "mtx, cells in rows"]


@pytest.mark.parametrize("form", FORMS)
def test_counts_in_many_blocks_are_the_same_counts(tmp_path, small_parts, form):
    cells = open_dataset(written(tmp_path, form), scratch=tmp_path)
    blocks = list(cells.blocks)
    assert len(blocks) > 5 and all(block.has_sorted_indices and block.dtype == np.float32 for block in blocks)
    np.testing.assert_array_equal(sp.vstack(blocks).toarray(), CELLS.X.toarray())
    assert list(cells.obs.index) == list(CELLS.obs_names) and list(cells.gene_names) == list(CELLS.var_names)
    if "mtx" not in form:
        assert cells.obs["cell_type"].tolist() == CELLS.obs["cell_type"].tolist()


@pytest.mark.parametrize("n_parts", [1, 2, 7])
def test_entries_in_random_order_are_sorted_and_repeated_ones_are_summed(tmp_path, monkeypatch, n_parts):
    monkeypatch.setattr(lib.data.streams, "PART_ENTRIES", -(-1000 // n_parts))
    rng = np.random.default_rng(0)
    cells, genes, values = rng.integers(0, 23, 1000), rng.integers(0, 5, 1000), rng.integers(1, 9, 1000)
    cells[cells == 11] = 12  # a cell without counts
    expected = np.zeros((23, 5))
    np.add.at(expected, (cells, genes), values)
    pieces = [Entries(cells[i : i + 90], genes[i : i + 90], values[i : i + 90]) for i in range(0, 1000, 90)]
    blocks = list(sorted_by_cell(pieces, (23, 5), 1000, tmp_path))
    np.testing.assert_array_equal(sp.vstack(blocks).toarray(), expected)
    assert not list(tmp_path.iterdir())  # the temporary files have no name


@pytest.mark.parametrize("form", ["csr", "csc", "zarr", "mtx"])
def test_stage_0_writes_the_same_file_from_every_form(tmp_path, small_parts, form):
    place = Workplace(tmp_path / "place")
    place.main("_0_download_data.py", DATASET=str(written(tmp_path, form)))
    adata = ad.read_h5ad(place.data / "counts.h5ad")
    np.testing.assert_array_equal(adata.X.toarray(), CELLS.X.toarray())
    own = ad.AnnData(CELLS.X, obs=CELLS.obs if form != "mtx" else CELLS.obs[[]], var=CELLS.var)
    assert adata.uns["counts_id"] == fingerprint(own)  # blocks or whole: the same digits
    with h5py.File(place.data / "counts.h5ad") as file:
        assert file["X/data"].compression == "gzip" and file["X/data"].shuffle and file["X/indptr"].dtype == np.int64


@pytest.mark.parametrize(("kind", "last_cell"), [("fractions", 0.5), ("negative", -1.0), ("NaN", np.nan)])
def test_what_is_no_count_in_the_last_cells_is_found_and_no_file_is_left(tmp_path, small_parts, kind, last_cell):
    """Only the first cells decide which matrix is read."""
    adata = CELLS.copy()
    adata.X.data[-1] = last_cell
    adata.write_h5ad(tmp_path / "cells.h5ad")
    place = Workplace(tmp_path / "place")
    with pytest.raises(ValueError, match=f"X of .*cells.h5ad, cells 145 to 150, .*{kind}"):
        place.main("_0_download_data.py", DATASET=str(tmp_path / "cells.h5ad"))
    assert [path.name for path in place.data.glob("*")] in ([], ["raw"])


def test_a_table_with_fewer_or_wrong_lines_than_it_declares_is_refused(tmp_path):
    path = written(tmp_path, "mtx") / "matrix.mtx"
    lines = path.read_text().splitlines()
    for changed, message in (
        (lines[:-1], "its header declares"), ([*lines, lines[-1]], "its header declares"),
        ([*lines[:-1], "41 1 3"], "row or column 41 of 40"),
        ([*lines[:-1], "1 x 3"], "could not be read"), ([*lines[:-1], "1 2"], "could not be read"),
    ):  # fmt: skip
        path.write_text("\n".join(changed) + "\n")
        with pytest.raises(ValueError, match=f"matrix.mtx could not be read.*{message}|{message}"):
            read_dataset(tmp_path)


@pytest.mark.parametrize(
    "header", ["coordinate pattern general", "coordinate integer symmetric", "array integer general"]
)
def test_rare_matrix_market_forms(tmp_path, header):
    """Square, genes x cells: entries without values, one triangle, and all entries column by column."""
    body = {"c": "2 2 2\n1 1\n2 1\n", "s": "2 2 2\n1 1 4\n2 1 5\n", "a": "2 2\n1\n2\n3\n4\n"}
    key = "a" if header[0] == "a" else "s" if "symmetric" in header else "c"
    (tmp_path / "matrix.mtx").write_text(f"%%MatrixMarket matrix {header}\n% a comment\n{body[key]}")
    (tmp_path / "genes.tsv").write_text("id1\tACTB\nid2\tB2M\n")
    (tmp_path / "barcodes.tsv").write_text("AC\nCA\n")
    expected = {"c": [[1, 1], [0, 0]], "s": [[4, 5], [5, 0]], "a": [[1, 2], [3, 4]]}[key]
    np.testing.assert_array_equal(read_dataset(tmp_path).X.toarray(), expected)


def test_a_zarr_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "cells.zarr").mkdir()
    with pytest.raises(ValueError, match=r"cells.zarr could not be read .*expected an AnnData in zarr format"):
        read_dataset(tmp_path / "cells.zarr")


def test_the_shape_of_a_matrix_must_be_that_of_its_names(tmp_path):
    path = written(tmp_path, "csr")
    with h5py.File(path, "a") as file:
        file["X"].attrs["shape"] = (149, 40)
        pointers = file["X/indptr"][:-1]
        del file["X/indptr"]
        file["X/indptr"] = pointers
        entries = int(pointers[-1])
        for name in ("data", "indices"):
            kept = file[f"X/{name}"][:entries]
            del file[f"X/{name}"]
            file[f"X/{name}"] = kept
    with pytest.raises(ValueError, match=r"has the shape \(149, 40\), expected \(150, 40\)"):
        read_dataset(path)


def test_a_legacy_h5ad_is_still_read(tmp_path):
    """As anndata wrote before 0.7: obs is one table, X a group of another encoding."""
    with h5py.File(tmp_path / "cells.h5ad", "w") as file:
        for name, names in (("obs", CELLS.obs_names), ("var", CELLS.var_names)):
            file[name] = np.array([(n.encode(),) for n in names], dtype=[("index", "S20")])
        group = file.create_group("X")
        group.attrs["h5sparse_format"], group.attrs["h5sparse_shape"] = "csr", CELLS.shape
        for name in ("data", "indices", "indptr"):
            group[name] = getattr(CELLS.X, name)
    adata = read_dataset(tmp_path / "cells.h5ad")
    np.testing.assert_array_equal(adata.X.toarray(), CELLS.X.toarray())
    assert list(adata.obs_names) == list(CELLS.obs_names)


def test_the_reading_process_ends_with_its_stream(tmp_path):
    cells = open_dataset(written(tmp_path, "csr"))
    stream = lib.data.hdf5.from_child(tmp_path, lambda: iter([1, 2, 3]))
    assert next(stream) == 1
    stream.close()  # neither waits nor fails
    with pytest.raises(ValueError, match="no such thing"):
        list(lib.data.hdf5.from_child(tmp_path, lambda: (_ for _ in ()).throw(ValueError("no such thing"))))
    assert cells.in_memory().n_obs == 150


def test_genes_of_a_stream_are_selected(tmp_path):
    cells = open_dataset(written(tmp_path, "csr"))
    mask = np.arange(40) % 3 == 0
    chosen = cells.select_genes(mask).in_memory()
    np.testing.assert_array_equal(chosen.X.toarray(), CELLS.X.toarray()[:, mask])
    pd.testing.assert_index_equal(chosen.var_names, CELLS.var_names[mask], check_names=False)
