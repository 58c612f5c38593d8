"""The data sets known by name, from files of their exact formats on a local server."""

import gzip
import inspect
import io
import tarfile
import zipfile

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
import scanpy as sc
import scipy.io
import scipy.sparse as sp
from helpers import Workplace

from lib.data import datasets
from lib.records import record_path

GENES = [
    ("ENSG00000243485", "MIR1302-10"),
    ("ENSG00000075624", "ACTB"),
    ("ENSG00000111640", "GAPDH"),
    ("ENSG00000166710", "B2M"),
]
COUNTS = np.array([[0, 3, 1, 2], [1, 0, 0, 5], [0, 2, 2, 0]])  # cells x genes
BARCODES = ["AAACATACAACCAC-1", "AAACATTGAGCTAC-1", "AAACATTGATCAGC-1"]


@pytest.fixture
def served(site, monkeypatch):
    """The local server in place of all others; each data set has three cells."""
    monkeypatch.setattr(datasets, "URLS", {name: site.url(name) for name in datasets.URLS})
    monkeypatch.setattr(datasets, "N_CELLS", dict.fromkeys(datasets.N_CELLS, 3))
    return site.files


def mtx(counts) -> bytes:
    file = io.BytesIO()
    scipy.io.mmwrite(file, sp.coo_matrix(counts), field="integer")
    return file.getvalue()


def tar(folder: str) -> bytes:
    """Cell Ranger 1 and 2: genes x cells."""
    lists = {"genes.tsv": "".join(f"{a}\t{b}\n" for a, b in GENES), "barcodes.tsv": "".join(f"{b}\n" for b in BARCODES)}
    parts = {"matrix.mtx": mtx(COUNTS.T)} | {name: text.encode() for name, text in lists.items()}
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as file:
        for name, body in parts.items():
            entry = tarfile.TarInfo(f"{folder}/{name}")
            entry.size = len(body)
            file.addfile(entry, io.BytesIO(body))
    return packed.getvalue()


def stage_0(tmp_path, name: str) -> ad.AnnData:
    place = Workplace(tmp_path)
    place.main("_0_download_data.py", DATASET=name)
    return ad.read_h5ad(place.data / "counts.h5ad")


def test_pbmc1k(served, tmp_path):
    """Cell Ranger 3's .h5: CSC of genes x cells, features with their kind."""
    packed = io.BytesIO()
    csc = sp.csc_matrix(COUNTS.T)
    with h5py.File(packed, "w") as file:
        group = file.create_group("matrix")
        group["barcodes"] = np.array(BARCODES, dtype="S18")
        group["data"], group["indices"], group["indptr"] = (
            csc.data.astype(np.int32),
            csc.indices.astype(np.int64),
            csc.indptr.astype(np.int64),
        )
        group["shape"] = np.array(csc.shape, dtype=np.int32)
        features = group.create_group("features")
        features["_all_tag_keys"] = np.array(["genome"], dtype="S6")
        for key, values in (
            ("id", [a for a, _ in GENES]),
            ("name", [b for _, b in GENES]),
            ("feature_type", ["Gene Expression"] * 4),
            ("genome", ["GRCh38"] * 4),
        ):
            features[key] = np.array(values, dtype="S20")
    served["10x/3.0.0/pbmc_1k_v3/pbmc_1k_v3_filtered_feature_bc_matrix.h5"] = packed.getvalue()
    adata = stage_0(tmp_path, "pbmc1k")
    np.testing.assert_array_equal(adata.X.toarray(), COUNTS)
    assert (
        list(adata.var_names) == [b for _, b in GENES]
        and list(adata.obs_names) == BARCODES
        and "cell_type" not in adata.obs
    )


PBMC3K = "10x/1.1.0/pbmc3k/pbmc3k_filtered_gene_bc_matrices.tar.gz"


def processed(folder, **obs) -> bytes:
    """As scanpy's processed copy: scaled values of some genes, fewer cells, another order."""
    adata = ad.AnnData(
        np.array([[0.1, -0.5], [-1.2, 2.0]], np.float32),
        obs=pd.DataFrame({"n_genes": [781, 1352]} | obs, index=[BARCODES[2], BARCODES[0]]),
        var=pd.DataFrame(index=["TNFRSF4", "CPSF3L"]),
    )
    adata.write_h5ad(folder / "processed.h5ad")
    return (folder / "processed.h5ad").read_bytes()


