"""Faults of files, disks, signals and options: each ends in one line that says what to do, and no complete file is lost."""

import gzip
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
import torch
from helpers import ROOT, STAGES, Workplace, simulated_dataset

import lib.data.anndata_files
import lib.data.hdf5
import lib.data.tables
import lib.files
from lib import log, runs
from lib.checkpoints import write_checkpoint
from lib.records import record_path

SMALL = {
    STAGES[1]: ["--min-genes", "none", "--no-remove-doublets"],
    STAGES[2]: ["--n-train-samples", "60", "--cells-per-sample", "30", "--n-test-dirichlet", "3"],
    STAGES[3]: ["--epochs", "2", "--device", "cpu", "--hidden", "16"],
    STAGES[4]: ["--epochs", "2", "--device", "cpu"],
    STAGES[5]: ["--no-evaluate", "--device", "cpu"],
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Workplace:
    """All six stages on simulated cells, as runs of this process."""
    place = Workplace(tmp_path_factory.mktemp("faults") / "place")
    place.path.mkdir()
    simulated_dataset(n_cells=150).write_h5ad(place.path / "source.h5ad")
    place.run(STAGES[0], "--dataset", str(place.path / "source.h5ad"))
    for stage in STAGES[1:]:
        place.run(stage, *SMALL[stage])
    return place


@pytest.fixture
def place(whole, tmp_path) -> Workplace:
    shutil.copytree(whole.path, tmp_path / "place")
    return Workplace(tmp_path / "place")


def refused(place: Workplace, stage: str, *options: str) -> str:
    """What a stage says that ends with an error: one line, without a traceback, and no complete file changes."""
    before = contents(place)
    done = place.run(stage, *SMALL.get(stage, []), *options, check=False)
    assert done.returncode in (1, 2) and "Traceback" not in done.stderr, done.stderr
    assert contents(place) == before
    return done.stderr


def contents(place: Workplace) -> dict[str, bytes]:
    """All files but the log, which also tells about runs that failed."""
    files = [*place.data.glob("*.*"), *place.models.glob("*.*")]
    return {str(path): path.read_bytes() for path in files if path.is_file() and path.name != log.NAME}


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path: Path) -> None:
    """Flip one bit in the middle."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def text(path: Path) -> None:
    path.write_text("not a file of this kind")


def exchange(path: Path) -> None:
    """Another file of the same kind stands in its place."""
    names = ("gmvae.pt", "sctape.pt") if path.suffix == ".pt" else ("counts.h5ad", "test.h5ad")
    shutil.copy(path.with_name(names[path.name == names[0]]), path)


READ_BY = [
    ("data/counts.h5ad", 1), ("data/train.h5ad", 2), ("data/test.h5ad", 2), ("data/train.h5ad", 3), ("data/pseudobulk_train.h5ad", 4),
    ("data/train.h5ad", 5), ("models/gmvae.pt", 5), ("models/sctape.pt", 5),
]  # fmt: skip


@pytest.mark.parametrize("damage", [cut, flip, exchange])
@pytest.mark.parametrize(("file", "number"), READ_BY)
def test_a_file_that_changed_between_stages_is_named_before_work_begins(place, file, number, damage):
    path = place.path / file
    damage(path)
    maker = json.loads(record_path(path).read_text())["stage"]
    message = refused(place, STAGES[number])
    assert f"error: {path} is not the file that {maker} wrote" in message
    assert f"run {maker}" in message and f"delete {record_path(path)} to use the file as it is" in message


@pytest.mark.parametrize(("file", "number"), READ_BY)
def test_a_deleted_file_is_named_with_its_stage(place, file, number):
    path = place.path / file
    path.unlink()
    assert f"{path} is missing: run {json.loads(record_path(path).read_text())['stage']}" in refused(
        place, STAGES[number]
    )


@pytest.mark.parametrize("damage", [cut, empty, text])
@pytest.mark.parametrize(("file", "number"), [READ_BY[0], READ_BY[3], READ_BY[4], *READ_BY[6:]])
def test_a_damaged_file_without_a_record_is_refused_by_its_reader(place, file, number, damage):
    path = place.path / file
    record_path(path).unlink()
    damage(path)
    assert f"error: {path} could not be read" in refused(place, STAGES[number])


def test_a_file_edited_on_purpose_is_used_when_its_record_is_deleted(place):
    path = place.data / "train.h5ad"
    adata = ad.read_h5ad(path)
    adata.obs["note"] = "mine"
    adata.write_h5ad(path)
    assert "is not the file" in refused(place, STAGES[2])
    record_path(path).unlink()
    place.run(STAGES[2], *SMALL[STAGES[2]])


def test_a_record_says_what_made_the_file(place):
    record = json.loads(record_path(place.models / "gmvae.pt").read_text())
    train = json.loads(record_path(place.data / "train.h5ad").read_text())
    assert record["stage"] == STAGES[3] and record["constants"]["EPOCHS"] == 2 and record["constants"]["SEED"] == 123
    assert (
        record["inputs"][str(place.data / "train.h5ad").replace(str(place.path), record_root(record))]
        == train["sha256"]
    )
    assert record["versions"]["numpy"] == np.__version__
    assert record["command"].startswith(f"python {STAGES[3]} --") and record["seconds"] > 0
    made_by = torch.load(place.models / "gmvae.pt", weights_only=True)["made_by"]
    assert made_by["inputs"] == record["inputs"] and made_by["commit"] == record["commit"]
    assert json.loads(ad.read_h5ad(place.data / "train.h5ad").uns["made_by"])["stage"] == STAGES[1]


def record_root(record: dict) -> str:
    """The folder in which the recorded run took place; the fixture's files are a copy of it."""
    return str(Path(record["constants"]["DATA_DIR"]).parent)


