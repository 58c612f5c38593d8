"""Downloads from a local server, and the data sets known by name, from files of their exact formats on it."""

import gzip
import io
import random
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


@pytest.mark.parametrize("failure", [cut, status(500), status(503), status(429)], ids=["cut", "500", "503", "429"])
def test_a_failed_download_is_tried_again(site, tmp_path, failure):
    site.answers = [failure, failure, site.answers[0]]
    assert served_file(site, tmp_path / "counts.bin").read_bytes() == BODY
    assert site.n_requests == 3 and [path.name for path in tmp_path.iterdir()] == ["counts.bin"]


@pytest.mark.parametrize(
    ("answer", "n_requests"), [(status(404), 1), (status(403), 1), (status(500), RETRIES + 1), (cut, RETRIES + 1)]
)
def test_a_download_that_fails_says_what_to_save_where(site, tmp_path, answer, n_requests):
    site.answers = [answer]
    with pytest.raises(
        ConnectionError, match=rf"counts.bin could not be downloaded .*save it as {tmp_path}/counts.bin"
    ):
        served_file(site, tmp_path / "counts.bin")
    assert site.n_requests == n_requests and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "body", "message"),
    [
        ("counts.csv.gz", PAGE, "is a web page, not data"),
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


def test_an_existing_file_is_used(site, tmp_path, capsys):
    (tmp_path / "counts.bin").write_bytes(b"put here by hand")
    assert served_file(site, tmp_path / "counts.bin").read_bytes() == b"put here by hand"
    assert site.n_requests == 0 and f"using the file in {tmp_path}" in capsys.readouterr().out


# --- data sets

GENES = [
    ("ENSG00000243485", "MIR1302-10"),
    ("ENSG00000075624", "ACTB"),
    ("ENSG00000111640", "GAPDH"),
    ("ENSG00000166710", "B2M"),
]
SYMBOLS = [symbol for _, symbol in GENES]
COUNTS = np.array([[0, 3, 1, 2], [1, 0, 0, 5], [0, 2, 2, 0]])  # cells x genes
BARCODES = ["AAACATACAACCAC-1", "AAACATTGAGCTAC-1", "AAACATTGATCAGC-1"]


@pytest.fixture
def served(site, monkeypatch):
    """The local server in place of all others; each data set has three cells."""
    monkeypatch.setattr(datasets, "URLS", {name: site.url(name) for name in datasets.URLS})
    monkeypatch.setattr(datasets, "SETS", {name: (reader, 3) for name, (reader, _) in datasets.SETS.items()})
    return site.files


def mtx(counts) -> bytes:
    file = io.BytesIO()
    scipy.io.mmwrite(file, sp.coo_matrix(counts), field="integer")
    return file.getvalue()


def tar(folder: str) -> bytes:
    """Cell Ranger 1 and 2: genes x cells."""
    lists = {"genes.tsv": "".join(f"{a}\t{b}\n" for a, b in GENES), "barcodes.tsv": "".join(f"{b}\n" for b in BARCODES)}
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as file:
        for name, body in {
            "matrix.mtx": mtx(COUNTS.T),
            **{name: text.encode() for name, text in lists.items()},
        }.items():
            entry = tarfile.TarInfo(f"{folder}/{name}")
            entry.size = len(body)
            file.addfile(entry, io.BytesIO(body))
    return packed.getvalue()


def stage_0(tmp_path, name: str) -> ad.AnnData:
    place = Workplace(tmp_path)
    place.main("_0_download_data.py", DATASET=name)
    adata = ad.read_h5ad(place.data / "counts.h5ad")
    np.testing.assert_array_equal(adata.X.toarray(), COUNTS)
    assert list(adata.obs_names) == BARCODES and adata.uns["dataset"] == name
    return adata


def test_pbmc1k(served, tmp_path):
    """Cell Ranger 3's .h5: CSC of genes x cells, features with their kind."""
    packed, csc = io.BytesIO(), sp.csc_matrix(COUNTS.T)
    with h5py.File(packed, "w") as file:
        group = file.create_group("matrix")
        group["barcodes"] = np.array(BARCODES, dtype="S18")
        group["data"], group["shape"] = csc.data.astype(np.int32), np.array(csc.shape, dtype=np.int32)
        group["indices"], group["indptr"] = csc.indices.astype(np.int64), csc.indptr.astype(np.int64)
        features = group.create_group("features")
        features["_all_tag_keys"] = np.array(["genome"], dtype="S6")
        features["id"], features["name"] = np.array([a for a, _ in GENES], "S20"), np.array(SYMBOLS, "S20")
        features["feature_type"], features["genome"] = (
            np.array(["Gene Expression"] * 4, "S20"),
            np.array(["G"] * 4, "S20"),
        )
    served["10x/3.0.0/pbmc_1k_v3/pbmc_1k_v3_filtered_feature_bc_matrix.h5"] = packed.getvalue()
    adata = stage_0(tmp_path, "pbmc1k")
    assert list(adata.var_names) == SYMBOLS and "cell_type" not in adata.obs


PBMC3K = "10x/1.1.0/pbmc3k/pbmc3k_filtered_gene_bc_matrices.tar.gz"


def processed(path, barcodes=(BARCODES[2], BARCODES[0]), **obs) -> bytes:
    """As scanpy's processed copy: scaled values of some genes, fewer cells, another order."""
    values = np.array([[0.1, -0.5], [-1.2, 2.0]], np.float32)
    ad.AnnData(values, obs=pd.DataFrame(obs, index=barcodes)).write_h5ad(path / "processed.h5ad")
    return (path / "processed.h5ad").read_bytes()


def test_pbmc3k(served, tmp_path, capsys):
    served[PBMC3K] = tar("filtered_gene_bc_matrices/hg19")
    served["cellxgene/pbmc3k.h5ad"] = processed(tmp_path, louvain=pd.Categorical(["B cells", "CD4 T cells"]))
    for _ in range(2):
        adata = stage_0(tmp_path, "pbmc3k")
        assert list(adata.var_names) == SYMBOLS
        assert adata.obs["cell_type"].isna().tolist() == [False, True, False]
        assert list(adata.obs["cell_type"].dropna()) == ["CD4 T cells", "B cells"] and list(adata.obs) == ["cell_type"]
        assert "2 of 3 cells have a label in pbmc3k_processed.h5ad" in capsys.readouterr().out
        served.clear()  # the second time from the files in data/raw


def test_pbmc3k_goes_on_without_labels_with_a_warning(served, tmp_path, capsys):
    served[PBMC3K] = tar("filtered_gene_bc_matrices/hg19")
    assert "cell_type" not in stage_0(tmp_path, "pbmc3k").obs
    printed = capsys.readouterr().out
    assert "WARNING: no cell types of pbmc3k, so stage 1 will cluster the cells" in printed and "404" in printed
    assert f"save it as {tmp_path / 'data' / 'raw' / 'pbmc3k_processed.h5ad'}" in printed


@pytest.mark.parametrize("obs", [{"leiden": ["0", "1"]}, {"louvain": ["B", "T"], "barcodes": ["cell_1", "cell_2"]}])
def test_pbmc3k_refuses_labels_of_something_else(served, tmp_path, obs):
    served[PBMC3K] = tar("filtered_gene_bc_matrices/hg19")
    served["cellxgene/pbmc3k.h5ad"] = processed(tmp_path, **obs)
    with pytest.raises(
        ValueError, match=r"pbmc3k_processed.h5ad (could not be read .*louvain|has none of these cells)"
    ):
        stage_0(tmp_path, "pbmc3k")


def test_half_a_data_set_is_refused(served, tmp_path, monkeypatch):
    monkeypatch.setitem(datasets.SETS, "pbmc3k", (datasets.pbmc3k, 2_700))
    served[PBMC3K] = tar("filtered_gene_bc_matrices/hg19")
    with pytest.raises(ValueError, match="pbmc3k has 3 cells, expected 2,700: delete its files"):
        stage_0(tmp_path, "pbmc3k")


def test_pbmc68k(served, tmp_path):
    archive = "fresh_68k_pbmc_donor_a_filtered_gene_bc_matrices.tar.gz"
    served[f"10x/1.1.0/fresh_68k_pbmc_donor_a/{archive}"] = tar("filtered_matrices_mex/hg19")
    rows = zip(BARCODES[::-1], ["CD14+ Monocyte", "CD19+ B", "CD56+ NK"])
    text = "TSNE.1\tTSNE.2\tbarcodes\tcelltype\n" + "".join(f"1.5\t-2\t{b}\t{t}\n" for b, t in rows)
    served["zheng/68k_pbmc_barcodes_annotation.tsv"] = text.encode()
    assert list(stage_0(tmp_path, "pbmc68k").obs["cell_type"]) == ["CD56+ NK", "CD19+ B", "CD14+ Monocyte"]


def test_dentate_gyrus_and_its_bulk(served, tmp_path):
    types = ["Granule mature", "OPC", "nIPC"]
    obs = pd.DataFrame({"clusters": pd.Categorical(types), "age(days)": ["12", "12", "35"]}, index=BARCODES)
    var, spliced = pd.DataFrame(index=["Actb", "Gapdh", "Prox1", "Rbfox3"]), sp.csr_matrix(COUNTS.astype(np.float32))
    layers = {"spliced": spliced, "unspliced": spliced * 2}
    ad.AnnData(spliced * 0.5, obs=obs, var=var, layers=layers).write_h5ad(tmp_path / "source.h5ad")
    served["scvelo/10X43_1.h5ad"] = (tmp_path / "source.h5ad").read_bytes()
    counts = "\tdg_d_1\tdg_d_2\nENSMUSG01\t5\t0\nENSMUSG02\t7\t1\nENSMUSG03\t1\t1\nENSMUSG99\t4\t4\n"
    tracking = "tracking_id\tclass_code\tgene_id\tgene_short_name\tlocus\n"
    for i, gene in ((1, "Actb"), (2, "Prox1"), (3, "Actb")):
        tracking += f"ENSMUSG0{i}\t-\tENSMUSG0{i}\t{gene}\tchr1:1-2\n"
    served["geo/GSE74985_mergedCount.txt.gz"] = gzip.compress(counts.encode())
    served["geo/GSE74985_genes.fpkm_tracking.gz"] = gzip.compress(tracking.encode())
    assert list(stage_0(tmp_path, "dentate_gyrus").obs["cell_type"]) == types
    bulk = pd.read_csv(tmp_path / "data" / "bulk.csv", index_col=0)
    assert list(bulk.index) == ["dg_d_1", "dg_d_2"] and bulk.to_dict("list") == {"Actb": [6, 1], "Prox1": [7, 1]}


def test_e_annd_5(served, tmp_path):
    inferred = [f"Factor Value[inferred cell type - {by} labels]" for by in ("ontology", "authors")]
    design = "\t".join(["Assay", "Sample Characteristic[organism]", *inferred]) + "\n"
    design += "".join(f"{b}\tHomo sapiens\tleukocyte\t{t}\n" for b, t in zip(BARCODES[::-1], ("T", "B", "")))
    packed, name = io.BytesIO(), "E-ANND-5.aggregated_filtered_counts"
    with zipfile.ZipFile(packed, "w") as file:
        file.writestr(f"{name}.mtx", mtx(COUNTS.T))
        file.writestr(f"{name}.mtx_rows", "".join(f"{a}\t{a}\n" for a, _ in GENES))
        file.writestr(f"{name}.mtx_cols", "".join(f"{b}\n" for b in BARCODES))
    served["ebi/E-ANND-5/download?accessKey=&fileType=experiment-design"] = design.encode()
    served["ebi/E-ANND-5/download/zip?accessKey=&fileType=quantification-raw"] = packed.getvalue()
    cell_type = stage_0(tmp_path, "E-ANND-5").obs["cell_type"]
    assert cell_type.isna().tolist() == [True, False, False] and list(cell_type[1:]) == ["B", "T"]
    (tmp_path / "data" / "raw" / "E-ANND-5_experimental_design.tsv").write_text("Assay\tFactor Value[age]\nx\t1\n")
    with pytest.raises(ValueError, match=r"has no column of cell types; it has Factor Value\[age\]"):
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


# --- the paper's data set: stage 0 from download to data/counts.h5ad

N_CELLS, N_GENES = 10_360, 30
COUNT_FILE, LABEL_FILE = "suppl/GSE130148_raw_counts.csv.gz", "suppl/GSE130148_barcodes_cell_types.txt.gz"


@pytest.fixture(scope="module")
def lung():
    """Cells like those of GSE130148, and files in the form that GEO serves."""
    rng = np.random.default_rng(0)
    counts = rng.poisson(0.6, (N_CELLS, N_GENES))
    counts[rng.integers(0, N_CELLS, 50), rng.integers(0, N_GENES, 50)] = rng.integers(1000, 60_000, 50)
    genes = [f"GENE{i}" for i in range(N_GENES)]
    barcodes = [f"ASK{i % 4}_{i:012b}" for i in range(N_CELLS)]
    types = rng.choice(["Type 1", "B cell", "Macrophages", "1_Unicorns and artifacts"], N_CELLS)
    obs = pd.DataFrame({"celltype": types, "ID": [f"donor {i % 4}" for i in range(N_CELLS)]}, index=barcodes)
    rows = ['"",' + ",".join(f'"{b}"' for b in barcodes)]
    rows += [f'"{gene}",' + ",".join(map(str, counts[:, i])) for i, gene in enumerate(genes)]
    labels = obs.sample(frac=1, random_state=0).rename_axis("cell.barcode").to_csv(sep="\t")  # in another order
    lengths = "Gene start (bp),Gene end (bp),Gene name,Transcript start (bp),Transcript end (bp)\n"
    for i, gene in enumerate(genes[:-1]):  # the last gene's length is not known
        lengths += f"100,90000,{gene},200,{1200 + i}\n100,90000,{gene},500,900\n"
    files = {COUNT_FILE: gzip.compress("\n".join([*rows, ""]).encode()), LABEL_FILE: gzip.compress(labels.encode())}
    return ad.AnnData(counts, obs=obs, var=pd.DataFrame(index=genes)), files | {"GeneLength.txt": lengths.encode()}


def run_stage(site, place, check=True):
    # GEO's own links have %5F in place of _
    urls = ("--geo-url", site.url("suppl"), "--gene-length-url", site.url("GeneLength.txt"))
    return place.run("_0_download_data.py", *urls, check=check)


def test_stage_0_downloads_and_writes_the_lung_cells(site, tmp_path, lung):
    expected, site.files = lung
    place = Workplace(tmp_path / "place")
    printed = run_stage(site, place).stdout
    assert "10,360 cells x 30 genes" in printed and "python _1_split_train_test.py" in printed
    raw = {path.name for path in (place.data / "raw").iterdir() if path.name[0] != "."}
    assert raw == {"GSE130148_barcodes_cell_types.txt.gz", "GSE130148_raw_counts.csv.gz", "GeneLength.txt"}

    adata = ad.read_h5ad(place.data / "counts.h5ad")
    np.testing.assert_array_equal(adata.X.toarray(), expected.X)
    assert list(adata.obs_names) == list(expected.obs_names) and list(adata.var_names) == list(expected.var_names)
    cell_type = expected.obs["celltype"]
    is_labelled = (cell_type != "1_Unicorns and artifacts").to_numpy()
    assert adata.obs["cell_type"][is_labelled].astype(str).tolist() == cell_type[is_labelled].tolist()
    assert adata.obs["cell_type"][~is_labelled].isna().all() and (~is_labelled).any()
    assert adata.obs["donor"].astype(str).tolist() == expected.obs["ID"].tolist()
    np.testing.assert_array_equal(adata.var["gene_length_bp"], [*range(1000, 1000 + N_GENES - 1), np.nan])
    assert adata.uns["source"] == f"GEO GSE130148, {site.url('suppl')}"

    site.stop()
    (place.data / "raw" / "GeneLength.txt").unlink()
    printed = run_stage(site, place).stdout  # from data/raw: there is no network any more
    assert "WARNING: no gene lengths, so USE_GENE_LENGTHS in stage 2 will not work" in printed
    again = ad.read_h5ad(place.data / "counts.h5ad")
    assert again.uns["counts_id"] == adata.uns["counts_id"] and "gene_length_bp" not in again.var


def test_stage_0_without_a_network_says_what_to_put_where(site, tmp_path):
    site.stop()
    place = Workplace(tmp_path / "place")
    done = run_stage(site, place, check=False)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert f"save it as {place.data / 'raw' / 'GSE130148_raw_counts.csv.gz'}" in done.stderr
