"""The data sets that stage 0 knows by name, each from its own server, in its own format.

name             cells x genes    files                                                     cell types
GSE130148        10,360 cells     .csv.gz of genes x cells, .txt.gz of labels, gene lengths 13 types
pbmc68k_reduced  700 x 765        inside scanpy                                             10 types
pbmc1k           1,222 x 33,538   10x .h5, Cell Ranger 3                                    none
pbmc3k           2,700 x 32,738   10x .tar.gz of matrix.mtx, genes.tsv, barcodes.tsv        8 types (scanpy's tutorial)
pbmc68k          68,579 x 32,738  the same, 124 MB; labels a .tsv (Zheng et al. 2017)       11 types
dentate_gyrus    2,930 x 13,913   .h5ad, scVelo's copy of GSE95753 (Hochgerner et al. 2018) clusters; bulk GSE74985
E-ANND-5         828,328 cells    .zip of .mtx, .mtx_rows, .mtx_cols; a design .tsv (EBI)   126 types
"""

import io
import tarfile
import zipfile
from pathlib import Path
from typing import NamedTuple

import anndata as ad
import numpy as np
import pandas as pd
import scanpy as sc
import scipy.sparse as sp

from lib.data.anndata_files import open_10x
from lib.data.download import fetch
from lib.data.hdf5 import read_h5ad
from lib.data.labels import clean_labels, read_labels
from lib.data.mtx import MtxTable, open_mtx
from lib.data.readers import read_count_table
from lib.data.streams import CellStream
from lib.files import check_unpacked, reading

N_CELLS = {
    "GSE130148": 10_360,
    "pbmc68k_reduced": 700,
    "pbmc1k": 1_222,
    "pbmc3k": 2_700,
    "pbmc68k": 68_579,
    "dentate_gyrus": 2_930,
    "E-ANND-5": 828_328,
}
NAMES = tuple(N_CELLS)
URLS = {
    "10x": "https://cf.10xgenomics.com/samples/cell-exp",
    "cellxgene": "https://raw.githubusercontent.com/chanzuckerberg/cellxgene/main/example-dataset",
    "zheng": "https://raw.githubusercontent.com/10XGenomics/single-cell-3prime-paper/master/pbmc68k_analysis",
    "scvelo": "https://github.com/theislab/scvelo_notebooks/raw/master/data/DentateGyrus",
    "geo": "https://ftp.ncbi.nlm.nih.gov/geo/series/GSE74nnn/GSE74985/suppl",
    "ebi": "https://www.ebi.ac.uk/gxa/sc/experiment",
}
EBI_LABELS = tuple(
    f"Factor Value[{name}]"
    for name in ("inferred cell type - authors labels", "inferred cell type - ontology labels", "cell type")
)


class Source(NamedTuple):
    """A data set as its source has it, before the checks that are common to all data sets."""

    cells: CellStream  # obs["cell_type"] where the source has labels
    description: str  # where the counts come from
    gene_length_file: Path | None = None
    bulk: pd.DataFrame | None = None  # samples x genes, counts, where the source has a bulk of the same tissue


def load(name: str, raw: Path, geo_url: str, gene_length_url: str | None) -> Source:
    """Open a data set of `NAMES`; its counts are checked when they are read.

    Parameters
    ----------
    raw
        Folder that keeps the downloaded files.
    geo_url
        Folder of the two files of GSE130148.
    gene_length_url
        Table of gene lengths for GSE130148; None for no gene lengths.

    Raises
    ------
    ValueError
        If the files have another number of cells than the source states, or no counts.
    """
    source = gse130148(raw, geo_url, gene_length_url) if name == "GSE130148" else READERS[name](raw)
    if len(source.cells.obs) != N_CELLS[name]:
        raise ValueError(
            f"{name} has {len(source.cells.obs):,} cells, expected {N_CELLS[name]:,}: delete its files in {raw} and run this again, "
            "or give their path as DATASET"
        )
    return source._replace(cells=source.cells.tidy())


def gse130148(raw: Path, geo_url: str, gene_length_url: str | None) -> Source:
    """Human lung, Drop-seq (Vieira Braga et al., Nature Medicine 2019, doi 10.1038/s41591-019-0468-5)."""
    count_file = fetch(f"{geo_url}/GSE130148%5Fraw%5Fcounts.csv.gz", raw / "GSE130148_raw_counts.csv.gz")
    label_file = fetch(
        f"{geo_url}/GSE130148%5Fbarcodes%5Fcell%5Ftypes.txt.gz", raw / "GSE130148_barcodes_cell_types.txt.gz"
    )
    length_file = None
    if gene_length_url is not None:
        try:
            length_file = fetch(gene_length_url, raw / "GeneLength.txt")
        except ConnectionError as error:  # only USE_GENE_LENGTHS in stage 2 needs lengths
            print(f"WARNING: no gene lengths, so USE_GENE_LENGTHS in stage 2 will not work: {error}")
    adata = read_count_table(count_file, "genes_in_rows")
    labels = read_labels(label_file, adata.obs_names, "celltype")
    adata.obs = labels.rename(columns={"ID": "donor"})
    return Source(CellStream.of(adata, "GSE130148"), f"GEO GSE130148, {geo_url}", length_file)