CHECKPOINTS = {
    "a list": [1, 2],
    "another dict": {"weights": {}},
    "no weights": {"format": 3, "stage": STAGES[3]},
    "a number": 5,
}


class RunsCode:
    def __reduce__(self):
        return os.system, ("touch /tmp/bulk2sc_code_was_run",)


@pytest.mark.parametrize("kind", [*CHECKPOINTS, "code", "a flipped weight", "the network of another stage"])
@pytest.mark.parametrize("name", ["gmvae", "sctape"])
def test_a_checkpoint_of_another_kind_is_refused(place, kind, name):
    path = place.models / f"{name}.pt"
    record_path(path).unlink()
    if kind == "code":
        torch.save(RunsCode(), path)
    elif kind == "a flipped weight":
        flip(path)
    elif kind == "the network of another stage":
        other = place.models / ("sctape.pt" if name == "gmvae" else "gmvae.pt")
        shutil.copy(other, path)
    else:
        write_checkpoint(CHECKPOINTS[kind], path)
    message = refused(place, STAGES[5])
    assert (f"error: {path} " in message and STAGES[3 if name == "gmvae" else 4] in message) or "again" in message
    assert not Path("/tmp/bulk2sc_code_was_run").exists()


def edit_h5(path: Path, edit) -> None:
    with h5py.File(path, "a") as file:
        edit(file)


def index_beyond_the_genes(file: h5py.File) -> None:
    file["X/indices"][3] = 10_000


def falling_pointers(file: h5py.File) -> None:
    file["X/indptr"][5] = 0


def too_few_pointers(file: h5py.File) -> None:
    pointers = file["X/indptr"][:-3]
    del file["X/indptr"]
    file["X/indptr"] = pointers


def a_trillion_entries(file: h5py.File) -> None:
    del file["X"]
    file.create_dataset("X", (1_000_000, 1_000_000), np.float32, chunks=(1000, 1000))


def counts_that_are_not_finite(file: h5py.File) -> None:
    file["X/data"][0] = np.nan


def negative_counts(file: h5py.File) -> None:
    file["X/data"][0] = -1


H5_EDITS = {
    "lacks obs": lambda file: file.__delitem__("obs"),
    "lacks var": lambda file: file.__delitem__("var"),
    "has an index 10,000, expected 0 to 59": index_beyond_the_genes,
    "that rise from 0 to": falling_pointers,
    "index pointers": too_few_pointers,
    "unpacks to at least 4,000": a_trillion_entries,
    "NaN or infinite": counts_that_are_not_finite,
    "negative": negative_counts,
}


