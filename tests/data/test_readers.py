"""Every format gives the same counts, labels go to their cells, and values that are not counts are refused."""

import csv
import gzip
import os
import time

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.io
import scipy.sparse as sp
from helpers import Workplace, read_dataset, simulated_dataset

from lib.data import readers
from lib.data.counts import BLOCK_CELLS, fingerprint
from lib.data.labels import read_labels
from lib.data.readers import check_foreign, open_dataset, read_count_table, read_gene_lengths
from lib.data.tables import read_table

GENES = ["ACTB", "GAPDH", "MALAT1", "B2M", "CD3E", "CD19", "NKG7", "LYZ"]
BARCODES = [f"{a}{b}{c}-1" for a in "AC" for b in "CGT" for c in "GT"]
COUNTS = np.random.default_rng(0).poisson(1.5, (len(BARCODES), len(GENES))) * 7
COUNTS[0, 0] = 70_000  # more than 16 bits
LOG_NORMALIZED = np.log1p(COUNTS / COUNTS.sum(axis=1, keepdims=True) * 1e4)
TYPES = ["T", "B", "NK", "Mono"] * 3
IDS = [f"ENSG{i:011d}" for i in range(len(GENES))]


def cells(matrix=COUNTS, **parts) -> ad.AnnData:
    return ad.AnnData(matrix, obs=pd.DataFrame(index=BARCODES), var=pd.DataFrame(index=GENES), **parts)


# --- one writer for each format: it writes COUNTS into the folder and returns the path that the user would give


def h5ad(folder, adata=None, **options):
    (cells() if adata is None else adata).write_h5ad(folder / "cells.h5ad", **options)
    return folder / "cells.h5ad"


def h5ad_raw(folder):
    adata = cells(LOG_NORMALIZED)
    adata.raw = cells(sp.csr_matrix(COUNTS))
    return h5ad(folder, adata[:, :3].copy())  # raw holds all genes, X the variable ones


def h5ad_raw_normalized(folder):
    adata = cells()
    adata.raw = cells(LOG_NORMALIZED)
    return h5ad(folder, adata)


def h5ad_legacy(folder):
    """As anndata wrote before 0.7: obs is one table, X a group of another encoding."""
    with h5py.File(folder / "cells.h5ad", "w") as file:
        for name, names in (("obs", BARCODES), ("var", GENES)):
            file[name] = np.array([(n.encode(),) for n in names], dtype=[("index", "S20")])
        group, counts = file.create_group("X"), sp.csr_matrix(COUNTS, dtype=np.float32)
        group.attrs["h5sparse_format"], group.attrs["h5sparse_shape"] = "csr", COUNTS.shape
        group["data"], group["indices"], group["indptr"] = counts.data, counts.indices, counts.indptr
    return folder / "cells.h5ad"


def zarr(kind):
    def write(folder):
        cells(kind(COUNTS)).write_zarr(folder / "cells.zarr")
        return folder / "cells.zarr"

    return write


def cellranger_h5(folder):
    features = [*GENES, "CD3 antibody"]
    by_cell = sp.csr_matrix(np.column_stack([COUNTS, np.full(12, 99)]), dtype=np.int32)  # CSC of genes x cells
    with h5py.File(folder / "filtered_feature_bc_matrix.h5", "w") as file:
        matrix = file.create_group("matrix")
        matrix["barcodes"], matrix["shape"] = np.array(BARCODES, "S"), np.array([9, 12], np.int32)
        matrix["data"], matrix["indices"], matrix["indptr"] = by_cell.data, by_cell.indices, by_cell.indptr
        matrix["features/id"], matrix["features/name"] = np.array([*IDS, "CD3"], "S"), np.array(features, "S")
        matrix["features/feature_type"] = np.array([*["Gene Expression"] * 8, "Antibody Capture"], "S")
        matrix["features/genome"] = np.array(["GRCh38"] * 9, "S")
    return folder / "filtered_feature_bc_matrix.h5"


