"""Twelve cells, and writers of the files of 10x: shared by the tests of readers and of data sets."""

import gzip
from pathlib import Path

import h5py
import numpy as np
import scipy.io
import scipy.sparse as sp

GENES = ["ACTB", "GAPDH", "MALAT1", "B2M", "CD3E", "CD19", "NKG7", "LYZ"]
IDS = [f"ENSG{i:011d}" for i in range(len(GENES))]
BARCODES = [f"{a}{b}{c}-1" for a in "AC" for b in "CGT" for c in "GT"]
TYPES = ["T", "B", "NK", "Mono"] * 3
COUNTS = np.random.default_rng(0).poisson(1.5, (len(BARCODES), len(GENES))) * 7  # cells x genes
COUNTS[0, 0] = 70_000  # more than 16 bits


def write_lines(path: Path, lines) -> None:
    with (gzip.open if path.suffix == ".gz" else open)(path, "wt") as file:
        file.write("".join(line + "\n" for line in lines))


def write_mtx(path: Path, matrix, field: str = "integer") -> None:
    with (gzip.open if path.suffix == ".gz" else open)(path, "wb") as file:
        scipy.io.mmwrite(file, sp.coo_matrix(matrix), field=field)


def cellranger_h5(folder: Path) -> Path:
    """Cell Ranger 3: CSC of genes x cells, features with their kind."""
    by_cell = sp.csr_matrix(np.column_stack([COUNTS, np.full(12, 99)]), dtype=np.int32)
    with h5py.File(folder / "filtered_feature_bc_matrix.h5", "w") as file:
        matrix = file.create_group("matrix")
        matrix["barcodes"], matrix["shape"] = np.array(BARCODES, "S"), np.array([9, 12], np.int32)
        matrix["data"], matrix["indices"], matrix["indptr"] = by_cell.data, by_cell.indices, by_cell.indptr
        matrix["features/id"] = np.array([*IDS, "CD3"], "S")
        matrix["features/name"] = np.array([*GENES, "CD3 antibody"], "S")
        matrix["features/feature_type"] = np.array([*["Gene Expression"] * 8, "Antibody Capture"], "S")
        matrix["features/genome"] = np.array(["GRCh38"] * 9, "S")
    return folder / "filtered_feature_bc_matrix.h5"


def cellranger_2(folder: Path) -> Path:
    write_mtx(folder / "matrix.mtx", COUNTS.T)
    write_lines(folder / "genes.tsv", [f"{i}\t{gene}" for i, gene in zip(IDS, GENES)])
    write_lines(folder / "barcodes.tsv", BARCODES)
    return folder
