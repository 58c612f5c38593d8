"""Every format gives the same counts, labels go to their cells, and values that are not counts are refused."""

import csv
import gzip

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.io
import scipy.sparse as sp
from helpers import Workplace, read_dataset

import lib.data.readers
from lib.data.labels import read_labels
from lib.data.readers import read_count_table, read_gene_lengths

GENES = ["ACTB", "GAPDH", "MALAT1", "B2M", "CD3E", "CD19", "NKG7", "LYZ"]
BARCODES = [f"{a}{b}{c}-1" for a in "AC" for b in "CGT" for c in "GT"]
COUNTS = np.random.default_rng(0).poisson(1.5, (len(BARCODES), len(GENES))) * 7
COUNTS[0, 0] = 70_000  # more than 16 bits
TYPES = ["T", "B", "NK", "Mono"] * 3


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(lib.data.readers, "CSV_BLOCK_ROWS", 5)  # so that the 8 or 12 rows are read in several blocks


def log_normalized(counts=COUNTS):
    return np.log1p(counts / counts.sum(axis=1, keepdims=True) * 1e4)


def cells(matrix=COUNTS) -> ad.AnnData:
    return ad.AnnData(matrix, obs=pd.DataFrame(index=BARCODES), var=pd.DataFrame(index=GENES))


def table(genes_in_rows: bool) -> pd.DataFrame:
    return cells().to_df().T if genes_in_rows else cells().to_df()


# One writer for each format: it writes COUNTS into the folder and returns the path that the user would give


def h5ad(folder, adata=None):
    adata = cells() if adata is None else adata
    adata.write_h5ad(folder / "cells.h5ad")
    return folder / "cells.h5ad"


def h5ad_sparse(folder):
    return h5ad(folder, cells(sp.csc_matrix(COUNTS, dtype=np.int64)))


def h5ad_raw(folder):
    adata = cells(log_normalized())
    adata.raw = cells()
    return h5ad(folder, adata[:, :3].copy())  # raw holds all genes, X the variable ones


def h5ad_raw_normalized(folder):
    adata = cells()
    adata.raw = cells(log_normalized())
    return h5ad(folder, adata)


def h5ad_layer(folder):
    adata = cells(log_normalized())
    adata.layers["counts"] = COUNTS
    return h5ad(folder, adata)


def cellranger_h5(folder):
    columns = sp.csr_matrix(COUNTS, dtype=np.int32)  # genes x cells by columns is cells x genes by rows
    text = h5py.string_dtype("ascii")
    with h5py.File(folder / "filtered_feature_bc_matrix.h5", "w") as file:
        matrix = file.create_group("matrix")
        matrix["barcodes"] = np.array(BARCODES, dtype="S")
        matrix["data"], matrix["indices"], matrix["indptr"] = (
            columns.data,
            columns.indices.astype(np.int64),
            columns.indptr.astype(np.int64),
        )
        matrix["shape"] = np.array(COUNTS.T.shape, dtype=np.int32)
        for name, values in {
            "id": [f"ENSG{i:011d}" for i in range(len(GENES))],
            "name": GENES,
            "feature_type": ["Gene Expression"] * len(GENES),
            "genome": ["GRCh38"] * len(GENES),
        }.items():
            matrix.create_dataset(f"features/{name}", data=np.array(values, dtype=object), dtype=text)
    return folder / "filtered_feature_bc_matrix.h5"


def write_lines(path, lines):
    with (gzip.open if path.suffix == ".gz" else open)(path, "wt") as file:
        file.write("".join(line + "\n" for line in lines))


def write_mtx(path, matrix):
    with (gzip.open if path.suffix == ".gz" else open)(path, "wb") as file:
        scipy.io.mmwrite(file, sp.coo_matrix(matrix), field="integer")


def cellranger_2(folder, counts=COUNTS, barcodes=BARCODES):
    write_mtx(folder / "matrix.mtx", counts.T)
    write_lines(folder / "genes.tsv", [f"ENSG{i:011d}\t{gene}" for i, gene in enumerate(GENES)])
    write_lines(folder / "barcodes.tsv", barcodes)
    return folder


def cellranger_3(folder, counts=COUNTS, barcodes=BARCODES):
    write_mtx(folder / "matrix.mtx.gz", counts.T)
    write_lines(folder / "features.tsv.gz", [f"ENSG{i:011d}\t{gene}\tGene Expression" for i, gene in enumerate(GENES)])
    write_lines(folder / "barcodes.tsv.gz", barcodes)
    return folder


