"""The data sets that `_0_download_data.py` knows by name."""

from pathlib import Path
from typing import NamedTuple

import anndata as ad
import numpy as np
import pandas as pd
import scanpy as sc
import scipy.sparse as sp

from lib.data import published
from lib.data.download import fetch
from lib.data.labels import clean_labels, read_labels
from lib.data.readers import read_count_table, tidy


class Source(NamedTuple):
    """Counts as they came, before the checks that all data sets share."""

    adata: ad.AnnData
    description: str  # where the counts came from
    gene_length_file: Path | None
    bulk: pd.DataFrame | None = None  # samples x genes, counts, where a bulk comes with the cells


def gse130148(raw: Path, geo_url: str, gene_length_url: str | None) -> Source:
    """Human lung, Drop-seq: 10,360 cells of 13 types (Vieira Braga et al., Nature Medicine 2019, doi 10.1038/s41591-019-0468-5)."""
    count_file = fetch(f"{geo_url}/GSE130148%5Fraw%5Fcounts.csv.gz", raw / "GSE130148_raw_counts.csv.gz")
    label_file = fetch(
        f"{geo_url}/GSE130148%5Fbarcodes%5Fcell%5Ftypes.txt.gz", raw / "GSE130148_barcodes_cell_types.txt.gz"
    )
    length_file = None
    if gene_length_url is not None:
        try:
            length_file = fetch(gene_length_url, raw / "GeneLength.txt")
        except ConnectionError as error:  # the cells are there, and only USE_GENE_LENGTHS in stage 2 needs lengths
            print(f"WARNING: no gene lengths, so USE_GENE_LENGTHS in stage 2 will not work: {error}")
    adata = read_count_table(count_file, "genes_in_rows")
    if adata.n_obs != 10_360:
        raise ValueError(
            f"{count_file} has {adata.n_obs:,} cells, expected the 10,360 of GSE130148; delete it and run this again, or give its path as DATASET"
        )
    labels = read_labels(label_file, adata.obs_names, "celltype")
    adata.obs = labels.rename(columns={"ID": "donor"})
    return Source(adata, f"GEO GSE130148, {geo_url}", length_file)


def pbmc68k_reduced() -> Source:
    """700 human blood cells, 765 genes, that scanpy carries (Zheng et al., Nature Communications 2017).

    scanpy's copy holds log(1 + count x 10,000 / n_counts), rounded to 3 decimals, so the counts follow exactly.
    """
    source = sc.datasets.pbmc68k_reduced()
    normalized = sp.csr_matrix(source.raw.X, dtype=np.float64)
    n_counts = source.obs["n_counts"].to_numpy(dtype=np.float64)
    exact = sp.diags_array(n_counts / 1e4).dot(normalized.expm1()).tocsr()
    counts = exact.rint()
    assert np.abs((exact - counts).data).max(initial=0) < 0.25, (
        "scanpy's pbmc68k_reduced has changed: counts no longer follow"
    )
    obs = pd.DataFrame({"cell_type": clean_labels(source.obs["bulk_labels"])}, index=source.obs_names)
    return Source(
        ad.AnnData(counts, obs=obs, var=pd.DataFrame(index=source.raw.var_names)),
        "scanpy.datasets.pbmc68k_reduced",
        None,
    )


NAMES = ("GSE130148", "pbmc68k_reduced", *published.READERS)


def load(name: str, raw: Path, geo_url: str, gene_length_url: str | None) -> Source:
    """A data set of `NAMES`; files that must be downloaded are kept in the folder `raw`. None: no gene lengths wanted."""
    if name in published.READERS:
        adata, description, bulk = published.read(name, raw)
        source = Source(adata, description, None, bulk)
    else:
        source = pbmc68k_reduced() if name == "pbmc68k_reduced" else gse130148(raw, geo_url, gene_length_url)
    return source._replace(adata=tidy(source.adata, name))
