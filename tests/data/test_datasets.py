"""Downloads from a local server, and the data sets known by name, from files of their exact formats on it."""

import gzip
import io
import random
import shutil
import zipfile

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scanpy as sc
import scipy.sparse as sp
from formats import BARCODES, COUNTS, GENES, IDS, TYPES, cellranger_2, cellranger_h5, write_mtx
from helpers import Workplace

from lib.data import datasets
from lib.data.datasets import RETRIES, fetch


@pytest.fixture(autouse=True)
def no_waits_no_proxy(monkeypatch):
    monkeypatch.setattr("pooch.core.time.sleep", lambda _: None)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


# --- downloads

BODY = random.Random(0).randbytes(300_000)
TABLE = b"gene,length\n" + b"".join(b"GENE%d,%d\n" % (i, 1000 + i) for i in range(5000))
GZIP = gzip.compress(TABLE, mtime=0)
PAGE = b"<!DOCTYPE html>\n<html><body>Sign in to the campus network</body></html>"


def cut(handler, body):
    handler.answer(200, body[: len(body) // 2], announced=len(body))


def status(code: int):
    return lambda handler, body: handler.answer(code, b"it went wrong")


def served_file(site, path, body=BODY):
    site.files[path.name] = body
    return fetch(site.url(path.name), path)


@pytest.mark.parametrize("failure", [cut, status(503), status(429)], ids=["cut", "503", "429"])
def test_a_failed_download_is_tried_again(site, tmp_path, failure):
    site.answers = [failure, failure, site.answers[0]]
    assert served_file(site, tmp_path / "counts.bin").read_bytes() == BODY
    assert site.n_requests == 3 and [path.name for path in tmp_path.iterdir()] == ["counts.bin"]


@pytest.mark.parametrize("answer", [status(404), status(500), cut])
def test_a_download_that_fails_says_what_to_save_where(site, tmp_path, answer):
    site.answers, path = [answer], tmp_path / "counts.bin"
    with pytest.raises(ConnectionError, match=f"counts.bin could not be downloaded .*save it as {path}"):
        served_file(site, path)
    assert site.n_requests == RETRIES + 1 and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "body", "message"),
    [
        ("GeneLength.txt", PAGE, "is a web page, not data"),
        ("GeneLength.txt", b"", "is empty"),
        ("counts.csv.gz", GZIP[: len(GZIP) // 2], "could not be read .*complete gzip"),
        ("counts.csv.gz", GZIP[:-8] + bytes(b ^ 0xFF for b in GZIP[-8:-4]) + GZIP[-4:], "could not be read .*complete gzip"),
        ("counts.csv.gz", TABLE, "could not be read .*complete gzip"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("is_there", [True, False])
def test_a_file_of_something_else_is_refused(site, tmp_path, name, body, message, is_there):
    path = tmp_path / name
    if is_there:
        path.write_bytes(body)
    with pytest.raises(ValueError, match=f"{name} {message}"):
        served_file(site, path, body)
    assert path.exists() == is_there, "a file of the user stays, another one does not get its name"


# --- data sets


@pytest.fixture
def served(site, monkeypatch):
    """The local server in place of all others; each data set has twelve cells."""
    monkeypatch.setattr(datasets, "URLS", {name: site.url(name) for name in datasets.URLS})
    monkeypatch.setattr(datasets, "SETS", {name: (reader, 12) for name, (reader, _) in datasets.SETS.items()})
    return site.files


def archive(path, folder: str) -> bytes:
    """The .tar.gz of Cell Ranger 1 and 2."""
    (path / "packed" / folder).mkdir(parents=True)
    cellranger_2(path / "packed" / folder)
    with open(shutil.make_archive(str(path / "packed"), "gztar", path / "packed"), "rb") as file:
        return file.read()


def stage_0(tmp_path, name: str, **constants) -> ad.AnnData:
    place = Workplace(tmp_path)
    place.main("_0_download_data.py", DATASET=name, **constants)
    adata = ad.read_h5ad(place.data / "counts.h5ad")
    np.testing.assert_array_equal(adata.X.toarray(), COUNTS)
    assert list(adata.obs_names) == BARCODES and adata.uns["dataset"] == name
    return adata


def test_pbmc1k(served, tmp_path):
    url = "10x/3.0.0/pbmc_1k_v3/pbmc_1k_v3_filtered_feature_bc_matrix.h5"
    served[url] = cellranger_h5(tmp_path).read_bytes()
    adata = stage_0(tmp_path, "pbmc1k")
    assert list(adata.var_names) == GENES and "cell_type" not in adata.obs


@pytest.fixture
def pbmc3k(served, tmp_path):
    path = "filtered_gene_bc_matrices"
    served[f"10x/1.1.0/pbmc3k/pbmc3k_{path}.tar.gz"] = archive(tmp_path, f"{path}/hg19")
    return served


def processed(path, barcodes=(BARCODES[2], BARCODES[0]), **obs) -> bytes:
    """As scanpy's processed copy: scaled values of some genes, fewer cells, another order."""
    values = np.array([[0.1, -0.5], [-1.2, 2.0]], np.float32)
    ad.AnnData(values, obs=pd.DataFrame(obs, index=barcodes)).write_h5ad(path / "processed.h5ad")
    return (path / "processed.h5ad").read_bytes()


def test_pbmc3k(site, pbmc3k, tmp_path, capsys):
    pbmc3k["cellxgene/pbmc3k.h5ad"] = processed(tmp_path, louvain=pd.Categorical(["B cells", "CD4 T cells"]))
    for _ in range(2):
        adata = stage_0(tmp_path, "pbmc3k")
        assert list(adata.var_names) == GENES and list(adata.obs) == ["cell_type"]
        assert adata.obs["cell_type"].dropna().to_dict() == {BARCODES[0]: "CD4 T cells", BARCODES[2]: "B cells"}
        assert "2 of 12 cells have a label in pbmc3k_processed.h5ad" in capsys.readouterr().out
        pbmc3k.clear()  # the second time from the files in data/raw
    assert site.n_requests == 2


def test_pbmc3k_goes_on_without_labels_with_a_warning(pbmc3k, tmp_path, capsys):
    assert "cell_type" not in stage_0(tmp_path, "pbmc3k").obs
    printed = capsys.readouterr().out
    assert "WARNING: no cell types of pbmc3k, so stage 1 will cluster the cells" in printed and "404" in printed
    assert f"save it as {tmp_path / 'data' / 'raw' / 'pbmc3k_processed.h5ad'}" in printed


@pytest.mark.parametrize("obs", [{"leiden": ["0", "1"]}, {"louvain": ["B", "T"], "barcodes": ["cell_1", "cell_2"]}])
def test_pbmc3k_refuses_labels_of_something_else(pbmc3k, tmp_path, obs):
    pbmc3k["cellxgene/pbmc3k.h5ad"] = processed(tmp_path, **obs)
    with pytest.raises(ValueError, match=r"pbmc3k_processed.h5ad could not be read .*louvain"):
        stage_0(tmp_path, "pbmc3k")


def test_half_a_data_set_is_refused(pbmc3k, tmp_path, monkeypatch):
    monkeypatch.setitem(datasets.SETS, "pbmc3k", (datasets.pbmc3k, 2_700))
    with pytest.raises(ValueError, match="pbmc3k has 12 cells, expected 2,700: delete its files"):
        stage_0(tmp_path, "pbmc3k")


def test_pbmc68k(served, tmp_path):
    url = "10x/1.1.0/fresh_68k_pbmc_donor_a/fresh_68k_pbmc_donor_a_filtered_gene_bc_matrices.tar.gz"
    served[url] = archive(tmp_path, "filtered_matrices_mex/hg19")
    rows = "".join(f"1.5\t-2\t{barcode}\t{name}\n" for barcode, name in zip(BARCODES[::-1], TYPES[::-1]))
    served["zheng/68k_pbmc_barcodes_annotation.tsv"] = f"TSNE.1\tTSNE.2\tbarcodes\tcelltype\n{rows}".encode()
    assert list(stage_0(tmp_path, "pbmc68k").obs["cell_type"]) == TYPES


def test_dentate_gyrus_and_its_bulk(served, tmp_path):
    obs = pd.DataFrame({"clusters": pd.Categorical(TYPES), "age(days)": "12"}, index=BARCODES)
    var, spliced = pd.DataFrame(index=GENES), sp.csr_matrix(COUNTS, dtype=np.float32)
    layers = {"spliced": spliced, "unspliced": spliced * 2}
    ad.AnnData(spliced * 0.5, obs=obs, var=var, layers=layers).write_h5ad(tmp_path / "source.h5ad")
    served["scvelo/10X43_1.h5ad"] = (tmp_path / "source.h5ad").read_bytes()
    counts = "\tdg_d_1\tdg_d_2\nENSMUSG01\t5\t0\nENSMUSG02\t7\t1\nENSMUSG03\t1\t1\nENSMUSG99\t4\t4\n"
    tracking = "tracking_id\tclass_code\tgene_id\tgene_short_name\tlocus\n"
    for i, gene in ((1, "Actb"), (2, "Prox1"), (3, "Actb")):
        tracking += f"ENSMUSG0{i}\t-\tENSMUSG0{i}\t{gene}\tchr1:1-2\n"
    served["geo/GSE74985_mergedCount.txt.gz"] = gzip.compress(counts.encode())
    served["geo/GSE74985_genes.fpkm_tracking.gz"] = gzip.compress(tracking.encode())
    assert list(stage_0(tmp_path, "dentate_gyrus").obs["cell_type"]) == TYPES
    bulk = pd.read_csv(tmp_path / "data" / "bulk.csv", index_col=0)
    assert list(bulk.index) == ["dg_d_1", "dg_d_2"] and bulk.to_dict("list") == {"Actb": [6, 1], "Prox1": [7, 1]}


def test_e_annd_5(served, tmp_path):
    by = [f"Factor Value[inferred cell type - {who} labels]" for who in ("ontology", "authors")]
    rows = [f"{barcode}\thuman\tleukocyte\t{name}\n" for barcode, name in zip(BARCODES, ["", *TYPES[1:]])]
    design = "\t".join(["Assay", "Sample Characteristic[organism]", *by]) + "\n" + "".join(rows[::-1])
    packed, name = io.BytesIO(), "E-ANND-5.aggregated_filtered_counts"
    write_mtx(tmp_path / "counts.mtx", COUNTS.T)
    with zipfile.ZipFile(packed, "w") as file:
        file.write(tmp_path / "counts.mtx", f"{name}.mtx")
        file.writestr(f"{name}.mtx_rows", "".join(f"{gene}\t{gene}\n" for gene in IDS))
        file.writestr(f"{name}.mtx_cols", "".join(f"{barcode}\n" for barcode in BARCODES))
    served["ebi/E-ANND-5/download?accessKey=&fileType=experiment-design"] = design.encode()
    served["ebi/E-ANND-5/download/zip?accessKey=&fileType=quantification-raw"] = packed.getvalue()
    cell_type = stage_0(tmp_path, "E-ANND-5").obs["cell_type"]
    assert cell_type.isna().tolist() == [True] + [False] * 11 and list(cell_type[1:]) == TYPES[1:]
    (tmp_path / "data" / "raw" / "E-ANND-5_experimental_design.tsv").write_text("Assay\tFactor Value[age]\nx\t1\n")
    with pytest.raises(ValueError, match="design.tsv could not be read .*expected .*inferred cell type"):
        stage_0(tmp_path, "E-ANND-5")


def test_the_counts_of_pbmc68k_reduced_follow_from_what_scanpy_stores(tmp_path):
    adata = datasets.load("pbmc68k_reduced", tmp_path, "", "").cells.in_memory()
    stored = sc.datasets.pbmc68k_reduced()
    assert adata.shape == (700, 765) and list(adata.var_names) == list(stored.raw.var_names)
    counts = adata.X.toarray().astype(np.float64)
    assert (counts == np.rint(counts)).all() and counts.min() == 0 and counts.max() > 100
    again = np.log1p(counts / stored.obs["n_counts"].to_numpy(dtype=np.float64)[:, None] * 1e4)
    np.testing.assert_allclose(again, stored.raw.X.toarray(), atol=2e-3, rtol=0)
    assert adata.obs["cell_type"].tolist() == stored.obs["bulk_labels"].astype(str).tolist()


def test_gse130148_with_and_without_gene_lengths(site, served, tmp_path, capsys):
    """As GEO serves it: genes in rows, labels in another order, links with %5F in place of _."""
    types = ["1_Unicorns and artifacts", *TYPES[1:]]
    rows = ['"",' + ",".join(f'"{barcode}"' for barcode in BARCODES)]
    rows += [f'"{gene}",' + ",".join(map(str, COUNTS[:, i])) for i, gene in enumerate(GENES)]
    labels = pd.DataFrame({"celltype": types, "ID": [f"donor {i % 4}" for i in range(12)]}, index=BARCODES)
    lengths = "Gene start (bp),Gene end (bp),Gene name,Transcript start (bp),Transcript end (bp)\n"
    for i, gene in enumerate(GENES[:-1]):  # the last gene's length is not known
        lengths += f"100,90000,{gene},200,{1200 + i}\n100,90000,{gene},500,900\n"
    served["suppl/GSE130148_raw_counts.csv.gz"] = gzip.compress("\n".join([*rows, ""]).encode())
    shuffled = labels[::-1].rename_axis("cell.barcode").to_csv(sep="\t")
    served["suppl/GSE130148_barcodes_cell_types.txt.gz"] = gzip.compress(shuffled.encode())
    served["GeneLength.txt"] = lengths.encode()
    urls = {"GEO_URL": site.url("suppl"), "GENE_LENGTH_URL": site.url("GeneLength.txt")}

    adata = stage_0(tmp_path, "GSE130148", **urls)
    assert list(adata.var_names) == GENES and adata.uns["source"] == f"GEO GSE130148, {site.url('suppl')}"
    assert adata.obs["cell_type"].isna().tolist() == [True] + [False] * 11
    assert list(adata.obs["cell_type"][1:]) == TYPES[1:] and list(adata.obs["donor"]) == list(labels["ID"])
    np.testing.assert_array_equal(adata.var["gene_length_bp"], [*range(1000, 1007), np.nan])

    site.stop()
    (tmp_path / "data" / "raw" / "GeneLength.txt").unlink()
    again = stage_0(tmp_path, "GSE130148", **urls)  # from data/raw: there is no network any more
    assert "WARNING: no gene lengths, so USE_GENE_LENGTHS in stage 2 will not work" in capsys.readouterr().out
    assert again.uns["counts_id"] == adata.uns["counts_id"] and "gene_length_bp" not in again.var


def test_stage_0_without_a_network_says_what_to_put_where(site, tmp_path):
    site.stop()
    done = Workplace(tmp_path).run("_0_download_data.py", "--geo-url", site.url("suppl"), check=False)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert f"save it as {tmp_path / 'data' / 'raw' / 'GSE130148_raw_counts.csv.gz'}" in done.stderr
