"""Every format gives the same counts, labels go to their cells, and values that are not counts are refused."""

import csv
import os
import time

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from formats import BARCODES, COUNTS, GENES, IDS, TYPES, cellranger_2, cellranger_h5, write_lines, write_mtx
from helpers import Workplace, fingerprint, read_dataset, simulated_dataset

from lib.data import readers
from lib.data.counts import BLOCK_CELLS
from lib.data.labels import read_labels
from lib.data.readers import check_foreign, open_dataset, read_count_table, read_gene_lengths
from lib.data.tables import read_table

LOG_NORMALIZED = np.log1p(COUNTS / COUNTS.sum(axis=1, keepdims=True) * 1e4)


def cells(matrix=COUNTS, **parts) -> ad.AnnData:
    return ad.AnnData(matrix, obs=pd.DataFrame(index=BARCODES), var=pd.DataFrame(index=GENES), **parts)


# --- one writer for each format: it writes COUNTS into the folder and returns the path that the user would give


def h5ad(folder, adata=None, raw=None, genes=slice(None), **options):
    adata = cells() if adata is None else adata
    adata.raw = raw
    adata[:, genes].copy().write_h5ad(folder / "cells.h5ad", **options)
    return folder / "cells.h5ad"


def h5ad_legacy(folder):
    """As anndata wrote before 0.7: obs is one table, X a group of another encoding."""
    with h5py.File(folder / "cells.h5ad", "w") as file:
        for name, names in (("obs", BARCODES), ("var", GENES)):
            file[name] = np.array([(n.encode(),) for n in names], dtype=[("index", "S20")])
        group, counts = file.create_group("X"), sp.csr_matrix(COUNTS, dtype=np.float32)
        group.attrs["h5sparse_format"], group.attrs["h5sparse_shape"] = "csr", COUNTS.shape
        group["data"], group["indices"], group["indptr"] = counts.data, counts.indices, counts.indptr
    return folder / "cells.h5ad"


def zarr(folder, form, **parts):
    cells(form(COUNTS), **parts).write_zarr(folder / "cells.zarr")
    return folder / "cells.zarr"


def cellranger_3(folder):
    write_mtx(folder / "matrix.mtx.gz", np.vstack([COUNTS.T, [99] * 12]))
    lines = [f"{i}\t{gene}\tGene Expression" for i, gene in zip(IDS, GENES)]
    write_lines(folder / "features.tsv.gz", [*lines, "CD3\tCD3\tAntibody Capture"])
    write_lines(folder / "barcodes.tsv.gz", BARCODES)
    return folder


def one_mtx_of_two(folder):
    write_mtx(folder / "another.mtx", [[1]])
    return cellranger_2(folder) / "matrix.mtx"


def original(folder):
    """As bulk2sc_GMVAE writes its train cells: genes x cells."""
    write_mtx(folder / "matrix_lung_train.mtx", COUNTS.T, field="real")
    write_lines(folder / "genes_lung_train.tsv", GENES)
    write_lines(folder / "barcodes_lung_train.tsv", BARCODES)
    write_lines(folder / "cluster_lung_train.csv", ["partition", *TYPES])
    return folder


def of_stage_5(folder):
    write_mtx(folder / "counts.mtx", COUNTS.T)
    write_lines(folder / "genes.csv", ["gene", *GENES])
    write_lines(folder / "clusters.csv", ["barcode,cluster", *(f"{b},{t}" for b, t in zip(BARCODES, TYPES))])
    return folder


def delimited(name: str, genes_in_rows: bool, r: str = ""):
    """As pandas writes it, or R's write.csv, or its write.table, which does not name the column of row names."""

    def write(folder):
        table, sep = (cells().to_df().T if genes_in_rows else cells().to_df()), "," if ".csv" in name else "\t"
        lines = table.to_csv(sep=sep, quoting=csv.QUOTE_NONNUMERIC if r else csv.QUOTE_MINIMAL).splitlines()
        write_lines(folder / name, [lines[0].removeprefix('""' + sep) if r == "write.table" else lines[0], *lines[1:]])
        return folder / name

    return write