def write_lines(path, lines):
    with (gzip.open if path.suffix == ".gz" else open)(path, "wt") as file:
        file.write("".join(line + "\n" for line in lines))


def write_mtx(path, matrix, **options):
    with (gzip.open if path.suffix == ".gz" else open)(path, "wb") as file:
        scipy.io.mmwrite(file, sp.coo_matrix(matrix), **{"field": "integer"} | options)


def cellranger_2(folder):
    write_mtx(folder / "matrix.mtx", COUNTS.T)
    write_lines(folder / "genes.tsv", [f"{i}\t{gene}" for i, gene in zip(IDS, GENES)])
    write_lines(folder / "barcodes.tsv", BARCODES)
    return folder


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
    "h5ad, raw.X": h5ad_raw,
    "h5ad, X beside a normalised raw.X": h5ad_raw_normalized,
    "h5ad, layers": lambda folder: h5ad(folder, cells(LOG_NORMALIZED, layers={"counts": COUNTS})),
    "h5ad, legacy": h5ad_legacy,
    "zarr": zarr(sp.csr_matrix),
    "zarr, by gene": zarr(sp.csc_matrix),
    "10x h5": cellranger_h5,
    "Cell Ranger 2": cellranger_2,
    "Cell Ranger 3": cellranger_3,
    "one mtx of two": one_mtx_of_two,
    "original": original,
    "stage 5": of_stage_5,
    "csv, genes in rows": delimited("counts.csv", True),
    "csv.gz, cells in rows": delimited("counts.csv.gz", False),
    "tsv, cells in rows": delimited("counts.tsv", False),
    "txt.gz, genes in rows": delimited("counts.txt.gz", True),
    "R's write.csv": delimited("counts.csv", True, "write.csv"),
    "R's write.table, comma": delimited("counts.csv", True, "write.table"),
    "R's write.table, tab": delimited("counts.txt", False, "write.table"),
}


@pytest.mark.parametrize("write", FORMATS.values(), ids=FORMATS)
def test_every_format_gives_the_same_counts(tmp_path, write):
    adata = read_dataset(write(tmp_path))
    assert sp.issparse(adata.X) and adata.X.format == "csr" and adata.X.dtype == np.float32
    np.testing.assert_array_equal(adata.X.toarray(), COUNTS)
    assert list(adata.obs_names) == BARCODES and list(adata.var_names) == GENES
    if write in (original, of_stage_5):
        assert adata.obs["cell_type"].tolist() == TYPES


@pytest.mark.parametrize("form", [sp.csr_matrix, sp.csc_matrix, np.asarray])
def test_an_h5ad_is_read_in_blocks_and_written_as_the_same_counts(tmp_path, form):
    adata = simulated_dataset(n_cells=2 * BLOCK_CELLS + 50, n_genes=20)
    stored = ad.AnnData(form(adata.X.toarray()), obs=adata.obs, var=adata.var)
    stored.write_h5ad(tmp_path / "cells.h5ad")
    assert [len(block.indptr) - 1 for block in open_dataset(tmp_path / "cells.h5ad").blocks] == [
        BLOCK_CELLS,
        BLOCK_CELLS,
        50,
    ]
    place = Workplace(tmp_path / "place")
    place.main("_0_download_data.py", DATASET=str(tmp_path / "cells.h5ad"))
    counts = ad.read_h5ad(place.data / "counts.h5ad")
    np.testing.assert_array_equal(counts.X.toarray(), adata.X.toarray())
    assert counts.uns["counts_id"] == fingerprint(adata)  # blocks or whole: the same digits
    stored.X = adata.X.copy()
    stored.X.data[-1] = 0.5  # only the first cells decide which matrix is read
    stored.write_h5ad(tmp_path / "cells.h5ad")
    with pytest.raises(ValueError, match="X of .*cells.h5ad, cells 4,097 to 4,146, .*fractions"):
        place.main("_0_download_data.py", DATASET=str(tmp_path / "cells.h5ad"))


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


# --- what is refused


