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

import gzip
import shutil
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import anndata as ad
import numpy as np
import pandas as pd
import pooch
import requests
import scanpy as sc
import scipy.io
import scipy.sparse as sp

from lib.data.labels import clean_labels, read_labels
from lib.data.readers import CellStream, open_10x, open_mtx, read_count_table
from lib.run import reading

URLS = {
    "10x": "https://cf.10xgenomics.com/samples/cell-exp",
    "cellxgene": "https://raw.githubusercontent.com/chanzuckerberg/cellxgene/main/example-dataset",
    "zheng": "https://raw.githubusercontent.com/10XGenomics/single-cell-3prime-paper/master/pbmc68k_analysis",
    "scvelo": "https://github.com/theislab/scvelo_notebooks/raw/master/data/DentateGyrus",
    "geo": "https://ftp.ncbi.nlm.nih.gov/geo/series/GSE74nnn/GSE74985/suppl",
    "ebi": "https://www.ebi.ac.uk/gxa/sc/experiment",
}
EBI_LABELS = ["inferred cell type - authors labels", "inferred cell type - ontology labels", "cell type"]
RETRIES = 5  # of a download, after 1, 2, ... seconds


class Source(NamedTuple):
    """A data set as its source has it, before the checks that are common to all data sets."""

    cells: CellStream  # obs["cell_type"] where the source has labels
    description: str  # where the counts come from
    gene_length_file: Path | None = None
    bulk: pd.DataFrame | None = None  # samples x genes, counts, where the source has a bulk of the same tissue


def load(name: str, raw: Path, geo_url: str, gene_length_url: str | None) -> Source:
    """Open a data set of `NAMES`, whose downloads are kept in the folder `raw`; its counts are checked when they are read.

    geo_url, gene_length_url: of the folder of GSE130148, and of its gene lengths (None: without). ValueError if the number of cells is
    not that of the source.
    """
    reader, n_cells = SETS[name]
    source = gse130148(raw, geo_url, gene_length_url) if name == "GSE130148" else reader(raw)
    if len(source.cells.obs) != n_cells:
        raise ValueError(
            f"{name} has {len(source.cells.obs):,} cells, expected {n_cells:,}: delete its files in {raw} and run this again, "
            "or give their path as DATASET"
        )
    return source._replace(cells=source.cells.tidy())


def fetch(url: str, path: Path) -> Path:
    """Download `url` to `path`, unless the file exists. The file has its name only when it is complete.

    ConnectionError, which says what to save where by hand, if this fails; ValueError for what is no data (`check_download`).
    """
    if path.exists():
        check_download(path, path)
        print(f"{path.name}: using the file in {path.parent}")
        return path

    def download(url: str, temporary: str, cache: Any) -> None:
        pooch.HTTPDownloader(progressbar=True, headers={"Accept-Encoding": "identity"})(url, temporary, cache)
        check_download(Path(temporary), path)

    files = pooch.create(
        path.parent, base_url="", registry={path.name: None}, urls={path.name: url}, retry_if_failed=RETRIES
    )
    try:
        files.fetch(path.name, downloader=download)
    except requests.RequestException as error:
        raise ConnectionError(
            f"{url} could not be downloaded ({error}). Without a network: download it elsewhere, save it as {path}, and run this again"
        ) from error
    return path


def check_download(file: Path, named: Path) -> None:
    """Refuse a file that is empty, a web page, or, if it is to be called .gz, no complete gzip file."""
    with open(file, "rb") as stream:
        head = stream.read(512).lstrip().lower()
    if not head or head.startswith((b"<!doctype", b"<html", b"<?xml")):
        content = "a web page, not data" if head else "empty"
        raise ValueError(f"{named} is {content}; expected the data file: download it elsewhere and save it there")
    if named.suffix == ".gz":
        with reading(named, "a complete gzip file"), gzip.open(file) as stream:
            while stream.read(1 << 22):
                pass