@pytest.mark.parametrize("message", H5_EDITS)
def test_an_h5ad_of_another_structure_is_refused(place, message):
    path = place.path / "source.h5ad"
    edit_h5(path, H5_EDITS[message])
    assert message in refused(place, STAGES[0], "--dataset", str(path))


@pytest.mark.parametrize(
    ("way", "message"), [("loops", "does not finish reading it"), ("crashes", "HDF5 crashes when it reads")]
)
def test_a_file_on_which_hdf5_loops_or_crashes(place, monkeypatch, way, message):
    """Such files exist, but depend on the version of HDF5; here the check itself does not end, or ends the process."""

    def check(*_, **__):
        time.sleep(60) if way == "loops" else os._exit(139)

    monkeypatch.setattr(lib.data.anndata_files, "check_structure", check)
    monkeypatch.setattr(lib.data.hdf5, "CHECK_S", 1)
    assert message in refused(place, STAGES[0], "--dataset", str(place.path / "source.h5ad"))


def test_labels_that_label_no_cell(place):
    path = place.path / "source.h5ad"
    adata = ad.read_h5ad(path)
    adata.obs["cell_type"] = np.nan
    adata.obs["mine"] = "unknown"
    adata.write_h5ad(path)
    assert "labels no cell" in refused(place, STAGES[0], "--dataset", str(path), "--cell-type-key", "mine")
    done = place.run(STAGES[0], "--dataset", str(path))
    assert "WARNING: obs['cell_type'] labels no cell" in done.stdout
    assert "cell_type" not in ad.read_h5ad(place.data / "counts.h5ad").obs


def table(path: Path, n_genes: int = 60) -> Path:
    cells = simulated_dataset(n_cells=40, n_genes=n_genes)
    frame = pd.DataFrame(cells.X.toarray().astype(int), cells.obs_names, cells.var_names)
    frame.to_csv(path)
    return path