def edited(value):
    matrix = COUNTS.astype(float)
    matrix[1, 1] = value
    return matrix


@pytest.mark.parametrize(
    ("matrix", "message"),
    [
        (LOG_NORMALIZED, "looks log-normalised: .*expected raw counts"),
        (COUNTS / 3, "looks normalised or corrected"),
        (edited(-1), "holds negative values"),
        (edited(np.nan), "holds 1 values that are NaN or infinite"),
        (COUNTS * 0, "holds zeros only"),
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


def test_an_h5ad_without_counts_anywhere_names_every_place(tmp_path):
    adata = cells(LOG_NORMALIZED, layers={"counts": -COUNTS})
    adata.raw = cells(LOG_NORMALIZED)
    with pytest.raises(ValueError, match=r"layers\['counts'\] of .* negative .*raw.X of .* log-n.*; X of .* log-n"):
        read_dataset(h5ad(tmp_path, adata))


@pytest.mark.parametrize(
    ("adata", "message"),
    [
        (cells()[:0].copy(), "is empty: got 0 cells x 8 genes"),
        (cells()[:, :0].copy(), "is empty: got 12 cells x 0 genes"),
        (cells().T.copy(), r"cells.h5ad looks transposed: its rows have gene names \(ACTB, GAPDH, MALAT1\)"),
    ],
)
def test_an_empty_or_transposed_h5ad_is_refused(tmp_path, adata, message):
    with pytest.raises(ValueError, match=message):
        read_dataset(h5ad(tmp_path, adata))


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
        with pytest.raises(ValueError, match="cells.h5ad (could not be read|is damaged)"):
            read(path)


@pytest.mark.parametrize("form", [sp.csr_matrix, sp.csc_matrix, np.asarray])
def test_a_matrix_of_another_shape_than_its_names_is_refused(tmp_path, form):
    path = h5ad(tmp_path, cells(form(COUNTS)))
    with h5py.File(path, "a") as file:
        del file["obs/_index"]
        file["obs/_index"] = BARCODES[:-1]
    with pytest.raises(ValueError, match=r"X of .*cells.h5ad is damaged: .*shape \(12, 8\), expected \(11, 8\)"):
        read_dataset(path)


@pytest.mark.parametrize("n_pointers", [5, 12])
def test_too_few_index_pointers_are_refused(tmp_path, n_pointers):
    path = h5ad(tmp_path, cells(sp.csr_matrix(COUNTS)))
    with h5py.File(path, "a") as file:
        pointers = file["X/indptr"][:n_pointers]
        pointers[-1] = len(file["X/data"])
        del file["X/indptr"]
        file["X/indptr"] = pointers
    with pytest.raises(ValueError, match="cells.h5ad (could not be read|is damaged)"):
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


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("counts.csv", "gene,symbol,c1,c2\n1,ACTB,3,4\n2,B2M,5,6\n", r"columns that are not numbers \('symbol'\)"),
        ("counts.csv", ",c1,c2\nACTB,3,\nB2M,5,6\n", "1 values that are NaN"),
        ("counts.csv", ",c1,c2\nACTB,3,4\nB2M,5\n", "1 values that are NaN"),
        ("counts.csv", ",c1,c2\nACTB,3,4\nB2M,5,6,7\n", "counts.csv could not be read"),
        ("counts.csv", ",c1,c2\nACTB,3,4\nB2M,5\0,6\n", "bytes that are no text"),
        ("counts.csv", ',c1,c2\n"ACTB,1,2\nB2M",3,4\n', "line break inside a name"),
        ("counts.csv", ",c1,c2\n", "counts.csv is empty"),
        ("counts.csv", "", "counts.csv is empty"),
        ("counts.csv", ",c1,c2\nfoo,3,4\nbar,5,6\n", r"cannot tell genes from cells: .*rows: foo, bar; columns: c1, c2\)"),
        ("counts.xlsx", "", r"counts.xlsx has an unknown format; expected .h5ad, 10x .h5, .*\.csv"),
    ],
)  # fmt: skip
def test_bad_tables_are_refused(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        read_dataset(tmp_path / name)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,b\n1,2\n3\n", "its row 3 has 1 fields, others have 2"),
        ("a,b\n1,2\n3,4,5\n", "its row 3 has 3 fields"),
        ('a,b\n1,"2\n3,4\n5,6"\n', "line breaks"),
        ("a,a\n1,2\n", "two columns called 'a'"),
        ("a,b\n1\0,2\n", "bytes that are no text"),
    ],
)
def test_tables_of_text_that_are_damaged_are_refused(tmp_path, text, message):
    (tmp_path / "table.csv").write_text(text)
    with pytest.raises(ValueError, match=f"table.csv .*{message}"):
        read_table(tmp_path / "table.csv")