def test_pbmc3k(served, tmp_path, capsys):
    served[PBMC3K] = tar("filtered_gene_bc_matrices/hg19")
    served["cellxgene/pbmc3k.h5ad"] = processed(tmp_path, louvain=pd.Categorical(["B cells", "CD4 T cells"]))
    for _ in range(2):
        adata = stage_0(tmp_path, "pbmc3k")
        np.testing.assert_array_equal(adata.X.toarray(), COUNTS)
        assert list(adata.var_names) == [b for _, b in GENES] and adata.uns["dataset"] == "pbmc3k"
        assert adata.obs["cell_type"].isna().tolist() == [False, True, False]
        assert list(adata.obs["cell_type"].dropna()) == ["CD4 T cells", "B cells"] and list(adata.obs) == ["cell_type"]
        assert "2 of 3 cells have a label in pbmc3k_processed.h5ad" in capsys.readouterr().out
        served.clear()  # the second time from the files in data/raw


def test_pbmc3k_goes_on_without_labels_with_a_warning(served, tmp_path, capsys):
    served[PBMC3K] = tar("filtered_gene_bc_matrices/hg19")
    adata = stage_0(tmp_path, "pbmc3k")
    np.testing.assert_array_equal(adata.X.toarray(), COUNTS)
    printed = capsys.readouterr().out
    assert (
        "cell_type" not in adata.obs
        and "WARNING: no cell types of pbmc3k, so stage 1 will cluster the cells" in printed
    )
    assert "404" in printed and f"save it as {tmp_path / 'data' / 'raw' / 'pbmc3k_processed.h5ad'}" in printed


def test_pbmc3k_refuses_labels_of_something_else(served, tmp_path):
    served[PBMC3K] = tar("filtered_gene_bc_matrices/hg19")
    served["cellxgene/pbmc3k.h5ad"] = processed(tmp_path, leiden=["0", "1"])
    with pytest.raises(
        ValueError, match="pbmc3k_processed.h5ad has no cell types of these cells: its obs has n_genes, leiden"
    ):
        stage_0(tmp_path, "pbmc3k")
    other = ad.AnnData(np.ones((1, 1)), obs=pd.DataFrame({"louvain": ["B cells"]}, index=["cell_1"]))
    file = tmp_path / "data" / "raw" / "pbmc3k_processed.h5ad"
    other.write_h5ad(file)
    with pytest.raises(
        ValueError, match="pbmc3k_processed.h5ad is not the file that was used before.*delete it and run this again"
    ):
        stage_0(tmp_path, "pbmc3k")
    record_path(file).unlink()
    with pytest.raises(
        ValueError, match="for barcodes such as cell_1; expected the column louvain for barcodes such as AAACAT"
    ):
        stage_0(tmp_path, "pbmc3k")


def test_pbmc68k(served, tmp_path):
    served["10x/1.1.0/fresh_68k_pbmc_donor_a/fresh_68k_pbmc_donor_a_filtered_gene_bc_matrices.tar.gz"] = tar(
        "filtered_matrices_mex/hg19"
    )
    rows = zip(BARCODES[::-1], ["CD14+ Monocyte", "CD19+ B", "CD56+ NK"])
    served["zheng/68k_pbmc_barcodes_annotation.tsv"] = (
        "TSNE.1\tTSNE.2\tbarcodes\tcelltype\n" + "".join(f"1.5\t-2\t{b}\t{t}\n" for b, t in rows)
    ).encode()
    adata = stage_0(tmp_path, "pbmc68k")
    assert list(adata.obs["cell_type"]) == ["CD56+ NK", "CD19+ B", "CD14+ Monocyte"]
    np.testing.assert_array_equal(adata.X.toarray(), COUNTS)


def test_dentate_gyrus_and_its_bulk(served, tmp_path):
    genes = ["Actb", "Gapdh", "Prox1", "Rbfox3"]
    obs = pd.DataFrame(
        {"clusters": pd.Categorical(["Granule mature", "OPC", "nIPC"]), "age(days)": ["12", "12", "35"]}, index=BARCODES
    )
    spliced = sp.csr_matrix(COUNTS.astype(np.float32))
    source = ad.AnnData(
        spliced * 0.5, obs=obs, var=pd.DataFrame(index=genes), layers={"spliced": spliced, "unspliced": spliced * 2}
    )
    source.write_h5ad(tmp_path / "source.h5ad")
    served["scvelo/10X43_1.h5ad"] = (tmp_path / "source.h5ad").read_bytes()
    counts = "\tdg_d_1\tdg_d_2\nENSMUSG01\t5\t0\nENSMUSG02\t7\t1\nENSMUSG03\t1\t1\nENSMUSG99\t4\t4\n"
    header = "tracking_id\tclass_code\tnearest_ref_id\tgene_id\tgene_short_name\ttss_id\tlocus\tlength\tcoverage\tdg_d_FPKM\n"
    tracking = header + "".join(
        f"ENSMUSG0{i}\t-\t-\tENSMUSG0{i}\t{g}\tTSS1\tchr1:1-2\t-\t-\t1.5\n"
        for i, g in ((1, "Actb"), (2, "Prox1"), (3, "Actb"))
    )
    served["geo/GSE74985_mergedCount.txt.gz"] = gzip.compress(counts.encode())
    served["geo/GSE74985_genes.fpkm_tracking.gz"] = gzip.compress(tracking.encode())
    adata = stage_0(tmp_path, "dentate_gyrus")
    np.testing.assert_array_equal(adata.X.toarray(), COUNTS)
    assert list(adata.obs["cell_type"]) == ["Granule mature", "OPC", "nIPC"]
    bulk = pd.read_csv(tmp_path / "data" / "bulk.csv", index_col=0)
    assert list(bulk.index) == ["dg_d_1", "dg_d_2"] and bulk.to_dict("list") == {"Actb": [6, 1], "Prox1": [7, 1]}


