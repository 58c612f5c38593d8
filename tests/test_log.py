"""data/log.txt: everything that a stage prints, and the details that it does not print."""

import pytest
from helpers import STAGES, Workplace, simulated_dataset

from lib import log


def test_what_is_printed_is_copied_and_details_are_only_in_the_log(tmp_path, capsys):
    with log.to_file(tmp_path, "python stage.py --epochs 3"):
        print("for everybody\nin two lines")
        log.detail("a table\nin two lines")
    assert capsys.readouterr().out == "for everybody\nin two lines\n"
    lines = [line[21:] for line in (tmp_path / log.NAME).read_text().splitlines()]
    assert lines == ["--- python stage.py --epochs 3", "for everybody", "in two lines", "a table", "in two lines"]


def test_without_a_log_details_are_printed(capsys):
    log.detail("a table")
    assert capsys.readouterr().out == "a table\n"


def test_the_log_says_how_a_run_ended_and_keeps_older_runs(tmp_path):
    for number in (1, 2):
        with pytest.raises(ValueError, match="no cells"), log.to_file(tmp_path, f"python stage.py --seed {number}"):
            raise ValueError("no cells")
    text = (tmp_path / log.NAME).read_text()
    assert text.count("ended by ValueError: no cells") == 2 and "--seed 1" in text and "--seed 2" in text


def test_a_folder_that_cannot_be_written_to_stops_no_run(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    with log.to_file(tmp_path / "file", "python stage.py"):
        print("still here")
    captured = capsys.readouterr()
    assert captured.out == "still here\n" and captured.err == ""


def test_a_stage_writes_its_log_beside_its_data(tmp_path):
    place = Workplace(tmp_path / "place")
    simulated_dataset(n_cells=50).write_h5ad(tmp_path / "cells.h5ad")
    printed = place.run(STAGES[0], "--dataset", str(tmp_path / "cells.h5ad")).stdout
    text = (place.data / log.NAME).read_text()
    assert f"--- python {STAGES[0]}" in text
    for line in filter(None, printed.splitlines()):
        assert line in text