@pytest.mark.parametrize("orientation", ["genes_in_rows", "cells_in_rows"])
def test_a_given_orientation_is_used(tmp_path, orientation):
    pd.DataFrame([[3, 4, 0], [5, 6, 1]], ["foo", "bar"], ["a", "b", "c"]).to_csv(tmp_path / "counts.csv")
    table = read_count_table(tmp_path / "counts.csv", orientation).to_df()
    table = table.T if orientation == "genes_in_rows" else table
    assert list(table.index) == ["foo", "bar"] and list(table.columns) == ["a", "b", "c"]
    np.testing.assert_array_equal(table, [[3, 4, 0], [5, 6, 1]])


def test_mtx_folders_that_do_not_fit_are_refused(tmp_path):
    with pytest.raises(ValueError, match="holds 0 .mtx files .*expected one"):
        read_dataset(tmp_path)
    path = cellranger_2(tmp_path) / "matrix.mtx"
    lines = path.read_text().splitlines()
    for changed in (
        lines[:-1],
        [*lines, lines[-1]],
        [*lines[:-1], "41 1 3"],
        [*lines[:-1], "1 x 3"],
        [*lines[:-1], "1 2"],
    ):
        write_lines(path, changed)
        with pytest.raises(ValueError, match="matrix.mtx could not be read"):
            read_dataset(tmp_path)
    write_mtx(tmp_path / "other.mtx", COUNTS)
    with pytest.raises(ValueError, match=r"holds 2 .mtx files \(matrix.mtx, other.mtx\), expected one"):
        read_dataset(tmp_path)
    (tmp_path / "other.mtx").unlink()
    write_lines(tmp_path / "genes.tsv", [f"id{i}\tG{i}" for i in range(20)])
    with pytest.raises(ValueError, match="genes.tsv has 20 lines, expected 8 gene names"):
        read_dataset(tmp_path)
    (tmp_path / "genes.tsv").unlink()
    with pytest.raises(ValueError, match="matrix.mtx has 0 files of gene names"):
        read_dataset(tmp_path)


# --- labels

ORDER = [5, 0, 7, 3, 11, 1, 9, 2, 10, 4, 8]  # not that of the counts, and cell 6 is missing
LABELLED = [None if i == 6 else cell_type for i, cell_type in enumerate(TYPES)]


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
    assert list(labels.index) == BARCODES and [None if pd.isna(t) else t for t in labels] == LABELLED


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
    assert "no barcode of the counts: its 12 rows are taken in the order of the cells" in capsys.readouterr().out
    (tmp_path / "labels.txt").unlink()
    original(tmp_path)
    (tmp_path / "barcodes_lung_train.tsv").unlink()
    write_lines(tmp_path / "cluster_lung_train.csv", clusters)
    assert read_dataset(tmp_path).obs["cell_type"].tolist() == TYPES
    write_lines(tmp_path / "cluster_lung_train.csv", clusters[:-1])
    with pytest.raises(ValueError, match="cluster_lung_train.csv has 11 rows, expected one for each of 12 cells"):
        read_dataset(tmp_path)


TWO_KEYS = ["barcode,cell_type,cell_type_fine,n", *(f"{b},{t},{t} fine,1" for b, t in zip(BARCODES, TYPES))]


