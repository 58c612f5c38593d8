"""Interrupted and refused downloads from a local server, and stage 0 from download to data/counts.h5ad."""

import gzip
import random

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from helpers import Workplace
from server import Handler, serve

import lib.data.download
from lib import runs
from lib.data.download import ATTEMPTS, fetch

pytestmark = pytest.mark.usefixtures("no_waits_no_proxy")

BODY = random.Random(0).randbytes(1_000_000)
TABLE = b"gene,length\n" + b"".join(b"GENE%d,%d\n" % (i, 1000 + i) for i in range(5000))
GZIP = gzip.compress(TABLE, mtime=0)
PAGE = b"<!DOCTYPE html>\n<html><body>Sign in to the campus network</body></html>"


def serve_without_range(handler: Handler, body: bytes) -> None:
    handler.answer(200, body)


def cut(after: int):
    """Announces the rest of the file, as a server should, but ends the connection after so many bytes."""

    def answer(handler: Handler, body: bytes) -> None:
        whole = handler.answer
        handler.answer = lambda code, left, **headers: whole(code, left[:after], announced=len(left), **headers)
        serve(handler, body)

    return answer


def status(code: int):
    return lambda handler, body: handler.answer(code, b"it went wrong")


def fetch_body(site, tmp_path, body=BODY, name="counts.bin"):
    site.files[name] = body
    return fetch(site.url(name), tmp_path / name)


def files_in(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name != runs.RECORDS)


def test_a_file_is_downloaded_completely(site, tmp_path):
    path = fetch_body(site, tmp_path)
    assert path == tmp_path / "counts.bin" and path.read_bytes() == BODY
    assert site.ranges == [None] and files_in(tmp_path) == ["counts.bin"]


@pytest.mark.parametrize("after", [700_000, 100_000])
def test_an_interrupted_download_continues_where_it_stopped(site, tmp_path, after):
    site.answers = [cut(after), serve]
    assert fetch_body(site, tmp_path).read_bytes() == BODY
    assert len(site.ranges) == 2 and site.ranges[1] is not None, "the second request must ask for the rest only"
    assert 0 < int(site.ranges[1].removeprefix("bytes=").removesuffix("-")) <= after
    assert files_in(tmp_path) == ["counts.bin"]


def test_a_download_that_is_interrupted_again_and_again_is_completed(site, tmp_path):
    site.answers = [cut(100_000)]
    assert fetch_body(site, tmp_path, BODY[:400_000]).read_bytes() == BODY[:400_000]


def test_the_partial_file_of_an_earlier_run_is_continued(site, tmp_path):
    (tmp_path / "counts.bin.part").write_bytes(BODY[:1000])
    assert fetch_body(site, tmp_path).read_bytes() == BODY and site.ranges == ["bytes=1000-"]


def test_a_server_that_ignores_range_starts_the_file_again(site, tmp_path):
    site.answers = [cut(700_000), serve_without_range]
    assert fetch_body(site, tmp_path).read_bytes() == BODY
    assert len(site.ranges) == 2 and site.ranges[1].startswith("bytes=")


def test_a_range_other_than_the_one_asked_for_is_not_appended(site, tmp_path):
    from_the_start = f"bytes 0-{len(BODY) - 1}/{len(BODY)}"
    site.answers = [cut(700_000), lambda handler, body: handler.answer(206, body, Content_Range=from_the_start)]
    assert fetch_body(site, tmp_path).read_bytes() == BODY and len(site.ranges) == 2


def test_a_missing_file_is_refused_at_once_with_the_remedy(site, tmp_path):
    with pytest.raises(ConnectionError) as raised:
        fetch(site.url("none.bin"), tmp_path / "none.bin")
    for part in (site.url("none.bin"), "404", f"save it as {tmp_path / 'none.bin'}"):
        assert part in str(raised.value)
    assert len(site.ranges) == 1 and files_in(tmp_path) == []