FORMATS = {
    "h5ad": h5ad,
    "h5ad, by cell, gzip": lambda folder: h5ad(folder, cells(sp.csr_matrix(COUNTS)), compression="gzip"),
    "h5ad, by gene": lambda folder: h5ad(folder, cells(sp.csc_matrix(COUNTS, dtype=np.int64))),
    "h5ad, raw.X": lambda folder: h5ad(folder, cells(LOG_NORMALIZED), cells(sp.csr_matrix(COUNTS)), slice(3)),
    "h5ad, X beside a normalised raw.X": lambda folder: h5ad(folder, raw=cells(LOG_NORMALIZED)),
    "h5ad, layers": lambda folder: h5ad(folder, cells(LOG_NORMALIZED, layers={"counts": COUNTS})),
    "h5ad, legacy": h5ad_legacy,
    "zarr": lambda folder: zarr(folder, lambda x: sp.csr_matrix(x * 0.5), layers={"counts": sp.csr_matrix(COUNTS)}),
    "zarr, by gene": lambda folder: zarr(folder, sp.csc_matrix),
    "zarr, dense": lambda folder: zarr(folder, np.asarray),
    "10x h5": cellranger_h5,
    "Cell Ranger 2": cellranger_2,
    "Cell Ranger 3": cellranger_3,
    "one mtx of two": one_mtx_of_two,
    "original": original,
    "stage 5": of_stage_5,
    "csv, genes in rows": delimited("counts.csv", True),
    "csv.gz, cells in rows": delimited("counts.csv.gz", False),
    "tsv, cells in rows": delimited("counts.tsv", False),
    "R's write.csv": delimited("counts.csv", True, "write.csv"),
    "R's write.table, tab": delimited("counts.txt", False, "write.table"),
}


@pytest.mark.filterwarnings("ignore:.*very old version of AnnData", "ignore:Writing zarr v2")
@pytest.mark.parametrize("write", FORMATS.values(), ids=FORMATS)
def test_every_format_gives_the_same_counts(tmp_path, monkeypatch, write):
    monkeypatch.setattr(readers, "CSV_BLOCK_ROWS", 5)
    adata = read_dataset(write(tmp_path))
    assert sp.issparse(adata.X) and adata.X.format == "csr" and adata.X.dtype == np.float32
    np.testing.assert_array_equal(adata.X.toarray(), COUNTS)
    assert list(adata.obs_names) == BARCODES and list(adata.var_names) == GENES
    if write in (original, of_stage_5):
        assert adata.obs["cell_type"].tolist() == TYPES


@pytest.mark.parametrize("form", [sp.csr_matrix, sp.csc_matrix, np.asarray])
def test_an_h5ad_is_read_in_blocks_and_written_as_the_same_counts(tmp_path, form):
    adata, path, place = simulated_dataset(n_cells=4146, n_genes=20), tmp_path / "cells.h5ad", Workplace(tmp_path / "x")
    stored = ad.AnnData(form(adata.X.toarray()), obs=adata.obs, var=adata.var)
    stored.write_h5ad(path)
    assert [block.shape[0] for block in open_dataset(path).blocks] == [BLOCK_CELLS, BLOCK_CELLS, 50]
    place.main("_0_download_data.py", DATASET=str(path))
    counts = ad.read_h5ad(place.data / "counts.h5ad")
    np.testing.assert_array_equal(counts.X.toarray(), adata.X.toarray())
    assert counts.uns["counts_id"] == fingerprint(adata)  # blocks or whole: the same digits
    stored.X = adata.X.copy()
    stored.X.data[-1] = 0.5  # only the first cells decide which matrix is read
    stored.write_h5ad(path)
    with pytest.raises(ValueError, match="X of .*cells.h5ad, cells 4,097 to 4,146, .*fractions"):
        place.main("_0_download_data.py", DATASET=str(path))