@pytest.mark.parametrize(
    ("lines", "key", "message"),
    [
        (["barcode,cell_type", *(f"other{i},T" for i in range(11))], None, "labels other cells: none of its 11 rows"),
        (["barcode,cell_type"], None, "labels.txt"),
        (TWO_KEYS, None, "cannot tell which column holds the cell types; it has cell_type, cell_type_fine, n"),
        (TWO_KEYS, "louvain", "has no column 'louvain'; it has cell_type, cell_type_fine, n: set CELL_TYPE_KEY"),
    ],
)
def test_labels_that_do_not_fit_are_refused(tmp_path, lines, key, message):
    with pytest.raises(ValueError, match=message):
        labels_of(tmp_path, lines, key)
    assert labels_of(tmp_path, TWO_KEYS, "cell_type_fine").tolist() == [f"{t} fine" for t in TYPES]


def test_words_that_mean_no_label(tmp_path):
    words = [
        "T",
        "1_Unicorns and artifacts",
        "NA",
        "",
        "nan",
        "Unknown",
        "unassigned",
        " B ",
        "None",
        "NK",
        "Unlabelled",
        "Nana",
    ]
    labels = labels_of(tmp_path, ["barcode,cell_type", *(f"{b},{word}" for b, word in zip(BARCODES, words))])
    assert labels.dropna().to_dict() == {BARCODES[0]: "T", BARCODES[7]: "B", BARCODES[9]: "NK", BARCODES[11]: "Nana"}


def test_cell_type_key_and_labels_file_of_stage_0(tmp_path):
    adata = cells()
    adata.obs["cell_type"], adata.obs["louvain"] = "all", TYPES
    path, place = h5ad(tmp_path, adata), Workplace(tmp_path / "place")

    def types(**constants):
        place.main("_0_download_data.py", DATASET=str(path), **constants)
        return [None if pd.isna(t) else t for t in ad.read_h5ad(place.data / "counts.h5ad").obs["cell_type"]]

    write_lines(tmp_path / "labels.csv", ["barcode,cell_type", *(f"{BARCODES[i]},{TYPES[i]}" for i in ORDER)])
    assert set(types()) == {"all"} and types(CELL_TYPE_KEY="louvain") == TYPES
    assert types(LABELS_FILE=str(tmp_path / "labels.csv")) == LABELLED
    with pytest.raises(ValueError, match="obs has no column 'leiden'; it has cell_type, louvain: set CELL_TYPE_KEY"):
        types(CELL_TYPE_KEY="leiden")


# --- gene lengths


TRANSCRIPTS = "Gene start (bp),Gene name,Transcript start (bp),Transcript end (bp)"


@pytest.mark.parametrize(
    "lines",
    [
        [TRANSCRIPTS, "1,ACTB,200,1700", "1,ACTB,9,90", "1,LYZ,7,7", "1,B2M,10,90"],
        ["gene,length", "ACTB,1500", "B2M,80", "ACTB,1200", "LYZ,NA"],
        ["ACTB\t1500", "B2M\t80"],
    ],
)  # fmt: skip
def test_the_longest_transcript_is_the_length_of_a_gene(tmp_path, lines):
    """By hand: 1700 - 200 and 90 - 10; a length of 0 cannot be divided by."""
    write_lines(tmp_path / "lengths.txt", lines)
    lengths = read_gene_lengths(tmp_path / "lengths.txt")
    assert lengths.to_dict() == {"ACTB": 1500, "B2M": 80} and lengths.name == "gene_length_bp"


@pytest.mark.parametrize(
    "lines", [["gene,strand,length", "ACTB,+,1500"], ["gene,length", "ACTB,long"], ["gene", "ACTB"]]
)
def test_a_table_of_something_else_is_refused_as_gene_lengths(tmp_path, lines):
    write_lines(tmp_path / "lengths.csv", lines)
    with pytest.raises(ValueError, match="lengths.csv (is not a table of gene lengths|could not be read .*'long')"):
        read_gene_lengths(tmp_path / "lengths.csv")