def mtx_by_name(folder):
    write_mtx(folder / "another.mtx", [[1]])
    return cellranger_2(folder) / "matrix.mtx"


def original(folder):
    """As bulk2sc_GMVAE writes its train cells: genes x cells."""
    write_mtx(folder / "matrix_lung_train.mtx", COUNTS.T)
    write_lines(folder / "genes_lung_train.tsv", GENES)
    write_lines(folder / "barcodes_lung_train.tsv", BARCODES)
    write_lines(folder / "cluster_lung_train.csv", ["partition", *TYPES])
    return folder


def original_cells_in_rows(folder):
    write_mtx(folder / "counts.mtx", COUNTS)
    write_lines(folder / "genes.csv", GENES)
    write_lines(folder / "barcodes.csv", BARCODES)
    write_lines(folder / "cluster.csv", ["barcode,cluster", *(f"{b},{t}" for b, t in zip(BARCODES, TYPES))])
    return folder


def delimited(name: str, genes_in_rows: bool):
    def write(folder):
        table(genes_in_rows).to_csv(folder / name, sep="," if ".csv" in name else "\t")
        return folder / name

    return write


def r_write_csv(folder):
    table(genes_in_rows=True).to_csv(folder / "counts.csv", quoting=csv.QUOTE_NONNUMERIC)
    return folder / "counts.csv"


def r_write_table(separator: str, genes_in_rows: bool):
    """R's write.table names no column for the row names, so that the header is one field short."""

    def write(folder):
        lines = table(genes_in_rows).to_csv(sep=separator, quoting=csv.QUOTE_NONNUMERIC).splitlines()
        write_lines(folder / "counts.txt", [lines[0].removeprefix('""' + separator), *lines[1:]])
        return folder / "counts.txt"

    return write


FORMATS = {
    "h5ad": h5ad,
    "h5ad, sparse integers": h5ad_sparse,
    "h5ad, raw.X": h5ad_raw,
    "h5ad, X beside a normalised raw.X": h5ad_raw_normalized,
    "h5ad, layers": h5ad_layer,
    "10x h5": cellranger_h5,
    "Cell Ranger 2": cellranger_2,
    "Cell Ranger 3": cellranger_3,
    "one mtx of two": mtx_by_name,
    "original": original,
    "original, cells in rows": original_cells_in_rows,
    "csv, genes in rows": delimited("counts.csv", True),
    "csv, cells in rows": delimited("counts.csv", False),
    "csv.gz, genes in rows": delimited("counts.csv.gz", True),
    "tsv, cells in rows": delimited("counts.tsv", False),
    "tsv.gz, genes in rows": delimited("counts.tsv.gz", True),
    "txt.gz, cells in rows": delimited("counts.txt.gz", False),
    "R's write.csv": r_write_csv,
    "R's write.table, comma, genes in rows": r_write_table(",", True),
    "R's write.table, comma, cells in rows": r_write_table(",", False),
    "R's write.table, tab, genes in rows": r_write_table("\t", True),
}


def assert_same_counts(adata, counts=COUNTS, barcodes=BARCODES, genes=GENES):
    assert sp.issparse(adata.X) and adata.X.format == "csr" and adata.X.dtype == np.float32
    np.testing.assert_array_equal(adata.X.toarray(), counts)
    assert list(adata.obs_names) == list(barcodes) and list(adata.var_names) == list(genes)


@pytest.mark.parametrize("write", FORMATS.values(), ids=FORMATS)
def test_every_format_gives_the_same_counts(tmp_path, write):
    adata = read_dataset(write(tmp_path))
    assert_same_counts(adata)
    adata.write_h5ad(tmp_path / "written.h5ad")  # as stage 0 does next
    assert_same_counts(ad.read_h5ad(tmp_path / "written.h5ad"))


@pytest.mark.parametrize("write", [cellranger_2, cellranger_3])
def test_a_square_cell_ranger_table_is_not_transposed(tmp_path, write):
    n = len(GENES)
    assert_same_counts(read_dataset(write(tmp_path, COUNTS[:n], BARCODES[:n])), COUNTS[:n], BARCODES[:n])