def gse130148(raw: Path, geo_url: str, gene_length_url: str | None) -> Source:
    """Human lung, Drop-seq (Vieira Braga et al., Nature Medicine 2019, doi 10.1038/s41591-019-0468-5)."""
    files = ("GSE130148_raw_counts.csv.gz", "GSE130148_barcodes_cell_types.txt.gz")
    count_file, label_file = (fetch(f"{geo_url}/{file.replace('_', '%5F')}", raw / file) for file in files)
    length_file = None
    if gene_length_url is not None:
        try:
            length_file = fetch(gene_length_url, raw / "GeneLength.txt")
        except ConnectionError as error:  # only USE_GENE_LENGTHS in stage 2 needs lengths
            print(f"WARNING: no gene lengths, so USE_GENE_LENGTHS in stage 2 will not work: {error}")
    adata = read_count_table(count_file, "genes_in_rows")
    adata.obs = read_labels(label_file, adata.obs_names, "celltype").rename(columns={"ID": "donor"})
    return Source(CellStream.of(adata, "GSE130148"), f"GEO GSE130148, {geo_url}", length_file)


def pbmc68k_reduced(_: Path) -> Source:
    """Human blood, inside scanpy (Zheng et al., Nature Communications 2017).

    scanpy stores log(1 + count x 10,000 / n_counts), rounded to 3 decimals, so the counts can be recovered exactly.
    """
    source = sc.datasets.pbmc68k_reduced()
    normalized = sp.csr_matrix(source.raw.X, dtype=np.float64)
    exact = sp.diags_array(source.obs["n_counts"].to_numpy(np.float64) / 1e4).dot(normalized.expm1()).tocsr()
    counts = exact.rint()
    assert np.abs((exact - counts).data).max(initial=0) < 0.25, "scanpy's pbmc68k_reduced has changed"
    obs = pd.DataFrame({"cell_type": clean_labels(source.obs["bulk_labels"])})
    adata = ad.AnnData(counts, obs=obs, var=source.raw.var[[]])
    return Source(CellStream.of(adata, "pbmc68k_reduced"), "scanpy.datasets.pbmc68k_reduced")


def pbmc1k(raw: Path) -> Source:
    """Blood of a healthy donor, 10x v3."""
    file = "pbmc_1k_v3_filtered_feature_bc_matrix.h5"
    url = f"{URLS['10x']}/3.0.0/pbmc_1k_v3/{file}"
    return Source(open_10x(fetch(url, raw / file)), url)


def pbmc3k(raw: Path) -> Source:
    """Blood of a healthy donor, 10x v1; the types are the eight Louvain clusters of scanpy's tutorial (`pbmc3k_processed`), named by
    marker genes. 62 of the 2,700 cells fail its quality control and have none. Without the file of types, a warning says so.
    """
    cells, url = cell_ranger_archive("pbmc3k/pbmc3k", raw)
    try:
        label_file = fetch(f"{URLS['cellxgene']}/pbmc3k.h5ad", raw / "pbmc3k_processed.h5ad")
    except ConnectionError as error:  # stage 1 can cluster the cells
        print(f"WARNING: no cell types of pbmc3k, so stage 1 will cluster the cells: {error}")
        return Source(cells, url)
    with reading(label_file, "scanpy's pbmc3k_processed, with the types of these cells in obs['louvain']"):
        louvain = ad.read_h5ad(label_file).obs["louvain"].reindex(cells.obs.index)
        if louvain.isna().all():
            raise ValueError(f"it has no type of the cells, such as {louvain.index[0]}")
    cells.obs["cell_type"] = clean_labels(louvain)
    print(f"{louvain.notna().sum():,} of {len(louvain):,} cells have a label in {label_file.name}")
    return Source(cells, url)


def pbmc68k(raw: Path) -> Source:
    """Fresh blood cells of donor A, with the labels of the paper (Zheng et al., Nature Communications 2017)."""
    cells, url = cell_ranger_archive("fresh_68k_pbmc_donor_a/fresh_68k_pbmc_donor_a", raw)
    labels = fetch(f"{URLS['zheng']}/68k_pbmc_barcodes_annotation.tsv", raw / "68k_pbmc_barcodes_annotation.tsv")
    cells.obs = read_labels(labels, cells.obs.index, "celltype")[["cell_type"]]
    return Source(cells, url)


