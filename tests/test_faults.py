"""Faults of files, disks, signals and options: each ends in one line that says what to do, and no complete file is lost."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pytest
import torch
from helpers import ROOT, STAGES, Workplace, simulated_dataset

from lib.run import LOG

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
    place = Workplace(tmp_path_factory.mktemp("faults"))
    simulated_dataset(n_cells=150).write_h5ad(place.path / "source.h5ad")
    place.run(STAGES[0], "--dataset", str(place.path / "source.h5ad"))
    for stage in STAGES[1:]:
        place.run(stage, *SMALL[stage])
    return place


@pytest.fixture
def place(whole, tmp_path) -> Workplace:
    return whole.copy(tmp_path / "place")


def contents(place: Workplace) -> dict[str, bytes]:
    """All files but the log, which also tells about runs that failed."""
    files = [*place.data.glob("[!.]*"), *place.models.glob("[!.]*")]
    return {str(path): path.read_bytes() for path in files if path.is_file() and path.name != LOG}


def refused(place: Workplace, stage: str, *options: str) -> str:
    """What a stage says that ends with an error: one line, without a traceback, and no complete file changes."""
    before = contents(place)
    done = place.run(stage, *SMALL.get(stage, []), *options, check=False)
    assert done.returncode in (1, 2) and "Traceback" not in done.stderr, done.stderr
    assert contents(place) == before and not list(place.path.rglob(".half-written-*"))
    return done.stderr


READ_BY = [  # file, stage that makes it, stage that reads it
    ("data/counts.h5ad", 0, 1), ("data/train.h5ad", 1, 2), ("data/train.h5ad", 1, 3), ("data/pseudobulk_train.h5ad", 2, 4),
    ("data/test.h5ad", 1, 5), ("models/gmvae.pt", 3, 5), ("models/sctape.pt", 4, 5),
]  # fmt: skip


@pytest.mark.parametrize("damage", ["deleted", "cut", "empty", "text"])
@pytest.mark.parametrize(("file", "maker", "reader"), READ_BY)
def test_a_file_between_the_stages_that_is_missing_or_damaged_is_named(place, file, maker, reader, damage):
    path = place.path / file
    content = path.read_bytes()
    if damage == "deleted":
        path.unlink()
    else:
        path.write_bytes({"cut": content[: len(content) // 2], "empty": b"", "text": b"text"}[damage])
    message = refused(place, STAGES[reader])
    assert (f"{path} is missing: run {STAGES[maker]}" if damage == "deleted" else str(path)) in message


class RunsCode:
    def __reduce__(self):
        return os.system, ("touch bulk2sc_code_was_run",)


@pytest.mark.parametrize("content", [[1, 2], {"format": 3, "stage": STAGES[3]}, RunsCode(), "sctape.pt"])
def test_a_checkpoint_of_another_kind_is_refused_and_runs_no_code(place, content):
    path = place.models / "gmvae.pt"
    shutil.copy(place.models / content, path) if isinstance(content, str) else torch.save(content, path)
    message = refused(place, STAGES[5])
    assert f"error: {path} " in message and ("train again with _3_" in message or "could not be read" in message)
    assert not (place.path / "bulk2sc_code_was_run").exists()


H5_EDITS = {  # more of them: tests/data/test_readers.py
    "lacks obs": lambda file: file.__delitem__("obs"),
    "an index beyond the genes": lambda file: file["X/indices"].__setitem__(3, 10_000),
    "a count that is NaN": lambda file: file["X/data"].__setitem__(0, np.nan),
}


@pytest.mark.parametrize("what", H5_EDITS)
def test_an_h5ad_of_another_structure_is_refused(place, what):
    path = place.path / "source.h5ad"
    with h5py.File(path, "a") as file:
        H5_EDITS[what](file)
    assert str(path) in refused(place, STAGES[0], "--dataset", str(path))


def test_labels_that_label_no_cell(place):
    path = place.path / "source.h5ad"
    adata = ad.read_h5ad(path)
    adata.obs["cell_type"] = np.nan
    adata.obs["mine"] = "unknown"
    adata.write_h5ad(path)
    assert "labels no cell" in refused(place, STAGES[0], "--dataset", str(path), "--cell-type-key", "mine")
    assert "WARNING: obs['cell_type'] labels no cell" in place.run(STAGES[0], "--dataset", str(path)).stdout
    assert "cell_type" not in ad.read_h5ad(place.data / "counts.h5ad").obs


@pytest.mark.parametrize(
    ("option", "content", "message"),
    [
        ("--cell-counts", "sample,type 0,type 1\na,3,4\nb,5\n", "2 fields"),
        ("--cell-counts", "sample,type 0,type 0\na,3,4\n", "two columns called 'type 0'"),
        ("--cell-counts", "sample,type 0\na,3\na,4\n", "two rows called a"),
        ("--cell-counts", "sample,type 0\na,inf\n", "must hold numbers of cells"),
        ("--proportions-file", "sample,type 0,type 1\na,0.5,0.5\nb,0.5,", "must hold proportions"),
        ("--proportions-file", "", "table.csv"),
        ("--bulk-file", "gene,a,b\nGENE1,1,2\nGENE2,3\n", "2 fields"),
        ("--bulk-file", "gene,a\nGENE1,inf\n", "missing or not numbers"),
        ("--bulk-file", "gene\nGENE1\n", "table.csv"),
    ],
)
def test_tables_of_a_user_that_are_damaged(place, tmp_path, option, content, message):
    (tmp_path / "table.csv").write_text(content)
    assert message in refused(place, STAGES[5], option, str(tmp_path / "table.csv"))


# --- disks, memory and signals

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
OUTPUTS = ["data/counts.h5ad", "data/train.h5ad", "data/pseudobulk_train.h5ad", "models/gmvae_last.pt", "models/sctape_last.pt",
           "data/generated.h5ad"]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "output"), list(zip(STAGES, OUTPUTS)))
def test_a_file_that_the_disk_does_not_take_ends_in_one_line(place, stage, output):
    """A limit of the file size is met in the same way as a full disk, and needs no disk of its own."""
    size, before = (place.path / output).stat().st_size, contents(place)
    options = [*place.folders(stage), *SMALL.get(stage, ["--dataset", str(place.path / "source.h5ad")])]
    limits = ",".join(str(int(share * size)) for share in (0.02, 0.5, 0.97))  # one run after the other
    command = [sys.executable, "-c", LIMITED, limits, str(ROOT / stage), *options]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    assert done.stdout.count("exit 1\n") == 3, done.stdout
    assert set(contents(place)) >= set(before) and not list(place.path.rglob(".half-written-*"))
    for path in contents(place):
        assert path.endswith((".csv", "_last.pt")) or Path(path).stat().st_size > 0


@pytest.fixture
def ctrl_c():
    """Ctrl-C as in the foreground: a shell starts jobs in the background with SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_training_with_a_message_and_a_checkpoint(place, monkeypatch, ctrl_c, number, status):
    real, calls = torch.optim.Adam.step, []

    def step(self, *arguments, **options):
        calls.append(1)
        if len(calls) == 8:  # in the middle of an epoch
            os.kill(os.getpid(), number)
        return real(self, *arguments, **options)

    monkeypatch.setattr(torch.optim.Adam, "step", step)
    handler = signal.getsignal(number)
    shutil.rmtree(place.models)
    done = place.run(STAGES[3], *SMALL[STAGES[3]], "--epochs", "50", "--batch-size", "40", check=False)
    assert done.returncode == status and "stopped by signal" in done.stderr and "Traceback" not in done.stderr
    assert "continue with RESUME (--resume)" in done.stdout
    assert 1 <= len(torch.load(place.models / "gmvae_last.pt", weights_only=True)["history"]) <= 2
    assert signal.getsignal(number) == handler


def test_too_little_memory_is_said_in_one_line_and_errors_of_the_program_keep_their_traceback(place, monkeypatch):
    def fails(*_, **__):
        raise error

    monkeypatch.setattr("lib.bulk.pseudobulk.mix", fails)
    error: Exception = MemoryError("Unable to allocate 9.3 TiB")
    assert "error: the memory is not enough (Unable to allocate 9.3 TiB): lower MEMORY_GB" in refused(place, STAGES[2])
    error = TypeError("a fault of the program")
    with pytest.raises(TypeError, match="a fault of the program"):
        place.run(STAGES[2], *SMALL[STAGES[2]])