def test_tables_that_are_cut_or_no_text_or_bombs_are_refused(place, tmp_path, monkeypatch):
    whole = table(tmp_path / "counts.csv").read_bytes()
    packed = gzip.compress(whole)
    cases = {
        "cut.csv.gz": (packed[: len(packed) // 2], "could not be read"),
        "flipped.csv.gz": (packed[:400] + bytes([packed[400] ^ 8]) + packed[401:], "could not be read"),
        "zeros.csv": (whole[:500] + b"\0" * 50 + whole[500:], "no text"),
        "utf16.csv": (whole.decode().encode("utf-16"), "no text"),
        "bomb.csv.gz": (gzip.compress(b"a,b\n" + b"0," * 10_000_000), "unpacks to at least 0.0"),
        "long.csv": (b"0," * 600_000, "has a line of more than"),
    }
    monkeypatch.setattr(lib.files, "UNPACKED_BYTES", 1e6)
    monkeypatch.setattr(lib.data.tables, "MAX_LINE", 1_000_000)
    for name, (content, message) in cases.items():
        (tmp_path / name).write_bytes(content)
        found = refused(place, STAGES[0], "--dataset", str(tmp_path / name), "--orientation", "cells_in_rows")
        assert message in found, (name, found)


def test_the_limit_of_unpacked_sizes_can_be_set(place, tmp_path, monkeypatch):
    path = table(tmp_path / "counts.csv")
    options = ("--dataset", str(path), "--orientation", "cells_in_rows")
    monkeypatch.setenv("BULK2SC_MAX_GB", "1e-6")
    assert "unpacks to at least" in refused(place, STAGES[0], *options)
    monkeypatch.setenv("BULK2SC_MAX_GB", "much")
    assert "BULK2SC_MAX_GB is 'much'" in refused(place, STAGES[0], *options)
    monkeypatch.setenv("BULK2SC_MAX_GB", "1")
    place.run(STAGES[0], *options)


def test_a_matrix_market_file_that_declares_too_much(place, tmp_path):
    folder = tmp_path / "mtx"
    folder.mkdir()
    (folder / "matrix.mtx").write_text("%%MatrixMarket matrix coordinate integer general\n900000000000 5 1\n1 1 1\n")
    (folder / "genes.tsv").write_text("A\nB\n")
    assert "unpacks to at least 7,200" in refused(place, STAGES[0], "--dataset", str(folder))
    (folder / "matrix.mtx").write_text("%%MatrixMarket matrix coordinate integer general\n2 5 4\n1 1 1\n2 2")
    assert "could not be read" in refused(place, STAGES[0], "--dataset", str(folder))


def test_an_excel_file_that_is_a_bomb_or_none(place, tmp_path, monkeypatch):
    path = tmp_path / "bulk.xlsx"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        archive.writestr("xl/worksheets/sheet1.xml", b" " * 20_000_000)
    monkeypatch.setattr(lib.files, "UNPACKED_BYTES", 1e6)
    assert "unpacks to at least 0.0" in refused(place, STAGES[5], "--bulk-file", str(path))
    text(path)
    assert "could not be read" in refused(place, STAGES[5], "--bulk-file", str(path))


@pytest.mark.parametrize(
    ("option", "content", "message"),
    [
        ("--cell-counts", "sample,type 0,type 1\na,3,4\nb,5\n", "row 3 has 2 fields"),
        ("--cell-counts", "sample,type 0,type 0\na,3,4\n", "two columns called 'type 0'"),
        ("--cell-counts", "sample,type 0\na,3\na,4\n", "two rows called 'a'"),
        ("--cell-counts", "", "must hold numbers of cells"),
        ("--cell-counts", "sample,type 0\na,inf\n", "must hold numbers of cells"),
        ("--proportions-file", "sample,type 0,type 1\na,0.5,0.5\nb,0.5,", "must hold proportions"),
        ("--proportions-file", "sample,type 0\na,nan\n", "must hold proportions"),
        ("--proportions-file", "", "must hold proportions"),
        ("--bulk-file", "gene,a,b\nGENE1,1,2\nGENE2,3\n", "row 3 has 2 fields"),
        ("--bulk-file", "gene,a\nGENE1,inf\n", "missing or not numbers"),
        ("--bulk-file", "gene\nGENE1\n", "expected a header"),
        ("--bulk-file", "", "expected a header"),
    ],
)
def test_tables_of_a_user_that_are_damaged(place, tmp_path, option, content, message):
    path = tmp_path / "table.csv"
    path.write_text(content)
    assert message in refused(place, STAGES[5], option, str(path))


# --- disks, processes and signals

LIMITED = """
import resource, runpy, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
limits, sys.argv = sys.argv[1].split(","), sys.argv[2:]
for limit in limits:
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as ended:
        print("exit", ended.code)
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", range(6))
def test_a_file_that_the_disk_does_not_take_ends_in_one_line(place, number):
    """A limit of the file size is met in the same way as a full disk, and needs no disk of its own."""
    target = place.path / ["data/counts.h5ad", "data/train.h5ad", "data/pseudobulk_train.h5ad", "models/gmvae_last.pt",
                           "models/sctape_last.pt", "data/generated.h5ad"][number]  # fmt: skip
    options = [str(ROOT / STAGES[number]), *place.folders(STAGES[number]), *SMALL.get(STAGES[number], [])]
    options += ["--dataset", str(place.path / "source.h5ad")] if number == 0 else []
    before = contents(place)
    limits = ",".join(str(int(share * target.stat().st_size)) for share in (0.02, 0.5, 0.97))  # one run after the other
    command = [sys.executable, "-c", LIMITED, limits, *options]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    assert done.stdout.count("exit 1\n") == 3, done.stdout
    assert done.stderr.count("could not be written (File too large); the old file, if any, is untouched") == 3, (
        done.stderr
    )
    assert set(contents(place)) >= set(before) and not list(place.path.rglob("*.half-*"))


def test_hdf5_ends_well_when_the_disk_is_full(tmp_path):
    """HDF5 would end the process with a segmentation fault."""
    code = f"""
import pathlib, resource, signal
import anndata, numpy, scipy.sparse
from lib.data.hdf5 import write_h5ad
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 18, 1 << 18))
counts = scipy.sparse.random(500, 500, 0.5, format="csr", dtype=numpy.float32)
try:
    write_h5ad(anndata.AnnData(counts), pathlib.Path({str(tmp_path / "a.h5ad")!r}))