@pytest.mark.parametrize("code", [500, 503, 429])
def test_a_server_error_is_tried_again(site, tmp_path, code):
    site.answers = [status(code), status(code), serve]
    assert fetch_body(site, tmp_path).read_bytes() == BODY and len(site.ranges) == 3


def test_a_lasting_server_error_is_given_up(site, tmp_path):
    site.answers = [status(500)]
    with pytest.raises(ConnectionError, match=rf"the server answered 500 .*save it as {tmp_path / 'counts.bin'}"):
        fetch_body(site, tmp_path)
    assert len(site.ranges) == ATTEMPTS and files_in(tmp_path) == []


def test_waits_double_and_start_again_after_progress(site, tmp_path, monkeypatch):
    waits = []
    monkeypatch.setattr(lib.data.download, "FIRST_WAIT_S", 1.0)
    monkeypatch.setattr(lib.data.download.time, "sleep", waits.append)
    site.answers = [status(500), status(500), cut(700_000), status(500), serve]
    fetch_body(site, tmp_path)
    assert waits == [1, 2, 1, 2]


@pytest.mark.parametrize("name", ["counts.csv.gz", "GeneLength.txt"])
def test_a_web_page_in_place_of_the_file_is_refused(site, tmp_path, name):
    with pytest.raises(ValueError, match=f"{name} is a web page, not data"):
        fetch_body(site, tmp_path, PAGE, name)
    assert files_in(tmp_path) == []


@pytest.mark.parametrize(
    "broken",
    [
        GZIP[: len(GZIP) // 2],
        GZIP[:-8] + bytes(b ^ 0xFF for b in GZIP[-8:-4]) + GZIP[-4:],
        GZIP[:-4] + b"\0\0\0\0",
        GZIP[:12] + b"\xff" * 20 + GZIP[32:],
        TABLE,
    ],
    ids=["truncated", "wrong CRC", "wrong length", "wrong stream", "not gzip"],
)
def test_a_broken_gzip_file_is_refused(site, tmp_path, broken):
    with pytest.raises(ValueError, match="counts.csv.gz is not a complete gzip file"):
        fetch_body(site, tmp_path, broken, "counts.csv.gz")
    assert files_in(tmp_path) == []
    assert fetch_body(site, tmp_path, GZIP, "counts.csv.gz").read_bytes() == GZIP, "the broken file must not stay"


def test_an_empty_file_is_refused(site, tmp_path):
    with pytest.raises(ValueError, match="GeneLength.txt is empty"):
        fetch_body(site, tmp_path, b"", "GeneLength.txt")
    assert files_in(tmp_path) == []


def test_an_existing_file_is_used(site, tmp_path, capsys):
    (tmp_path / "counts.bin").write_bytes(b"put here by hand")
    assert fetch_body(site, tmp_path).read_bytes() == b"put here by hand"
    assert site.ranges == [] and f"using the file in {tmp_path}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "message"), [(PAGE, "is a web page"), (GZIP[:-20], "is not a complete gzip file"), (b"", "is empty")]
)
def test_an_existing_file_is_checked(site, tmp_path, content, message):
    path = tmp_path / "counts.csv.gz"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"counts.csv.gz {message}"):
        fetch_body(site, tmp_path, GZIP, "counts.csv.gz")
    assert path.read_bytes() == content and site.ranges == [], "a file of the user is neither deleted nor replaced"


def test_without_a_server_the_message_has_the_remedy(site, tmp_path):
    site.stop()
    with pytest.raises(
        ConnectionError,
        match=rf"counts.bin could not be downloaded .*save it as {tmp_path / 'counts.bin'}, and run this again",
    ):
        fetch_body(site, tmp_path)


def test_a_partial_file_that_is_complete_gets_its_name(site, tmp_path):
    (tmp_path / "counts.bin.part").write_bytes(BODY)
    assert fetch_body(site, tmp_path).read_bytes() == BODY
    assert site.ranges == [f"bytes={len(BODY)}-"] and files_in(tmp_path) == ["counts.bin"]