def cell_ranger_archive(name: str, raw: Path) -> tuple[CellStream, str]:
    """The cells of a .tar.gz of 10x with one folder of MatrixMarket files, and its address."""
    url = f"{URLS['10x']}/1.1.0/{name}_filtered_gene_bc_matrices.tar.gz"
    archive = fetch(url, raw / url.rpartition("/")[2])
    with tempfile.TemporaryDirectory(dir=raw) as folder, reading(archive, "a .tar.gz with one matrix.mtx"):
        shutil.unpack_archive(archive, folder, filter="data")
        (matrix,) = Path(folder).rglob("matrix.mtx")
        return open_mtx(matrix.parent), url


def dentate_gyrus(raw: Path) -> Source:
    """Mouse dentate gyrus: the spliced counts of scVelo's copy of GSE95753, and the bulk GSE74985, by gene symbol."""
    url = f"{URLS['scvelo']}/10X43_1.h5ad"
    file = fetch(url, raw / "dentate_gyrus_10X43_1.h5ad")
    with reading(file, "scVelo's DentateGyrus/10X43_1.h5ad"):
        source = ad.read_h5ad(file)
        obs = pd.DataFrame({"cell_type": clean_labels(source.obs["clusters"])})
        adata = ad.AnnData(source.layers["spliced"], obs=obs, var=source.var[[]])
    counts, names = (raw / f"GSE74985_{file}" for file in ("mergedCount.txt.gz", "genes.fpkm_tracking.gz"))
    for path in (counts, names):
        fetch(f"{URLS['geo']}/{path.name.replace('_', '%5F', 1)}", path)
    with reading(counts, "a table of counts"):
        bulk = pd.read_csv(counts, sep="\t", index_col=0)
    with reading(names, "a table with the columns gene_id and gene_short_name"):
        genes = pd.read_csv(names, sep="\t").drop_duplicates("gene_id").set_index("gene_id")["gene_short_name"]
    symbols = bulk.index.map(genes)
    print(f"{counts.name}: {symbols.notna().sum():,} of {len(bulk):,} genes have a symbol")
    bulk = bulk.groupby(symbols).sum().T.rename_axis(index="sample", columns=None)
    return Source(CellStream.of(adata, "dentate_gyrus"), url, bulk=bulk)


def e_annd_5(raw: Path) -> Source:
    """Cells of the EBI Single Cell Expression Atlas: a .zip of a MatrixMarket table, genes x cells, and its lists."""
    url = f"{URLS['ebi']}/E-ANND-5/download"
    design = fetch(f"{url}?accessKey=&fileType=experiment-design", raw / "E-ANND-5_experimental_design.tsv")
    packed = fetch(f"{url}/zip?accessKey=&fileType=quantification-raw", raw / "E-ANND-5_expression_archive.zip")
    with reading(packed, "a complete zip archive of the EBI"), zipfile.ZipFile(packed) as archive:
        parts = {Path(part).suffix: part for part in archive.namelist()}
        genes, barcodes = (
            pd.read_csv(archive.open(parts[suffix]), sep="\t", header=None, dtype=str)
            for suffix in (".mtx_rows", ".mtx_cols")
        )
        counts = sp.csr_matrix(scipy.io.mmread(archive.open(parts[".mtx"])).T)
        obs = pd.DataFrame(index=barcodes[0].to_numpy())
        adata = ad.AnnData(counts, obs=obs, var=pd.DataFrame(index=genes[1].to_numpy()))
    with reading(design, f"a table of cells with a Factor Value of {' or '.join(EBI_LABELS)}"):
        table = pd.read_csv(design, sep="\t", index_col=0, dtype=str)
        labels = table.filter(items=[f"Factor Value[{name}]" for name in EBI_LABELS]).iloc[:, 0]
    adata.obs["cell_type"] = clean_labels(labels.reindex(adata.obs_names))
    return Source(CellStream.of(adata, "E-ANND-5"), url)


SETS: dict[str, tuple[Callable[..., Source], int]] = {  # name: its reader, number of cells
    "GSE130148": (gse130148, 10_360),
    "pbmc68k_reduced": (pbmc68k_reduced, 700),
    "pbmc1k": (pbmc1k, 1_222),
    "pbmc3k": (pbmc3k, 2_700),
    "pbmc68k": (pbmc68k, 68_579),
    "dentate_gyrus": (dentate_gyrus, 2_930),
    "E-ANND-5": (e_annd_5, 828_328),
}
NAMES = tuple(SETS)