@pytest.mark.filterwarnings("ignore:.* names are not unique")
@pytest.mark.parametrize("name", ["cells.h5ad", "genes_in_rows.csv", "cells_in_rows.csv"])
def test_duplicate_genes_are_summed_and_duplicate_barcodes_made_unique(tmp_path, capsys, name):
    genes, barcodes = ["ACTB", "GAPDH", "ACTB", "B2M", "CD3E", "ACTB", "NKG7", "LYZ"], ["x", "y", "x", *BARCODES[3:]]
    frame = pd.DataFrame(COUNTS, barcodes, genes)
    if name == "cells.h5ad":
        h5ad(tmp_path, ad.AnnData(COUNTS, obs=frame[[]], var=frame.T[[]]))
    else:
        (frame.T if name.startswith("genes") else frame).to_csv(tmp_path / name)
    adata = read_dataset(tmp_path / name)
    summed = np.column_stack([COUNTS[:, [0, 2, 5]].sum(axis=1), COUNTS[:, [1, 3, 4, 6, 7]]])
    np.testing.assert_array_equal(adata.X.toarray(), summed)
    assert list(adata.var_names) == ["ACTB", "GAPDH", "B2M", "CD3E", "NKG7", "LYZ"]
    assert list(adata.obs_names) == ["x", "y", "x-1", *BARCODES[3:]]
    printed = capsys.readouterr().out
    assert "1 duplicate gene names (such as ACTB)" in printed and "1 duplicate barcodes (such as x)" in printed


def test_stored_zeros_and_duplicate_entries_are_tidied(tmp_path):
    dirty = sp.csr_matrix(([0.0, 3, 2, 1], [0, 2, 1, 2], [0, 1, 4]), shape=(2, 3))
    ad.AnnData(sp.csr_matrix((2, 3)), layers={"counts": dirty}).write_h5ad(tmp_path / "cells.h5ad")
    counts = read_dataset(tmp_path / "cells.h5ad").X
    assert counts.nnz == 2 and counts.has_sorted_indices
    np.testing.assert_array_equal(counts.toarray(), [[0, 0, 0], [0, 2, 4]])


# --- what is refused


def edited(value):
    matrix = COUNTS.astype(np.float64)
    matrix[1, 1] = value
    return matrix


@pytest.mark.parametrize(
    ("matrix", "message"),
    [
        (LOG_NORMALIZED, "looks log-normalised: .*expected raw counts"),
        (COUNTS / 3, "looks normalised or corrected"),
        (edited(-1), "holds negative values"),
        (edited(np.nan), "holds 1 values that are NaN or infinite"),
        (edited(2**24), "holds counts up to 16,777,216; expected less than 16,777,216"),
    ],
)
@pytest.mark.parametrize("name", ["cells.h5ad", "cells.csv"])
def test_values_that_are_not_counts_are_refused(tmp_path, matrix, message, name):
    if name == "cells.h5ad":
        h5ad(tmp_path, cells(matrix))
    else:
        pd.DataFrame(matrix, BARCODES, GENES).to_csv(tmp_path / name)
    with pytest.raises(ValueError, match=f"{name}.* {message}"):
        read_dataset(tmp_path / name)


def test_counts_up_to_the_largest_that_float32_holds_exactly_are_accepted(tmp_path):
    assert read_dataset(h5ad(tmp_path, cells(edited(2**24 - 1)))).X[1, 1] == 2**24 - 1


@pytest.mark.parametrize(
    ("adata", "raw", "message"),
    [
        (cells(LOG_NORMALIZED, layers={"counts": -COUNTS}), cells(LOG_NORMALIZED),
         r"layers\['counts'\] of .* negative .*raw.X of .* log-normalised.*; X of .* log-normalised"),
        (cells()[:0], None, "is empty: got 0 cells x 8 genes"),
        (cells()[:, :0], None, "is empty: got 12 cells x 0 genes"),
        (cells(COUNTS * 0), None, "has counts of 12 cells, 0 above 0"),
        (cells().T, None, r"cells.h5ad looks transposed: its rows have gene names \(ACTB, GAPDH, MALAT1\)"),
    ],
)  # fmt: skip
def test_an_h5ad_without_counts_of_cells_is_refused(tmp_path, adata, raw, message):
    with pytest.raises(ValueError, match=message):
        read_dataset(h5ad(tmp_path, adata.copy(), raw))