def test_a_partial_file_longer_than_the_servers_is_dropped(site, tmp_path):
    (tmp_path / "counts.bin.part").write_bytes(b"x" * (len(BODY) + 5))
    assert fetch_body(site, tmp_path).read_bytes() == BODY and site.ranges[1:] == [None]


def redirect(to: str):
    return lambda handler, body: handler.answer(302, b"", Location=to)


def test_addresses_without_https_and_redirects_to_other_hosts_are_refused(site, tmp_path):
    for url in ("http://example.org/a.bin", "ftp://example.org/a.bin", "file:///etc/passwd"):
        with pytest.raises(ValueError, match=f"{url} is not a secure address; expected https"):
            fetch(url, tmp_path / "a.bin")
    site.answers = [redirect(site.url("counts.bin").replace("127.0.0.1", "localhost"))]
    with pytest.raises(
        ValueError, match="127.0.0.1 redirects to another host, localhost; expected the file from 127.0.0.1"
    ):
        fetch_body(site, tmp_path)
    assert files_in(tmp_path) == []


def test_redirects_on_the_same_host_are_followed_but_not_for_ever(site, tmp_path):
    site.answers = [redirect("/counts.bin"), serve]
    assert fetch_body(site, tmp_path).read_bytes() == BODY
    site.answers = [redirect("/other.bin")]
    with pytest.raises(ConnectionError, match="more than 5 redirects"):
        fetch(site.url("other.bin"), tmp_path / "other.bin")


def test_a_file_of_more_bytes_than_the_limit_is_refused(site, tmp_path, monkeypatch):
    monkeypatch.setattr(lib.data.download, "MAX_BYTES", 999_999)
    with pytest.raises(ValueError, match="has 1,000,000 bytes or more, expected at most 999,999: download it yourself"):
        fetch_body(site, tmp_path)
    assert files_in(tmp_path) == []


def test_a_download_that_has_changed_since_its_first_use_is_refused(site, tmp_path):
    path = fetch_body(site, tmp_path)
    fetch_body(site, tmp_path)
    path.write_bytes(BODY[:-1] + b"x")
    with pytest.raises(
        ValueError, match="counts.bin is not the file that was used before: SHA-256 .*delete it and run this again"
    ):
        fetch_body(site, tmp_path)


# Stage 0, from download to data/counts.h5ad

N_CELLS, N_GENES = 10_360, 30
COUNTS, LABELS, LENGTHS = (
    "suppl/GSE130148_raw_counts.csv.gz",
    "suppl/GSE130148_barcodes_cell_types.txt.gz",
    "GeneLength.txt",
)


@pytest.fixture(scope="module")
def lung():
    """Cells like those of GSE130148, and files in the form that GEO serves."""
    rng = np.random.default_rng(0)
    counts = rng.poisson(0.6, (N_CELLS, N_GENES))
    counts[rng.integers(0, N_CELLS, 50), rng.integers(0, N_GENES, 50)] = rng.integers(1000, 60_000, 50)
    genes = [f"GENE{i}" for i in range(N_GENES)]
    barcodes = [f"ASK{i % 4}_{i:012b}" for i in range(N_CELLS)]
    types = rng.choice(["Type 1", "B cell", "Macrophages", "1_Unicorns and artifacts"], N_CELLS)
    obs = pd.DataFrame(
        {"celltype": types, "ID": [f"donor {i % 4}" for i in range(N_CELLS)], "GEO_Sample": "GSM3732842"},
        index=barcodes,
    )
    header = '"",' + ",".join(f'"{barcode}"' for barcode in barcodes)
    rows = [f'"{gene}",' + ",".join(map(str, counts[:, i])) for i, gene in enumerate(genes)]
    labels = (
        obs.sample(frac=1, random_state=0).rename_axis("cell.barcode").to_csv(sep="\t")
    )  # not in the order of the counts
    lengths = "Gene start (bp),Gene end (bp),Gene name,Transcript start (bp),Transcript end (bp)\n"
    for i, gene in enumerate(genes[:-1]):  # the last gene's length is not known
        lengths += f"100,90000,{gene},200,{1200 + i}\n100,90000,{gene},500,900\n"
    files = {
        COUNTS: gzip.compress("\n".join([header, *rows, ""]).encode()),
        LABELS: gzip.compress(labels.encode()),
        LENGTHS: lengths.encode(),
    }
    return ad.AnnData(counts, obs=obs, var=pd.DataFrame(index=genes)), files


