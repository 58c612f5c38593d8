"""A file is replaced whole or not at all; a missing one, or one of other data, is refused with the remedy."""

import errno
import os
import signal
import subprocess
import sys

import pytest
from helpers import ROOT

import lib.files
from lib.files import check_same_names, check_same_split, check_unpacked, folder, replacing, require, user_path
from lib.records import Unusable


@pytest.fixture
def old(tmp_path):
    path = tmp_path / "counts.h5ad"
    path.write_text("old")
    return path


def test_the_file_is_replaced_when_the_block_ends(old):
    umask = os.umask(0o027)
    try:
        with replacing(old) as temporary:
            temporary.write_text("new")
            assert old.read_text() == "old", "the old file must stay until the new one is complete"
            assert temporary.parent == old.parent, "a rename is atomic inside one folder only"
            assert temporary.suffix == ".h5ad", "writers choose their format by the suffix"
        assert os.umask(0o027) == 0o027, "the umask is left as it was"
    finally:
        os.umask(umask)
    assert old.read_text() == "new" and os.listdir(old.parent) == [old.name]
    assert old.stat().st_mode & 0o777 == 0o640, "mkstemp makes files that no one else may read; ours follow the umask"


def test_a_file_that_was_not_there_is_made(tmp_path):
    with replacing(tmp_path / "new.csv") as temporary:
        temporary.write_text("a,b")
    assert (tmp_path / "new.csv").read_text() == "a,b" and os.listdir(tmp_path) == ["new.csv"]


@pytest.mark.parametrize(
    ("error", "raised", "message"),
    [
        (
            OSError(errno.ENOSPC, "No space left on device"),
            OSError,
            r"counts.h5ad could not be written \(No space left on device\); the old file",
        ),
        (KeyboardInterrupt(), KeyboardInterrupt, None),
        (ValueError("bad data"), ValueError, "^bad data$"),
    ],
)
def test_an_error_keeps_the_old_file_and_leaves_nothing_behind(old, error, raised, message):
    with pytest.raises(raised, match=message), replacing(old) as temporary:
        temporary.write_text("half of the new")
        raise error
    assert old.read_text() == "old" and os.listdir(old.parent) == [old.name]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_disk_that_is_really_full(old):
    message = r"counts.h5ad could not be written \(No space left on device\)"
    with pytest.raises(OSError, match=message), replacing(old), open("/dev/full", "w") as disk:
        disk.write("x")
    assert old.read_text() == "old" and os.listdir(old.parent) == [old.name]


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_a_kill_inside_the_block_leaves_the_old_file(old):
    code = """
import os, pathlib, signal, sys
from lib.files import replacing
with replacing(pathlib.Path(sys.argv[1])) as temporary:
    temporary.write_text("half of the new")
    os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", code, str(old)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert old.read_text() == "old"
    with replacing(old) as temporary:  # what the killed process left behind does no harm
        temporary.write_text("new")
    assert old.read_text() == "new"


def test_require_names_the_stage_to_run(tmp_path, old):
    assert require(old, "_0_download_data.py") == old
    with pytest.raises(FileNotFoundError, match=r"train.h5ad is missing: run _1_split_train_test.py first"):
        require(tmp_path / "train.h5ad", "_1_split_train_test.py")


def test_a_users_path_is_looked_for_in_the_shells_folder_then_in_the_project(tmp_path, monkeypatch):
    project, shell, home = (tmp_path / name for name in ("project", "shell", "home"))
    for place in (project, shell, home):
        place.mkdir()
        (place / "both.csv").touch()
    (project / "one.csv").touch()
    monkeypatch.setattr(lib.files, "ROOT", project)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(shell)
    assert user_path("both.csv") == shell / "both.csv"
    assert user_path("one.csv") == project / "one.csv"
    assert user_path(str(home / "both.csv")) == home / "both.csv"
    assert user_path("~/both.csv") == home / "both.csv"
    with pytest.raises(FileNotFoundError, match=f"none.csv does not exist: looked in {shell} and {project}"):
        user_path("none.csv")


def test_a_relative_folder_starts_at_the_project_and_is_made(tmp_path, monkeypatch):
    monkeypatch.setattr(lib.files, "ROOT", tmp_path / "project")
    monkeypatch.chdir(tmp_path)
    assert folder("data/raw") == tmp_path / "project" / "data" / "raw" and folder("data/raw").is_dir()
    assert folder(str(tmp_path / "elsewhere")) == tmp_path / "elsewhere" and (tmp_path / "elsewhere").is_dir()


def test_both_files_are_named():
    with pytest.raises(
        ValueError,
        match=r"model.pt has 2 genes, data.h5ad has 2, and they differ \(unexpected: C; missing: B\); run it",
    ):
        check_same_names(["A", "C"], "model.pt", ["A", "B"], "data.h5ad", "genes", "it")
    with pytest.raises(ValueError, match="another order"):
        check_same_names(["B", "A"], "model.pt", ["A", "B"], "data.h5ad", "genes", "it")
    with pytest.raises(
        ValueError, match="model.pt does not belong to data.h5ad: it comes from split a, expected split b"
    ):
        check_same_split("a", "model.pt", "b", "data.h5ad", "_3_train_gmvae.py")


def test_a_message_names_three_of_many_names():
    with pytest.raises(ValueError, match=r"\(unexpected: A, B, C; missing: V, W, X and 2 more\)"):
        check_same_names(["A", "B", "C"], "model.pt", ["V", "W", "X", "Y", "Z"], "data.h5ad", "genes", "it")


def test_the_limit_of_what_a_file_may_unpack_to(tmp_path, monkeypatch):
    path = tmp_path / "small.gz"
    path.write_bytes(b"0" * 1000)
    check_unpacked(path, 10**9)  # any file may have a gigabyte
    with pytest.raises(Unusable, match=r"small.gz \(0.0 MB\) unpacks to at least 1.00 GB, expected at most 1.00 GB"):
        check_unpacked(path, 10**9 + 1)
    monkeypatch.setattr(lib.files, "UNPACKED_BYTES", 0)
    check_unpacked(path, 200_000)  # 200 times its size
    with pytest.raises(Unusable, match="small.gz"):
        check_unpacked(path, 200_001)
    monkeypatch.setenv("BULK2SC_MAX_GB", "0.001")
    check_unpacked(path, 1_000_000)
    with pytest.raises(Unusable, match="set the environment variable BULK2SC_MAX_GB higher"):
        check_unpacked(path, 1_000_001)
