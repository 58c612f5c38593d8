"""Data sets that other systems of the field are shown on, from their own servers, in their own formats.

name          cells x genes     what comes                                                        labels
pbmc1k        1,222 x 33,538    10x .h5, Cell Ranger 3                                            none
pbmc3k        2,700 x 32,738    10x .tar.gz of matrix.mtx, genes.tsv, barcodes.tsv                none
pbmc68k       68,579 x 32,738   the same, 124 MB; labels a .tsv (Zheng et al. 2017)               11 types
dentate_gyrus 2,930 x 13,913    .h5ad, scVelo's copy of GSE95753 (Hochgerner et al. 2018)         clusters; bulk GSE74985
E-ANND-5      828,328 cells     .zip of .mtx, .mtx_rows, .mtx_cols, and a design .tsv (EBI)       126 types
"""

import tarfile
import zipfile
from pathlib import Path

import anndata as ad
import pandas as pd
import scanpy as sc
from scanpy.datasets._ebi_expression_atlas import read_expression_from_archive

from lib.data.download import fetch
from lib.data.labels import clean_labels, read_labels
from lib.data.readers import read_mtx_folder

URLS = {
    "10x": "https://cf.10xgenomics.com/samples/cell-exp",
    "zheng": "https://raw.githubusercontent.com/10XGenomics/single-cell-3prime-paper/master/pbmc68k_analysis",
    "scvelo": "https://github.com/theislab/scvelo_notebooks/raw/master/data/DentateGyrus",
    "geo": "https://ftp.ncbi.nlm.nih.gov/geo/series/GSE74nnn/GSE74985/suppl",
    "ebi": "https://www.ebi.ac.uk/gxa/sc/experiment",
}
N_CELLS = {"pbmc1k": 1_222, "pbmc3k": 2_700, "pbmc68k": 68_579, "dentate_gyrus": 2_930, "E-ANND-5": 828_328}
EBI_LABELS = tuple(
    f"Factor Value[{name}]"
    for name in ("inferred cell type - authors labels", "inferred cell type - ontology labels", "cell type")
)


def read(name: str, raw: Path) -> tuple[ad.AnnData, str, pd.DataFrame | None]:
    """A data set of `N_CELLS`, its files kept in the folder `raw`: counts with obs["cell_type"] where it has labels; its source; its bulk.

    Raises
    ------
    ValueError
        If what came has not the number of cells that the source tells.
    """
    adata, source, bulk = READERS[name](raw)
    if adata.n_obs != N_CELLS[name]:
        raise ValueError(
            f"{name} has {adata.n_obs:,} cells, expected {N_CELLS[name]:,}: delete its files in {raw} and run this again, or give their path as DATASET"
        )
    return adata, source, bulk


def pbmc1k(raw: Path) -> tuple[ad.AnnData, str, None]:
    """Blood cells of a healthy donor, 10x v3."""
    file = "pbmc_1k_v3_filtered_feature_bc_matrix.h5"
    url = f"{URLS['10x']}/3.0.0/pbmc_1k_v3/{file}"
    return sc.read_10x_h5(fetch(url, raw / file)), url, None


def pbmc3k(raw: Path) -> tuple[ad.AnnData, str, None]:
    """Blood cells of a healthy donor, 10x v1."""
    url = f"{URLS['10x']}/1.1.0/pbmc3k/pbmc3k_filtered_gene_bc_matrices.tar.gz"
    return read_mtx_folder(unpacked(fetch(url, raw / url.rpartition("/")[2]), raw / "pbmc3k")), url, None


def pbmc68k(raw: Path) -> tuple[ad.AnnData, str, None]:
    """Fresh blood cells of donor A (Zheng et al., Nature Communications 2017), with the paper's types."""
    file = "fresh_68k_pbmc_donor_a_filtered_gene_bc_matrices.tar.gz"
    url = f"{URLS['10x']}/1.1.0/fresh_68k_pbmc_donor_a/{file}"
    adata = read_mtx_folder(unpacked(fetch(url, raw / file), raw / "pbmc68k"))
    labels = fetch(f"{URLS['zheng']}/68k_pbmc_barcodes_annotation.tsv", raw / "68k_pbmc_barcodes_annotation.tsv")
    adata.obs = read_labels(labels, adata.obs_names, "celltype")[["cell_type"]]
    return adata, url, None