def archive() -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as file:
        file.writestr("E-ANND-5.aggregated_filtered_counts.mtx", mtx(COUNTS.T))
        file.writestr("E-ANND-5.aggregated_filtered_counts.mtx_rows", "".join(f"{a}\t{a}\n" for a, _ in GENES))
        file.writestr("E-ANND-5.aggregated_filtered_counts.mtx_cols", "".join(f"{b}\n" for b in BARCODES))
    return packed.getvalue()


def test_e_annd_5(served, tmp_path):
    inferred = [f"Factor Value[inferred cell type - {by} labels]" for by in ("ontology", "authors")]
    columns = "\t".join(["Assay", "Sample Characteristic[organism]", *inferred]) + "\n"
    design = columns + "".join(f"{b}\tHomo sapiens\tleukocyte\t{t}\n" for b, t in zip(BARCODES[::-1], ("T", "B", "")))
    served["ebi/E-ANND-5/download?accessKey=&fileType=experiment-design"] = design.encode()
    served["ebi/E-ANND-5/download/zip?accessKey=&fileType=quantification-raw"] = archive()
    adata = stage_0(tmp_path, "E-ANND-5")
    np.testing.assert_array_equal(adata.X.toarray(), COUNTS)
    assert adata.obs["cell_type"].isna().tolist() == [True, False, False] and list(adata.obs["cell_type"][1:]) == [
        "B",
        "T",
    ]
    design = tmp_path / "data" / "raw" / "E-ANND-5_experimental_design.tsv"
    design.write_text("Assay\tFactor Value[age]\nx\t1\n")
    record_path(design).unlink()
    with pytest.raises(ValueError, match=r"has no column of cell types; it has Factor Value\[age\]"):
        stage_0(tmp_path, "E-ANND-5")


def test_half_a_data_set_is_refused(served, tmp_path, monkeypatch):
    monkeypatch.setitem(datasets.N_CELLS, "pbmc3k", 2_700)
    served[PBMC3K] = tar("filtered_gene_bc_matrices/hg19")
    with pytest.raises(ValueError, match="pbmc3k has 3 cells, expected 2,700"):
        stage_0(tmp_path, "pbmc3k")


def test_every_name_has_a_reader():
    assert ["GSE130148", *datasets.READERS] == list(datasets.NAMES) == list(datasets.N_CELLS)


def test_every_address_is_that_of_the_source_itself():
    hosts = (
        "https://cf.10xgenomics.com/",
        "https://raw.githubusercontent.com/chanzuckerberg/cellxgene/",
        "https://raw.githubusercontent.com/10XGenomics/",
        "https://github.com/theislab/",
        "https://ftp.ncbi.nlm.nih.gov/",
        "https://www.ebi.ac.uk/",
    )
    assert all(url.startswith(host) for url, host in zip(datasets.URLS.values(), hosts, strict=True))
    assert f"{datasets.URLS['cellxgene']}/pbmc3k.h5ad" in inspect.getsource(sc.datasets.pbmc3k_processed)


def test_the_counts_of_pbmc68k_reduced_follow_from_what_scanpy_stores(tmp_path):
    adata = datasets.load("pbmc68k_reduced", tmp_path, "", "").cells.in_memory()
    stored = sc.datasets.pbmc68k_reduced()
    assert (
        adata.shape == (700, 765)
        and list(adata.obs_names) == list(stored.obs_names)
        and list(adata.var_names) == list(stored.raw.var_names)
    )
    counts = adata.X.toarray().astype(np.float64)
    assert (counts == np.rint(counts)).all() and counts.min() == 0 and counts.max() > 100
    again = np.log1p(counts / stored.obs["n_counts"].to_numpy(dtype=np.float64)[:, None] * 1e4)
    np.testing.assert_allclose(again, stored.raw.X.toarray(), atol=2e-3, rtol=0)
    assert adata.obs["cell_type"].tolist() == stored.obs["bulk_labels"].astype(str).tolist()