@pytest.mark.parametrize("n_cells", [len(GENES), len(GENES) + 1, len(BARCODES)])
def test_the_table_that_stage_5_writes(tmp_path, n_cells):
    # genes.csv has 9 lines with its header; with 9 cells, the header must not be read as a gene
    write_mtx(tmp_path / "counts.mtx", COUNTS[:n_cells])
    write_lines(tmp_path / "genes.csv", ["gene", *GENES])
    write_lines(
        tmp_path / "clusters.csv",
        ["barcode,cell_type,sample", *(f"generated_{i + 1},{t},s1" for i, t in enumerate(TYPES[:n_cells]))],
    )
    adata = read_dataset(tmp_path)
    assert list(adata.var_names) == GENES
    np.testing.assert_array_equal(adata.X.toarray(), COUNTS[:n_cells])
    assert adata.obs["cell_type"].tolist() == TYPES[:n_cells]


@pytest.mark.parametrize("write", [original, original_cells_in_rows])
def test_clusters_beside_an_mtx_are_the_cell_types(tmp_path, write):
    assert read_dataset(write(tmp_path)).obs["cell_type"].tolist() == TYPES


@pytest.mark.parametrize(
    "clusters",
    [
        ["partition", *TYPES],
        [",partition", *(f"{i},{t}" for i, t in enumerate(TYPES))],
        ["barcode,cluster", *(f"cell_{i},{t}" for i, t in enumerate(TYPES))],  # the reader numbers cells from 1
        ["barcode,cluster", *(f"cell_{12 - i},{t}" for i, t in enumerate(TYPES))],
    ],
    ids=["no names", "numbers", "names from 0", "names backwards"],
)
def test_without_barcodes_clusters_follow_the_order_of_the_cells(tmp_path, clusters):
    original(tmp_path)
    (tmp_path / "barcodes_lung_train.tsv").unlink()
    write_lines(tmp_path / "cluster_lung_train.csv", clusters)
    adata = read_dataset(tmp_path)
    np.testing.assert_array_equal(adata.X.toarray(), COUNTS)
    assert adata.obs["cell_type"].tolist() == TYPES


def test_labels_in_obs_are_kept(tmp_path):
    adata = cells()
    adata.obs["cell_type"] = TYPES
    assert read_dataset(h5ad(tmp_path, adata)).obs["cell_type"].tolist() == TYPES


def test_a_message_says_where_the_counts_are_taken_from(tmp_path, capsys):
    read_dataset(h5ad_layer(tmp_path))
    assert "counts are taken from layers['counts']" in capsys.readouterr().out
    read_dataset(h5ad_raw(tmp_path))
    assert "counts are taken from raw.X" in capsys.readouterr().out


# Duplicate names

TWICE = ["ACTB", "GAPDH", "ACTB", "B2M", "CD3E", "ACTB", "NKG7", "LYZ"]
SUMMED = np.column_stack([COUNTS[:, [0, 2, 5]].sum(axis=1), COUNTS[:, [1, 3, 4, 6, 7]]])


@pytest.mark.filterwarnings("ignore:Variable names are not unique")
@pytest.mark.parametrize("name", ["cells.h5ad", "genes_in_rows.csv", "cells_in_rows.csv"])
def test_duplicate_genes_are_summed_with_a_message(tmp_path, capsys, name):
    adata = ad.AnnData(COUNTS, obs=pd.DataFrame(index=BARCODES), var=pd.DataFrame(index=TWICE))
    if name == "cells.h5ad":
        h5ad(tmp_path, adata)
    else:
        frame = pd.DataFrame(COUNTS, BARCODES, TWICE)
        (frame.T if name.startswith("genes") else frame).to_csv(tmp_path / name)
    assert_same_counts(read_dataset(tmp_path / name), SUMMED, genes=["ACTB", "GAPDH", "B2M", "CD3E", "NKG7", "LYZ"])
    assert "1 duplicate gene names (such as ACTB): their counts are summed" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore:Observation names are not unique")
@pytest.mark.parametrize("name", ["cells.h5ad", "genes_in_rows.csv", "cells_in_rows.csv"])
def test_duplicate_barcodes_are_made_unique_with_a_message(tmp_path, capsys, name):
    twice = ["x", "y", "x", *BARCODES[3:]]
    if name == "cells.h5ad":
        h5ad(tmp_path, ad.AnnData(COUNTS, obs=pd.DataFrame(index=twice), var=pd.DataFrame(index=GENES)))
    else:
        frame = pd.DataFrame(COUNTS, twice, GENES)
        (frame.T if name.startswith("genes") else frame).to_csv(tmp_path / name)
    assert_same_counts(read_dataset(tmp_path / name), barcodes=["x", "y", "x-1", *BARCODES[3:]])
    assert "1 duplicate barcodes (such as x)" in capsys.readouterr().out


