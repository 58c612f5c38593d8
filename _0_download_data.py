"""Stage 0: download or read a single-cell data set and write it in the form that the later stages read.

reads   a data set from the network, from inside scanpy, or from your files
writes  data/counts.h5ad: cells x genes, raw counts, obs["cell_type"] if the source has labels; data/bulk.csv if it has a bulk
run     python _0_download_data.py
note    the labels of pbmc3k are those of scanpy's tutorial: eight clusters, named by marker genes
time    GSE130148: 1 minute after its download of 30 MB; pbmc68k_reduced: seconds
memory  0.5 GB for 200,000 cells of an h5ad file, 0.8 for 1.3 million, if it stores the counts by cell (CSR), as scanpy does: these
        are read in blocks. All other formats are read as a whole, as sparse counts; E-ANND-5 needs some 40 GB
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal

import anndata as ad
import pandas as pd
import scipy.sparse as sp

from lib import options
from lib.data import datasets, labels, readers
from lib.data.counts import Fingerprint, write_blocks
from lib.run import folder, print_written, replacing, user_path

# Data set
DATASET = "GSE130148"  # GSE130148 (the paper's), pbmc68k_reduced (no network), pbmc1k, pbmc3k, pbmc68k, dentate_gyrus, E-ANND-5, or a path
CELL_TYPE_KEY: str | None = None  # column with the cell types, in obs or LABELS_FILE; none: one named like it
LABELS_FILE: str | None = None  # csv or tsv of barcodes and cell types, for counts without them
ORIENTATION: Literal["auto", "genes_in_rows", "cells_in_rows"] = "auto"  # of a csv or tsv; auto: by its gene names

# Gene lengths, for TPM with USE_GENE_LENGTHS in stage 2
GENE_LENGTHS: str | None = "auto"  # auto: those of the data set; none; or a table (GeneLength.txt, or gene and bp)

# Where things are
GEO_URL = "https://ftp.ncbi.nlm.nih.gov/geo/series/GSE130nnn/GSE130148/suppl"  # of the two files of GSE130148
GENE_LENGTH_URL = "https://github.com/poseidonchan/TAPE/raw/main/data/GeneLength.txt"  # the original's table
DATA_DIR = "data"  # folder; data/raw keeps the downloaded files


def main() -> None:
    data = folder(DATA_DIR)
    source = load()
    cells = source.cells
    if LABELS_FILE is not None:
        given = labels.read_labels(user_path(LABELS_FILE), cells.obs.index, CELL_TYPE_KEY)
        cells.obs = cells.obs.drop(columns=given.columns, errors="ignore").join(given)
    adata = ad.AnnData(obs=cells.obs, var=pd.DataFrame(index=cells.gene_names))
    if source.gene_length_file is not None:
        add_gene_lengths(adata, source.gene_length_file)
    adata.uns["dataset"] = DATASET if DATASET in datasets.NAMES else Path(DATASET).name
    adata.uns["source"] = source.description
    written = [write_fingerprinted(adata, cells.blocks, data / "counts.h5ad")]
    if "cell_type" in adata.obs:
        print(adata.obs["cell_type"].value_counts(dropna=False).to_string())
    else:
        print("the data have no cell types: stage 1 will cluster the cells")
    if source.bulk is not None:
        written.append(data / "bulk.csv")
        with replacing(written[-1]) as temporary:
            source.bulk.to_csv(temporary)
    print_written("stage 0", written, "python _1_split_train_test.py")


def write_fingerprinted(adata: ad.AnnData, blocks: Iterable[sp.csr_matrix], path: Path) -> Path:
    """Write the counts while they are read, and their fingerprint in uns["counts_id"]."""
    whole, n_above_zero = Fingerprint(adata.obs, adata.var_names), 0

    def counted() -> Iterator[sp.csr_matrix]:
        nonlocal n_above_zero
        for block in blocks:
            whole.add(block)
            n_above_zero += block.nnz
            yield block
        adata.uns["counts_id"] = str(whole)

    write_blocks(adata, counted(), path)
    share = n_above_zero / adata.n_obs / adata.n_vars
    print(f"{adata.n_obs:,} cells x {adata.n_vars:,} genes, {share:.1%} of the counts above zero")
    return path


def load() -> datasets.Source:
    """Open the data set by its name, or from the user's path; ValueError if CELL_TYPE_KEY is set for one with its own labels."""
    lengths = None if GENE_LENGTHS in ("auto", None) else user_path(GENE_LENGTHS)
    if DATASET in datasets.NAMES:
        if CELL_TYPE_KEY is not None and LABELS_FILE is None:
            raise ValueError(
                f"CELL_TYPE_KEY is {CELL_TYPE_KEY!r}, but {DATASET} has its own labels; set it to none, or give LABELS_FILE"
            )
        own_lengths = GENE_LENGTHS == "auto"
        source = datasets.load(DATASET, folder(f"{DATA_DIR}/raw"), GEO_URL, GENE_LENGTH_URL if own_lengths else None)
        return source if own_lengths else source._replace(gene_length_file=lengths)
    try:
        path = user_path(DATASET)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"DATASET is {DATASET!r}; expected one of {', '.join(datasets.NAMES)} or a path: {error}"
        ) from error
    cells = readers.open_dataset(path, ORIENTATION, CELL_TYPE_KEY if LABELS_FILE is None else None)
    return datasets.Source(cells, str(path), lengths)


def add_gene_lengths(adata: ad.AnnData, path: Path) -> None:
    """Set var["gene_length_bp"], missing for genes that the table does not have."""
    adata.var["gene_length_bp"] = lengths = readers.read_gene_lengths(path).reindex(adata.var_names)
    print(f"{path.name}: lengths for {lengths.notna().sum():,} of {adata.n_vars:,} genes")


if __name__ == "__main__":
    options.run(globals())