@pytest.mark.parametrize("form", [sp.csr_matrix, sp.csc_matrix])
@pytest.mark.parametrize(
    ("part", "place", "added"),
    [("indices", 3, 99), ("indices", 3, -99), ("indptr", 3, -99), ("indptr", -1, -1), ("indptr", 0, 1)],
)
def test_a_sparse_matrix_that_is_not_valid_is_refused(tmp_path, form, part, place, added):
    """Counts are not taken from X in its place."""
    path = h5ad(tmp_path, cells(form(COUNTS), layers={"counts": form(COUNTS)}))
    with h5py.File(path, "a") as file:
        file[f"layers/counts/{part}"][place] += added
    for read in (read_dataset, check_foreign):
        with pytest.raises(ValueError, match="cells.h5ad could not be read"):
            read(path)


@pytest.mark.parametrize("form", [sp.csr_matrix, sp.csc_matrix, np.asarray])
def test_a_matrix_of_another_shape_than_its_names_is_refused(tmp_path, form):
    path = h5ad(tmp_path, cells(form(COUNTS)))
    with h5py.File(path, "a") as file:
        names, attributes = file["obs/_index"][:-1], dict(file["obs/_index"].attrs)
        del file["obs/_index"]
        file["obs/_index"] = names
        file["obs/_index"].attrs.update(attributes)
    with pytest.raises(ValueError, match=r"X of .*cells.h5ad is damaged: .*shape \(12, 8\), expected \(11, 8\)"):
        read_dataset(path)


@pytest.mark.parametrize(
    ("way", "message"), [(lambda _: time.sleep(60), "does not finish"), (lambda _: os._exit(139), "crashes")]
)
def test_a_file_on_which_hdf5_loops_or_crashes_is_refused(tmp_path, monkeypatch, way, message):
    """Such files exist, but depend on the version of HDF5."""
    monkeypatch.setattr(readers, "_read_structure", way)
    monkeypatch.setattr(readers, "CHECK_S", 0.5)
    with pytest.raises(ValueError, match=f"cells.h5ad is damaged: HDF5 {message}"):
        read_dataset(h5ad(tmp_path))


READERS = {"counts": read_dataset, "table": read_table, "lengths": read_gene_lengths}


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("counts.csv", "gene,symbol,c1,c2\n1,ACTB,3,4\n2,B2M,5,6\n", "column 'symbol' does not hold numbers"),
        ("counts.csv", ",c1,c2\nACTB,3,\nB2M,5,6\n", "1 values that are NaN"),
        ("counts.csv", ",c1,c2\nACTB,3,4\nB2M,5\n", "1 values that are NaN"),
        ("counts.csv", ",c1,c2\nACTB,3,4\nB2M,5,6,7\n", "could not be read"),
        ("counts.csv", ",c1,c2\nACTB,3,4\nB2M,5\0,6\n", "bytes that are no text"),
        ("counts.csv", ',c1,c2\n"ACTB,1,2\nB2M",3,4\n', "line break"),
        ("counts.csv", ",c1,c2\n", "it has no rows"),
        ("counts.csv", "\nACTB,3\n,\n", "no header"),
        ("counts.csv", "", "could not be read"),
        ("counts.csv", ",c1,c2\nfoo,3,4\nbar,5,6\n", r"cannot tell genes from cells: .*rows: foo, bar; columns: c1, c2\)"),
        ("counts.xlsx", "", r"has an unknown format; expected .h5ad, 10x .h5, .*\.csv"),
        ("table.csv", "a,b\n1,2\n3\n", "its row 3 has 1 fields, others have 2"),
        ("table.csv", "a,b\n1,2\n3,4,5\n", "its row 3 has 3 fields"),
        ("table.csv", 'a,b\n1,"2\n3,4\n5,6"\n', "line breaks"),
        ("table.csv", "a,a\n1,2\n", "two columns called 'a'"),
        ("table.csv", "a,b\n1\0,2\n", "bytes that are no text"),
        ("lengths.csv", "gene,strand,length\nA,+,1\n", "it has the columns gene, strand, length"),
        ("lengths.csv", "gene\nA\n", "it has the columns gene"),
        ("lengths.csv", "gene,length\nA,long\n", "'long'"),
    ],
)  # fmt: skip
def test_bad_tables_are_refused(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=f"{name}.*{message}"):
        READERS[name.partition(".")[0]](tmp_path / name)