except OSError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "a.h5ad could not be written (File too large)" in done.stdout and not os.listdir(tmp_path)


def test_half_written_files_of_dead_processes_are_removed_and_of_living_ones_are_not(place):
    dead = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    owner = f"{socket.gethostname()}-{int(dead.stdout)}-12345"
    old, other_run = (place.data / f".{name}.h5ad" for name in (f"train.half-{owner}", f"test.half-{owner}0"))
    mine = runs.half_written(place.data / "counts.h5ad")
    other_computer = place.data / f".train.half-another-{os.getpid()}-5.h5ad"
    for path in (old, other_run, mine, other_computer):
        path.write_bytes(b"half")
    out = place.run(STAGES[2], *SMALL[STAGES[2]]).stdout
    assert f"removed {old}" in out and not old.exists() and not other_run.exists()
    assert mine.exists() and other_computer.exists()
    os.utime(other_computer, (time.time() - 2 * runs.OTHER_HOST_S,) * 2)
    place.run(STAGES[2], *SMALL[STAGES[2]])
    assert mine.exists() and not other_computer.exists()


def test_two_runs_in_one_folder_are_noticed(place):
    code = f"""
import pathlib, sys
import lib.data.hdf5
import lib.data.tables
import lib.files
from lib import runs
with runs.started("another stage", dict):
    runs.hold(pathlib.Path({str(place.data)!r}))
    print("held", flush=True)
    sys.stdin.read()
"""
    with subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdout.readline() == b"held\n"
        message = refused(place, STAGES[2])
        assert f"{place.data} is in use by another run (another stage, process {holder.pid}" in message
        holder.kill()  # the lock ends with the process
    place.run(STAGES[2], *SMALL[STAGES[2]])


@pytest.fixture
def ctrl_c():
    """Ctrl-C as in the foreground: a shell starts jobs in the background with SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(
    ("number", "status", "name"), [(signal.SIGTERM, 143, "SIGTERM"), (signal.SIGINT, 130, "Ctrl-C")]
)
def test_a_signal_ends_training_with_a_message_and_a_checkpoint(place, monkeypatch, ctrl_c, number, status, name):
    real, calls = torch.optim.Adam.step, []

    def step(self, *arguments, **options):
        calls.append(1)
        if len(calls) == 8:  # in the middle of an epoch
            os.kill(os.getpid(), number)
        return real(self, *arguments, **options)

    monkeypatch.setattr(torch.optim.Adam, "step", step)
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    shutil.rmtree(place.models)
    done = place.run(STAGES[3], *SMALL[STAGES[3]], "--epochs", "50", "--batch-size", "40", check=False)
    assert done.returncode == status and f"stopped by {name}" in done.stderr and "Traceback" not in done.stderr
    assert "2 finished epochs saved in" in done.stdout and "continue with RESUME (--resume)" in done.stdout
    assert len(torch.load(place.models / "gmvae_last.pt", weights_only=True)["history"]) == 2
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers


def test_too_little_memory_is_said_in_one_line(place, monkeypatch):
    def no_memory(*_, **__):
        raise MemoryError("Unable to allocate 9.3 TiB")

    monkeypatch.setattr("lib.bulk.pseudobulk.mix", no_memory)
    message = refused(place, STAGES[2])
    assert "error: the memory is not enough (Unable to allocate 9.3 TiB): lower MEMORY_GB" in message


def test_errors_of_the_program_keep_their_traceback(place, monkeypatch):
    def wrong(*_, **__):
        raise TypeError("a fault of the program")

    monkeypatch.setattr("lib.bulk.pseudobulk.mix", wrong)
    with pytest.raises(TypeError, match="a fault of the program"):
        place.run(STAGES[2], *SMALL[STAGES[2]])
