"""A file is replaced whole or not at all, a folder serves one run at a time, what a stage prints is logged."""

import errno
import os
import signal
import subprocess
import sys

import pytest
from helpers import ROOT, STAGES, Workplace, simulated_dataset

import lib.run
from lib.run import LOG, check_same_names, check_same_split, detail, folder, replacing, started, user_path


@pytest.fixture
def old(tmp_path):
    path = tmp_path / "counts.h5ad"
    path.write_text("old")
    return path


def test_the_file_is_replaced_when_the_block_ends(old):
    with replacing(old) as temporary:
        temporary.write_text("new")
        assert old.read_text() == "old", "the old file must stay until the new one is complete"
        assert temporary.parent == old.parent, "a rename is atomic inside one folder only"
        assert temporary.suffix == ".h5ad", "writers choose their format by the suffix"
    assert old.read_text() == "new" and os.listdir(old.parent) == [old.name]


NO_SPACE = OSError(errno.ENOSPC, "No space left"), r"counts.h5ad could not be written \(No space left\); the old"


@pytest.mark.parametrize(("error", "message"), [NO_SPACE, (KeyboardInterrupt(), None), (ValueError("bad"), "^bad$")])
def test_an_error_keeps_the_old_file_and_leaves_nothing_behind(old, error, message):
    with pytest.raises(type(error), match=message), replacing(old) as temporary:
        temporary.write_text("half of the new")
        raise error
    assert old.read_text() == "old" and os.listdir(old.parent) == [old.name]


def test_a_killed_run_leaves_the_old_file_and_the_next_run_clears_up(old, capsys):
    code = """
import os, pathlib, signal, sys
from lib.run import replacing
with replacing(pathlib.Path(sys.argv[1])) as temporary:
    temporary.write_text("half of the new")
    os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", code, str(old)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert old.read_text() == "old" and len(list(old.parent.glob(".half-written-*"))) == 1
    with started("a stage", dict, old.parent):
        folder(str(old.parent))
    assert not list(old.parent.glob(".half-written-*"))
    assert "which a run that was killed has left" in capsys.readouterr().out


def test_two_runs_in_one_folder_are_noticed(tmp_path):
    code = """
import sys
from pathlib import Path
from lib.run import folder, started
with started("another stage", dict, Path(sys.argv[1])):
    folder(sys.argv[1])
    print("held", flush=True)
    sys.stdin.read()
"""
    command = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(ValueError, match="is in use by another run"), started("a stage", dict, tmp_path):
            folder(str(tmp_path))
        holder.kill()  # the lock ends with the process
    with started("a stage", dict, tmp_path):
        assert folder(str(tmp_path)) == tmp_path


def test_a_users_path_is_looked_for_in_the_shells_folder_then_in_the_project(tmp_path, monkeypatch):
    project, shell, home = (tmp_path / name for name in ("project", "shell", "home"))
    for place in (project, shell, home):
        place.mkdir()
        (place / "both.csv").touch()
    (project / "one.csv").touch()
    monkeypatch.setattr(lib.run, "ROOT", project)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(shell)
    assert user_path("both.csv") == shell / "both.csv" and user_path("one.csv") == project / "one.csv"
    assert user_path("~/both.csv") == home / "both.csv"
    with pytest.raises(FileNotFoundError, match=f"none.csv does not exist: looked in {shell} and {project}"):
        user_path("none.csv")
    assert folder("data/raw") == project / "data" / "raw" and folder("data/raw").is_dir()


def test_what_does_not_belong_together_is_named():
    for names, expected, message in (
        ("AC", "AB", r"m.pt has 2 genes, d.h5ad has 2, and they differ \(unexpected: C; missing: B\); run it"),
        ("BA", "AB", "another order"),
        ("ABC", "VWXYZ", r"\(unexpected: A, B, C; missing: V, W, X and 2 more\)"),
    ):
        with pytest.raises(ValueError, match=message):
            check_same_names(list(names), "m.pt", list(expected), "d.h5ad", "genes", "it")
    with pytest.raises(ValueError, match="m.pt does not belong to d.h5ad: it comes from split a, expected split b"):
        check_same_split("a", "m.pt", "b", "d.h5ad", "_3_train_gmvae.py")


def test_what_is_printed_is_logged_and_details_are_only_in_the_log(tmp_path, capsys):
    with pytest.raises(ValueError, match="no cells"), started("stage.py", dict, tmp_path):
        print("for everybody\nin two lines")
        detail("a table\nin two lines")
        raise ValueError("no cells")
    assert capsys.readouterr().out == "for everybody\nin two lines\n"
    first, *lines = [line[21:] for line in (tmp_path / LOG).read_text().splitlines()]  # without the time
    assert "stage.py" in first
    assert lines == ["for everybody", "in two lines", "a table", "in two lines", "ended by ValueError: no cells"]
    detail("outside of a run")
    assert capsys.readouterr().out == "outside of a run\n"


def test_a_stage_runs_without_a_log_that_can_be_written_and_appends_to_one_that_can(tmp_path):
    place = Workplace(tmp_path / "place")
    simulated_dataset(n_cells=50).write_h5ad(tmp_path / "cells.h5ad")
    for _ in range(2):
        place.run(STAGES[0], "--dataset", str(tmp_path / "cells.h5ad"))
    assert (place.data / LOG).read_text().count("50 cells x") == 2
    (place.data / LOG).unlink()
    (place.data / LOG).mkdir()
    assert "50 cells x" in place.run(STAGES[0], "--dataset", str(tmp_path / "cells.h5ad")).stdout