@pytest.mark.parametrize("orientation", ["genes_in_rows", "cells_in_rows"])
def test_a_given_orientation_is_used(tmp_path, orientation):
    expected = pd.DataFrame([[3, 4, 0], [5, 6, 1]], ["foo", "bar"], ["a", "b", "c"])
    expected.to_csv(tmp_path / "counts.csv")
    table = read_count_table(tmp_path / "counts.csv", orientation).to_df()
    assert (table.T if orientation == "genes_in_rows" else table).equals(expected.astype(np.float32))


def test_mtx_folders_that_do_not_fit_are_refused(tmp_path):
    def refused(message):
        with pytest.raises(ValueError, match=message):
            read_dataset(tmp_path)

    refused("holds no file of counts, expected one")
    path = cellranger_2(tmp_path) / "matrix.mtx"
    lines = path.read_text().splitlines()
    for last in ([], [lines[-1]] * 2, ["41 1 3"], ["1 x 3"], ["1 2"]):
        write_lines(path, [*lines[:-1], *last])
        refused("matrix.mtx could not be read")
    write_mtx(path, COUNTS)
    refused("matrix.mtx has 12 rows and 8 columns, but the files beside it name 8 genes and 12 cells")
    (tmp_path / "genes.tsv").unlink()
    refused(r"holds no file of genes, expected one")
    write_mtx(tmp_path / "other.mtx", COUNTS)
    refused(r"holds matrix.mtx, other.mtx of counts, expected one")


# --- labels

ORDER = [5, 0, 7, 3, 11, 1, 9, 2, 10, 4, 8]  # not that of the counts, and cell 6 is missing
LABELLED = [None if i == 6 else cell_type for i, cell_type in enumerate(TYPES)]


def types_of(labels: pd.Series) -> list:
    return [None if pd.isna(cell_type) else cell_type for cell_type in labels]


def labels_of(folder, lines, key=None):
    write_lines(folder / "labels.txt", lines)
    return read_labels(folder / "labels.txt", pd.Index(BARCODES), key)["cell_type"]


@pytest.mark.parametrize(
    ("header", "line"),
    [
        ("barcode,cell_type", "{b},{t}"),
        ("cell.barcode\tcelltype\tID\tGEO_Sample", "{b}\t{t}\tdonor{i}\tGSM1"),
        ('"","Cell Type"', '"{b}","{t}"'),
        ('"celltype"\t"ID"', '"{b}"\t"{t}"\t"donor{i}"'),
        ("x,y", "{b},{t}"),
        ('"barcode"\t"celltype"', '"{i}"\t"{b}"\t"{t}"'),
    ],
)
def test_labels_go_to_their_barcodes(tmp_path, header, line):
    labels = labels_of(tmp_path, [header, *(line.format(i=i, b=BARCODES[i], t=TYPES[i]) for i in ORDER)])
    assert list(labels.index) == BARCODES and types_of(labels) == LABELLED


@pytest.mark.parametrize(
    "clusters",
    [
        ["partition", *TYPES],
        [",partition", *(f"{i},{t}" for i, t in enumerate(TYPES))],
        ["barcode,cluster", *(f"cell_{12 - i},{t}" for i, t in enumerate(TYPES))],  # the reader numbers cells from 1
    ],
)
def test_without_barcodes_labels_follow_the_order_of_the_cells(tmp_path, capsys, clusters):
    assert labels_of(tmp_path, clusters).tolist() == TYPES
    assert "no barcode of the counts: its rows are taken in the order of the cells" in capsys.readouterr().out
    (tmp_path / "labels.txt").unlink()
    original(tmp_path)
    (tmp_path / "barcodes_lung_train.tsv").unlink()
    write_lines(tmp_path / "cluster_lung_train.csv", clusters)
    assert read_dataset(tmp_path).obs["cell_type"].tolist() == TYPES
    for column in ("Barcode", "", "cell"):  # barcodes of the cells, where no other file has them
        lines = [f"{column},cluster", *(f"{b},{t}" for b, t in zip(BARCODES, TYPES))]
        write_lines(tmp_path / "cluster_lung_train.csv", lines)
        assert list(read_dataset(tmp_path).obs_names) == BARCODES
    write_lines(tmp_path / "cluster_lung_train.csv", clusters[:-1])
    with pytest.raises(ValueError, match="none of its 11 rows has one of the 12 barcodes|name 8 genes and 11 cells"):
        read_dataset(tmp_path)