def pbmc68k_reduced(_: Path) -> Source:
    """Human blood, inside scanpy (Zheng et al., Nature Communications 2017).

    scanpy stores log(1 + count x 10,000 / n_counts), rounded to 3 decimals, so the counts can be recovered exactly.
    """
    source = sc.datasets.pbmc68k_reduced()
    normalized = sp.csr_matrix(source.raw.X, dtype=np.float64)
    n_counts = source.obs["n_counts"].to_numpy(dtype=np.float64)
    exact = sp.diags_array(n_counts / 1e4).dot(normalized.expm1()).tocsr()
    counts = exact.rint()
    assert np.abs((exact - counts).data).max(initial=0) < 0.25, (
        "scanpy's pbmc68k_reduced has changed: its counts cannot be recovered"
    )
    obs = pd.DataFrame({"cell_type": clean_labels(source.obs["bulk_labels"])}, index=source.obs_names)
    var = pd.DataFrame(index=source.raw.var_names)
    cells = CellStream.of(ad.AnnData(counts, obs=obs, var=var), "pbmc68k_reduced")
    return Source(cells, "scanpy.datasets.pbmc68k_reduced")


def pbmc1k(raw: Path) -> Source:
    """Blood of a healthy donor, 10x v3."""
    file = "pbmc_1k_v3_filtered_feature_bc_matrix.h5"
    url = f"{URLS['10x']}/3.0.0/pbmc_1k_v3/{file}"
    return Source(open_10x(fetch(url, raw / file)), url)


def pbmc3k(raw: Path) -> Source:
    """Blood of a healthy donor, 10x v1, with the labels of scanpy's tutorial.

    The labels are not the authors': the tutorial names its eight Louvain clusters by marker genes
    (`scanpy.datasets.pbmc3k_processed`). 62 of the 2,700 cells fail the tutorial's quality control and have no type.
    Without the file of labels the cells have no types, with a warning.
    """
    file = "pbmc3k_filtered_gene_bc_matrices.tar.gz"
    url = f"{URLS['10x']}/1.1.0/pbmc3k/{file}"
    cells = open_mtx(unpack(fetch(url, raw / file), raw / "pbmc3k"), scratch=raw)
    try:
        label_file = fetch(f"{URLS['cellxgene']}/pbmc3k.h5ad", raw / "pbmc3k_processed.h5ad")
    except ConnectionError as error:  # stage 1 can cluster the cells
        print(f"WARNING: no cell types of pbmc3k, so stage 1 will cluster the cells: {error}")
    else:
        cells.obs["cell_type"] = tutorial_labels(label_file, cells.obs.index)
    return Source(cells, url)


def tutorial_labels(path: Path, barcodes: pd.Index) -> pd.Series:
    """obs["louvain"] of an .h5ad for these barcodes, missing for other cells; the counts are not read.

    Raises
    ------
    ValueError
        If the file has no such column, or none of the barcodes.
    """
    table = read_h5ad(path, backed="r")
    obs = table.obs
    table.file.close()
    if "louvain" not in obs or not barcodes.isin(obs.index).any():
        raise ValueError(
            f"{path} has no cell types of these cells: its obs has {', '.join(obs.columns) or 'no columns'} for barcodes such as "
            f"{', '.join(obs.index[:1])}; expected the column louvain for barcodes such as {barcodes[0]}: delete it and run this again"
        )
    labels = clean_labels(obs["louvain"].reindex(barcodes))
    print(f"{labels.notna().sum():,} of {len(barcodes):,} cells have a label in {path.name}")
    return labels


def pbmc68k(raw: Path) -> Source:
    """Fresh blood cells of donor A, with the labels of the paper (Zheng et al., Nature Communications 2017)."""
    file = "fresh_68k_pbmc_donor_a_filtered_gene_bc_matrices.tar.gz"
    url = f"{URLS['10x']}/1.1.0/fresh_68k_pbmc_donor_a/{file}"
    cells = open_mtx(unpack(fetch(url, raw / file), raw / "pbmc68k"), scratch=raw)
    labels = fetch(f"{URLS['zheng']}/68k_pbmc_barcodes_annotation.tsv", raw / "68k_pbmc_barcodes_annotation.tsv")
    cells.obs = read_labels(labels, cells.obs.index, "celltype")[["cell_type"]]
    return Source(cells, url)