# What is refused


def edited(row, column, value):
    matrix = COUNTS.astype(float)
    matrix[row, column] = value
    return matrix


@pytest.mark.parametrize(
    ("matrix", "message"),
    [
        (log_normalized(), "looks log-normalised: .*expected raw counts"),
        (COUNTS / 3, "looks normalised or corrected"),
        (edited(1, 1, 0.5), "of its non-zero values are fractions"),
        (edited(1, 1, -1), "holds negative values"),
        (edited(1, 1, np.nan), "holds 1 values that are NaN or infinite"),
        (edited(1, 1, np.inf), "holds 1 values that are NaN or infinite"),
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
    adata = cells(log_normalized())
    adata.raw = cells(log_normalized())
    adata.layers["counts"] = -COUNTS
    with pytest.raises(
        ValueError, match=r"layers\['counts'\] of .* negative .*raw.X of .* log-normalised.*; X of .* log-normalised"
    ):
        read_dataset(h5ad(tmp_path, adata))


def test_an_empty_h5ad_is_refused(tmp_path):
    with pytest.raises(ValueError, match="is empty: got 0 cells x 8 genes"):
        read_dataset(h5ad(tmp_path, cells()[:0].copy()))
    with pytest.raises(ValueError, match="is empty: got 12 cells x 0 genes"):
        read_dataset(h5ad(tmp_path, cells()[:, :0].copy()))


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("counts.csv", "gene,symbol,c1,c2\n1,ACTB,3,4\n2,B2M,5,6\n", r"columns that are not numbers \(symbol\)"),
        ("counts.csv", ",c1,c2\nACTB,3,\nB2M,5,6\n", "1 values that are NaN"),
        ("counts.csv", ",c1,c2\n", "counts.csv is empty"),
        ("counts.csv", "", "counts.csv is empty"),
        (
            "counts.csv",
            ",c1,c2\nfoo,3,4\nbar,5,6\n",
            r"cannot tell genes from cells: .*rows: foo, bar; columns: c1, c2\); set ORIENTATION",
        ),
        ("counts.xlsx", "", r"counts.xlsx has an unknown format; expected .h5ad, 10x .h5, .*\.csv"),
    ],
)
def test_bad_files_are_refused(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        read_dataset(tmp_path / name)


@pytest.mark.parametrize("genes_in_rows", [True, False])
def test_a_given_orientation_is_used(tmp_path, genes_in_rows):
    pd.DataFrame([[3, 4, 0], [5, 6, 1]], ["foo", "bar"], ["a", "b", "c"]).to_csv(tmp_path / "counts.csv")
    adata = read_count_table(tmp_path / "counts.csv", "genes_in_rows" if genes_in_rows else "cells_in_rows")
    rows, columns = (adata.var_names, adata.obs_names) if genes_in_rows else (adata.obs_names, adata.var_names)
    assert list(rows) == ["foo", "bar"] and list(columns) == ["a", "b", "c"]
    np.testing.assert_array_equal(
        adata.X.toarray(), [[3, 5], [4, 6], [0, 1]] if genes_in_rows else [[3, 4, 0], [5, 6, 1]]
    )


def test_ensembl_ids_tell_the_orientation_too(tmp_path):
    ids = [f"ENSMUSG{i:011d}" for i in range(len(GENES))]
    pd.DataFrame(COUNTS.T, ids, BARCODES).to_csv(tmp_path / "counts.csv")
    assert_same_counts(read_dataset(tmp_path / "counts.csv"), genes=ids)


def test_a_transposed_h5ad_is_refused(tmp_path):
    with pytest.raises(
        ValueError, match=r"cells.h5ad looks transposed: its rows have gene names \(ACTB, GAPDH, MALAT1\)"
    ):
        read_dataset(h5ad(tmp_path, cells().T.copy()))


def test_mtx_folders_that_do_not_fit_are_refused(tmp_path):
    with pytest.raises(ValueError, match="holds 0 .mtx files .*expected one"):
        read_dataset(tmp_path)
    cellranger_2(tmp_path)
    write_mtx(tmp_path / "other.mtx", COUNTS)
    with pytest.raises(ValueError, match=r"holds 2 .mtx files \(matrix.mtx, other.mtx\), expected one"):
        read_dataset(tmp_path)
    (tmp_path / "other.mtx").unlink()
    write_lines(tmp_path / "genes.tsv", [f"id{i}\tG{i}" for i in range(20)])
    with pytest.raises(
        ValueError, match="genes.tsv has 20 lines, expected one for each row or column of the table: 8 or 12"
    ):
        read_dataset(tmp_path)
    (tmp_path / "genes.tsv").unlink()
    with pytest.raises(ValueError, match="gene names of .*matrix.mtx are missing"):
        read_dataset(tmp_path)


# Labels

ORDER = [5, 0, 7, 3, 11, 1, 9, 2, 10, 4, 8]  # not that of the counts, and cell 6 is missing
LABELLED = [None if i == 6 else cell_type for i, cell_type in enumerate(TYPES)]


def labels_of(folder, lines, barcodes=BARCODES, key=None):
    write_lines(folder / "labels.txt", lines)
    return read_labels(folder / "labels.txt", pd.Index(barcodes), key)


@pytest.mark.parametrize(
    ("header", "line"),
    [
        ("barcode,cell_type", "{b},{t}"),
        ("celltype\tcell.barcode", "{t}\t{b}"),
        ("cell.barcode\tcelltype\tID\tGEO_Sample", "{b}\t{t}\tdonor{i}\tGSM1"),
        ('"","Cell Type"', '"{b}","{t}"'),
        ('"celltype"\t"ID"', '"{b}"\t"{t}"\t"donor{i}"'),
        ("id,cluster", "{b},{t}"),
        ("x,y", "{b},{t}"),
        ('"barcode"\t"celltype"', '"{i}"\t"{b}"\t"{t}"'),
    ],
    ids=[
        "barcode first",
        "barcode last",
        "GSE130148",
        "write.csv",
        "row names",
        "cluster",
        "one column left",
        "row numbers and barcodes",
    ],
)
def test_labels_go_to_their_barcodes(tmp_path, capsys, header, line):
    labels = labels_of(tmp_path, [header, *(line.format(i=i, b=BARCODES[i], t=TYPES[i]) for i in ORDER)])
    assert list(labels.index) == BARCODES
    assert [None if pd.isna(label) else label for label in labels["cell_type"]] == LABELLED
    assert "11 of 12 cells have a label in labels.txt" in capsys.readouterr().out
    if "ID" in header:
        assert labels["ID"].fillna("").tolist() == ["" if i == 6 else f"donor{i}" for i in range(12)]


@pytest.mark.parametrize("header", ["cell_type", "partition"])
@pytest.mark.parametrize("numbered", [True, False])
def test_labels_without_barcodes_are_taken_in_order_with_a_message(tmp_path, capsys, header, numbered):
    lines = [header, *TYPES]
    if numbered:
        lines = ["," + header, *(f"{i},{cell_type}" for i, cell_type in enumerate(TYPES))]
    assert labels_of(tmp_path, lines)["cell_type"].tolist() == TYPES
    assert (
        "labels.txt has no barcode of the counts: its 12 rows are taken in the order of the cells"
        in capsys.readouterr().out
    )


@pytest.mark.parametrize("n_rows", [11, 13])
def test_labels_of_other_cells_are_refused(tmp_path, n_rows):
    with pytest.raises(
        ValueError, match=rf"labels.txt labels other cells: none of its {n_rows} rows has one of the 12 barcodes"
    ):
        labels_of(tmp_path, ["barcode,cell_type", *(f"other{i},T" for i in range(n_rows))])


def test_a_table_of_labels_without_rows_is_refused(tmp_path):
    with pytest.raises(ValueError, match="labels.txt"):
        labels_of(tmp_path, ["barcode,cell_type"])


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
        "Nana cell",
    ]
    labels = labels_of(tmp_path, ["barcode,cell_type", *(f"{b},{word}" for b, word in zip(BARCODES, words))])[
        "cell_type"
    ]
    assert labels.dropna().to_dict() == {
        BARCODES[0]: "T",
        BARCODES[7]: "B",
        BARCODES[9]: "NK",
        BARCODES[11]: "Nana cell",
    }