def run_stage(site, place, check=True):
    # GEO's own links have %5F in place of _
    return place.run(
        "_0_download_data.py",
        "--geo-url",
        site.url("suppl"),
        "--gene-length-url",
        site.url("GeneLength.txt"),
        check=check,
    )


def test_stage_0_downloads_and_writes_the_lung_cells(site, tmp_path, lung):
    expected, site.files = lung
    place = Workplace(tmp_path / "place")
    printed = run_stage(site, place).stdout
    assert "10,360 cells x 30 genes" in printed and "python _1_split_train_test.py" in printed
    assert files_in(place.data / "raw") == [
        "GSE130148_barcodes_cell_types.txt.gz",
        "GSE130148_raw_counts.csv.gz",
        "GeneLength.txt",
    ]

    adata = ad.read_h5ad(place.data / "counts.h5ad")
    assert sp.issparse(adata.X) and adata.X.format == "csr"
    np.testing.assert_array_equal(adata.X.toarray(), expected.X)
    assert list(adata.obs_names) == list(expected.obs_names) and list(adata.var_names) == list(expected.var_names)
    cell_type = expected.obs["celltype"]
    is_labelled = (cell_type != "1_Unicorns and artifacts").to_numpy()
    assert adata.obs["cell_type"][is_labelled].astype(str).tolist() == cell_type[is_labelled].tolist()
    assert adata.obs["cell_type"][~is_labelled].isna().all() and (~is_labelled).any()
    assert adata.obs["donor"].astype(str).tolist() == expected.obs["ID"].tolist()
    np.testing.assert_array_equal(adata.var["gene_length_bp"], [*range(1000, 1000 + N_GENES - 1), np.nan])
    assert adata.uns["dataset"] == "GSE130148" and adata.uns["source"] == f"GEO GSE130148, {site.url('suppl')}"

    first = (place.data / "counts.h5ad").stat()
    site.stop()
    run_stage(site, place)  # from data/raw: there is no network any more
    assert (place.data / "counts.h5ad").stat().st_ino != first.st_ino
    again = ad.read_h5ad(place.data / "counts.h5ad")
    np.testing.assert_array_equal(again.X.toarray(), expected.X)
    assert again.uns["counts_id"] == adata.uns["counts_id"]


def test_stage_0_refuses_another_number_of_cells(site, tmp_path, lung):
    lines = gzip.decompress(lung[1][COUNTS]).decode().splitlines()
    site.files = lung[1] | {COUNTS: gzip.compress("\n".join(line.rpartition(",")[0] for line in lines).encode())}
    place = Workplace(tmp_path / "place")
    done = run_stage(site, place, check=False)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert f"GSE130148 has 10,359 cells, expected 10,360: delete its files in {place.data / 'raw'}" in done.stderr
    assert not (place.data / "counts.h5ad").exists()


def test_stage_0_goes_on_without_gene_lengths_with_a_warning(site, tmp_path, lung):
    _, files = lung
    site.files = {path: content for path, content in files.items() if "GeneLength" not in path}
    place = Workplace(tmp_path / "place")
    printed = run_stage(site, place).stdout
    assert "WARNING: no gene lengths, so USE_GENE_LENGTHS in stage 2 will not work" in printed and "404" in printed
    assert "gene_length_bp" not in ad.read_h5ad(place.data / "counts.h5ad").var


def test_stage_0_without_a_network_says_what_to_put_where(site, tmp_path):
    site.answers = [status(403)]
    place = Workplace(tmp_path / "place")
    done = run_stage(site, place, check=False)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert f"save it as {place.data / 'raw' / 'GSE130148_raw_counts.csv.gz'}" in done.stderr