def dentate_gyrus(raw: Path) -> tuple[ad.AnnData, str, pd.DataFrame]:
    """Mouse dentate gyrus, scVelo's copy of GSE95753 (its spliced counts), and the bulk of GSE74985, with the copy's gene names."""
    url = f"{URLS['scvelo']}/10X43_1.h5ad"
    source = ad.read_h5ad(fetch(url, raw / "dentate_gyrus_10X43_1.h5ad"))
    obs = pd.DataFrame({"cell_type": clean_labels(source.obs["clusters"])}, index=source.obs_names)
    counts, names = (
        fetch(f"{URLS['geo']}/GSE74985%5F{file}", raw / f"GSE74985_{file}")
        for file in ("mergedCount.txt.gz", "genes.fpkm_tracking.gz")
    )
    return ad.AnnData(source.layers["spliced"], obs=obs, var=source.var[[]].copy()), url, hipposeq(counts, names)


def hipposeq(counts: Path, names: Path) -> pd.DataFrame:
    """The bulk of GSE74985, samples x gene symbols, read counts: Ensembl genes renamed by the series' own table, those of one name summed."""
    table = pd.read_csv(counts, sep="\t", index_col=0)
    symbols = (
        pd.read_csv(names, sep="\t", usecols=["gene_id", "gene_short_name"])
        .drop_duplicates("gene_id")
        .set_index("gene_id")["gene_short_name"]
    )
    known = pd.Series(table.index.map(symbols), index=table.index)
    print(f"{counts.name}: {known.notna().sum():,} of {len(table):,} genes have a symbol")
    return table[known.notna()].groupby(known.dropna()).sum().T.rename_axis(index="sample", columns=None)


def e_annd_5(raw: Path) -> tuple[ad.AnnData, str, None]:
    """Cells of the EBI Single Cell Expression Atlas, through scanpy's reader of its archives."""
    url = f"{URLS['ebi']}/E-ANND-5/download"
    design = fetch(f"{url}?accessKey=&fileType=experiment-design", raw / "E-ANND-5_experimental_design.tsv")
    archive = fetch(f"{url}/zip?accessKey=&fileType=quantification-raw", raw / "E-ANND-5_expression_archive.zip")
    with zipfile.ZipFile(archive) as file:
        adata = read_expression_from_archive(file)
    columns = pd.read_csv(design, sep="\t", index_col=0, nrows=0).columns
    labels = [column for column in EBI_LABELS if column in columns]
    if not labels:
        raise ValueError(
            f"{design} has no column of cell types; it has {', '.join(columns)}; expected one of {', '.join(EBI_LABELS)}"
        )
    table = pd.read_csv(design, sep="\t", index_col=0, usecols=[0, 1 + columns.get_loc(labels[0])], dtype=str)
    adata.obs = pd.DataFrame(
        {"cell_type": clean_labels(table.iloc[:, 0].reindex(adata.obs_names))}, index=adata.obs_names.rename(None)
    )
    return adata, url, None


READERS = {"pbmc1k": pbmc1k, "pbmc3k": pbmc3k, "pbmc68k": pbmc68k, "dentate_gyrus": dentate_gyrus, "E-ANND-5": e_annd_5}


def unpacked(archive: Path, folder: Path) -> Path:
    """The folder inside a .tar.gz that holds the matrix."""
    if not folder.exists():
        partial = folder.with_name(folder.name + ".part")
        with tarfile.open(archive) as file:
            file.extractall(partial, filter="data")
        partial.rename(folder)
    found = sorted(path.parent for path in folder.rglob("matrix.mtx*"))
    if len(found) != 1:
        raise ValueError(
            f"{archive} holds {len(found)} files called matrix.mtx, expected one; delete it and {folder}, and run this again"
        )
    return found[0]