TWO_KEYS = [
    "barcode,cell_type,cell_type_fine,n",
    *(f"{b},{t},{t} fine,{i}" for i, (b, t) in enumerate(zip(BARCODES, TYPES))),
]


def test_the_key_chooses_among_several_columns(tmp_path):
    with pytest.raises(
        ValueError,
        match="cannot tell which column holds the cell types; it has cell_type, cell_type_fine, n: set CELL_TYPE_KEY",
    ):
        labels_of(tmp_path, TWO_KEYS)
    with pytest.raises(
        ValueError, match="has no column 'louvain'; it has cell_type, cell_type_fine, n: set CELL_TYPE_KEY"
    ):
        labels_of(tmp_path, TWO_KEYS, key="louvain")
    assert labels_of(tmp_path, TWO_KEYS, key="cell_type")["cell_type"].tolist() == TYPES


def test_the_key_may_be_another_column_than_cell_type(tmp_path):
    labels = labels_of(tmp_path, TWO_KEYS, key="cell_type_fine")
    assert labels["cell_type"].tolist() == [f"{cell_type} fine" for cell_type in TYPES]


def stage_0(place: Workplace, dataset, **constants) -> ad.AnnData:
    place.main("_0_download_data.py", DATASET=str(dataset), **constants)
    return ad.read_h5ad(place.data / "counts.h5ad")