def dentate_gyrus(raw: Path) -> Source:
    """Mouse dentate gyrus: the spliced counts of scVelo's copy of GSE95753, and the bulk GSE74985."""
    url = f"{URLS['scvelo']}/10X43_1.h5ad"
    source = read_h5ad(fetch(url, raw / "dentate_gyrus_10X43_1.h5ad"))
    obs = pd.DataFrame({"cell_type": clean_labels(source.obs["clusters"])}, index=source.obs_names)
    adata = ad.AnnData(source.layers["spliced"], obs=obs, var=source.var[[]].copy())
    counts, names = (
        fetch(f"{URLS['geo']}/GSE74985%5F{file}", raw / f"GSE74985_{file}")
        for file in ("mergedCount.txt.gz", "genes.fpkm_tracking.gz")
    )
    return Source(CellStream.of(adata, "dentate_gyrus"), url, bulk=read_gse74985(counts, names))


def read_gse74985(counts: Path, names: Path) -> pd.DataFrame:
    """Samples x gene symbols, read counts: Ensembl genes are renamed by the series' own table, duplicate genes are summed."""
    with reading(counts, "a table of counts"):
        table = pd.read_csv(counts, sep="\t", index_col=0)
    with reading(names, "a table with the columns gene_id and gene_short_name"):
        genes = pd.read_csv(names, sep="\t", usecols=["gene_id", "gene_short_name"]).drop_duplicates("gene_id")
    symbols = genes.set_index("gene_id")["gene_short_name"]
    known = pd.Series(table.index.map(symbols), index=table.index)
    print(f"{counts.name}: {known.notna().sum():,} of {len(table):,} genes have a symbol")
    return table[known.notna()].groupby(known.dropna()).sum().T.rename_axis(index="sample", columns=None)


def e_annd_5(raw: Path) -> Source:
    """Cells of the EBI Single Cell Expression Atlas: a .zip of a MatrixMarket table, genes x cells, and its lists."""
    url = f"{URLS['ebi']}/E-ANND-5/download"
    design = fetch(f"{url}?accessKey=&fileType=experiment-design", raw / "E-ANND-5_experimental_design.tsv")
    packed = fetch(f"{url}/zip?accessKey=&fileType=quantification-raw", raw / "E-ANND-5_expression_archive.zip")
    with reading(packed, "a complete zip archive of the EBI"):
        archive = zipfile.ZipFile(packed)
        check_unpacked(packed, sum(part.file_size for part in archive.infolist()))
        parts = {Path(part).suffix: part for part in archive.namelist()}
        gene_names, barcodes = (
            pd.Index(pd.read_csv(archive.open(parts[suffix]), sep="\t", header=None, dtype=str)[column].to_numpy())
            for suffix, column in ((".mtx_rows", 1), (".mtx_cols", 0))
        )
        table = MtxTable.of(packed, lambda: io.TextIOWrapper(archive.open(parts[".mtx"]), "utf-8"))
        if table.shape != (len(gene_names), len(barcodes)):
            raise ValueError(f"a table of {table.shape} with {len(gene_names):,} genes and {len(barcodes):,} cells")
    obs = pd.DataFrame({"cell_type": ebi_labels(design, barcodes)})
    return Source(CellStream(obs, gene_names, table.cells(genes_in_rows=True, scratch=raw), "E-ANND-5"), url)


def ebi_labels(design: Path, barcodes: pd.Index) -> pd.Series:
    """Cell types of these barcodes in a table of cells of the EBI.

    Raises
    ------
    ValueError
        If it has no column of cell types.
    """
    with reading(design, "a table of cells"):
        columns = pd.read_csv(design, sep="\t", index_col=0, nrows=0).columns
    found = [column for column in EBI_LABELS if column in columns]
    if not found:
        raise ValueError(
            f"{design} has no column of cell types; it has {', '.join(columns)}; expected one of {', '.join(EBI_LABELS)}: "
            "delete it and run this again"
        )
    with reading(design, "a table of cells"):
        table = pd.read_csv(design, sep="\t", index_col=0, usecols=[0, 1 + columns.get_loc(found[0])], dtype=str)
    return clean_labels(table.iloc[:, 0].reindex(barcodes))


READERS = {
    "pbmc68k_reduced": pbmc68k_reduced,
    "pbmc1k": pbmc1k,
    "pbmc3k": pbmc3k,
    "pbmc68k": pbmc68k,
    "dentate_gyrus": dentate_gyrus,
    "E-ANND-5": e_annd_5,
}


def unpack(archive: Path, folder: Path) -> Path:
    """Unpack a .tar.gz, unless that is done; the folder inside that holds the matrix.

    Raises
    ------
    ValueError
        If it holds no matrix.mtx, or several.
    """
    if not folder.exists():
        partial = folder.with_name(folder.name + ".part")
        with reading(archive, "a complete .tar.gz"), tarfile.open(archive) as file:
            check_unpacked(archive, sum(part.size for part in file))
            file.extractall(partial, filter="data")
        partial.rename(folder)
    found = sorted(path.parent for path in folder.rglob("matrix.mtx*"))
    if len(found) != 1:
        raise ValueError(
            f"{archive} holds {len(found)} files called matrix.mtx, expected one; delete it and {folder}, and run this again"
        )
    return found[0]