TWO_KEYS = ["barcode,cell_type,cell_type_fine,n", *(f"{b},{t},{t} fine,1" for b, t in zip(BARCODES, TYPES))]


@pytest.mark.parametrize(
    ("lines", "key", "message"),
    [
        (["barcode,cell_type", *(f"other{i},T" for i in range(11))], None, "labels other cells: none of its 11 rows"),
        (["barcode,cell_type"], None, "labels.txt"),
        (["barcode,cell_type", f"{BARCODES[0]},T", f"{BARCODES[0]},B"], None, "two different rows for 1 cells"),
        (TWO_KEYS, None, "cannot tell which column holds the cell types; it has cell_type, cell_type_fine, n"),
        (TWO_KEYS, "louvain", "has no column 'louvain'; it has cell_type, cell_type_fine, n: set CELL_TYPE_KEY"),
    ],
)
def test_labels_that_do_not_fit_are_refused(tmp_path, lines, key, message):
    with pytest.raises(ValueError, match=message):
        labels_of(tmp_path, lines, key)
    assert labels_of(tmp_path, TWO_KEYS, "cell_type_fine").tolist() == [f"{t} fine" for t in TYPES]


def test_words_that_mean_no_label(tmp_path):
    words = "T,1_Unicorns and artifacts,NA,,nan,Unknown,unassigned, B ,None,NK,Unlabelled,Nana".split(",")
    labels = labels_of(tmp_path, ["barcode,cell_type", *(f"{b},{word}" for b, word in zip(BARCODES, words))])
    assert labels.dropna().to_dict() == {BARCODES[0]: "T", BARCODES[7]: "B", BARCODES[9]: "NK", BARCODES[11]: "Nana"}


def test_cell_type_key_and_labels_file_of_stage_0(tmp_path):
    adata = cells()
    adata.obs["cell_type"], adata.obs["louvain"] = "all", TYPES
    path, place = h5ad(tmp_path, adata), Workplace(tmp_path / "place")

    def types(**constants):
        place.main("_0_download_data.py", DATASET=str(path), **constants)
        return types_of(ad.read_h5ad(place.data / "counts.h5ad").obs["cell_type"])

    write_lines(tmp_path / "labels.csv", ["barcode,cell_type", *(f"{BARCODES[i]},{TYPES[i]}" for i in ORDER)])
    assert set(types()) == {"all"} and types(CELL_TYPE_KEY="louvain") == TYPES
    assert types(LABELS_FILE=str(tmp_path / "labels.csv")) == LABELLED
    with pytest.raises(ValueError, match="obs has no column 'leiden'; it has cell_type, louvain: set CELL_TYPE_KEY"):
        types(CELL_TYPE_KEY="leiden")


# --- gene lengths


@pytest.mark.parametrize(
    "lines",
    [
        ["Gene start (bp),Gene name,Transcript start (bp),Transcript end (bp)",
         "1,ACTB,200,1700", "1,ACTB,9,90", "1,LYZ,7,7", "1,B2M,10,90"],
        ["gene,length", "ACTB,1500", "B2M,80", "ACTB,1200", "LYZ,NA"],
        ["ACTB\t1500", "B2M\t80"],
    ],
)  # fmt: skip
def test_the_longest_transcript_is_the_length_of_a_gene(tmp_path, lines):
    """By hand: 1700 - 200 and 90 - 10; a length of 0 cannot be divided by."""
    write_lines(tmp_path / "lengths.txt", lines)
    lengths = read_gene_lengths(tmp_path / "lengths.txt")
    assert lengths.to_dict() == {"ACTB": 1500, "B2M": 80} and lengths.name == "gene_length_bp"