def test_the_key_names_a_column_of_obs(tmp_path):
    adata = cells()
    adata.obs["cell_type"], adata.obs["louvain"] = "all", TYPES
    path, place = h5ad(tmp_path, adata), Workplace(tmp_path / "place")
    assert set(stage_0(place, path).obs["cell_type"]) == {"all"}
    assert stage_0(place, path, CELL_TYPE_KEY="louvain").obs["cell_type"].tolist() == TYPES
    with pytest.raises(ValueError, match="obs has no column 'leiden'; it has cell_type, louvain: set CELL_TYPE_KEY"):
        stage_0(place, path, CELL_TYPE_KEY="leiden")


def test_the_key_names_a_column_of_the_clusters_beside_an_mtx(tmp_path):
    original(tmp_path)
    write_lines(tmp_path / "cluster_lung_train.csv", TWO_KEYS)
    adata = stage_0(Workplace(tmp_path / "place"), tmp_path, CELL_TYPE_KEY="cell_type")
    assert adata.obs["cell_type"].tolist() == TYPES


def test_a_labels_file_replaces_the_labels_of_obs(tmp_path):
    adata = cells()
    adata.obs["cell_type"] = "all"
    write_lines(tmp_path / "labels.csv", ["barcode,cell_type", *(f"{BARCODES[i]},{TYPES[i]}" for i in ORDER)])
    labelled = stage_0(Workplace(tmp_path / "place"), h5ad(tmp_path, adata), LABELS_FILE=str(tmp_path / "labels.csv"))
    assert [None if pd.isna(label) else label for label in labelled.obs["cell_type"]] == LABELLED


# Gene lengths


def test_the_longest_transcript_is_the_length_of_a_gene(tmp_path):
    (tmp_path / "GeneLength.txt").write_text(
        "Gene start (bp),Gene end (bp),Gene name,Transcript start (bp),Transcript end (bp)\n"
        "100,9999,ACTB,100,350\n"
        "100,9999,ACTB,200,1700\n"
        "100,9999,ACTB,100,300\n"
        "5,99,B2M,10,90\n"
        "5,99,LYZ,7,7\n"
    )
    # by hand: 1700 - 200 and 90 - 10; a length of 0 cannot be divided by
    assert read_gene_lengths(tmp_path / "GeneLength.txt").to_dict() == {"ACTB": 1500, "B2M": 80}


@pytest.mark.parametrize("separator", [",", "\t"])
def test_a_table_of_gene_and_length(tmp_path, separator):
    lines = ["gene length", "ACTB 1500", "B2M 80", "ACTB 1200"]
    write_lines(tmp_path / "lengths.txt", [line.replace(" ", separator) for line in lines])
    lengths = read_gene_lengths(tmp_path / "lengths.txt")
    assert lengths.to_dict() == {"ACTB": 1500, "B2M": 80} and lengths.name == "gene_length_bp"


@pytest.mark.parametrize(
    ("lines", "got"),
    [
        (["gene,strand,length", "ACTB,+,1500"], "has the columns gene, strand, length; expected"),
        (["gene,length", "ACTB,long"], "holds 'long', expected numbers of base pairs"),
        (["gene", "ACTB"], "has the columns gene; expected"),
    ],
)
def test_a_table_of_something_else_is_refused_as_gene_lengths(tmp_path, lines, got):
    write_lines(tmp_path / "lengths.csv", lines)
    with pytest.raises(ValueError, match=f"lengths.csv is not a table of gene lengths: it {got}"):
        read_gene_lengths(tmp_path / "lengths.csv")
