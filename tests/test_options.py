"""The constants of a script are its options: same names, same types, same comments."""

import re
import runpy
import sys

import pytest
from helpers import ROOT, STAGES, Workplace

from lib import options
from lib.options import apply_preset, constants, declared, from_command_line

SCRIPT = '''
"""Stage 9: a script of every kind of constant."""

from typing import Literal

from lib.options import Count, Positive, Share

# Training (ours)
EPOCHS = 300  # passes over the data
LEARNING_RATE = 1e-3  # of Adam; 10% of the paper's
NAME = "lung"  # of the run
RESUME = False  # go on
SHUFFLE = True  # the cells
HIDDEN = (128, 64)  # layers

PATIENCE: Count = 30  # epochs
DECAY: Positive | None = None  # of weights
PARTS: tuple[Count, Count] = (10, 20)  # cells
WIDTHS: tuple[Count, ...] = (8,)  # units
# of the units, said in a comment
# on lines of its own
DROPPED: Share = 0.1

# Where things are
BULK_FILE: str | None = None  # a table
MAX_GENES: int | None = 2500  # genes of a cell
MAX_PCT_MT: float | None = 15.0  # percent
DEVICE: Literal["auto", "cpu"] = "auto"  # to run on

_private = lower = 1


def main():
    LOCAL = EPOCHS
    return LOCAL
'''.lstrip()


@pytest.fixture
def script(tmp_path):
    """A function that gives the script's `globals()`, after the line of a constant was edited."""

    def make(edit: str | None = None) -> dict:
        text = SCRIPT
        if edit is not None:
            name = edit.partition(" ")[0].strip(":")
            text, n = re.subn(rf"^{name}\b.*$", edit, text, flags=re.MULTILINE)
            assert n == 1
        (tmp_path / "stage.py").write_text(text)
        return runpy.run_path(str(tmp_path / "stage.py"))

    return make


DEFAULTS = {
    "EPOCHS": 300, "LEARNING_RATE": 1e-3, "NAME": "lung", "RESUME": False, "SHUFFLE": True, "HIDDEN": (128, 64),
    "PATIENCE": 30, "DECAY": None, "PARTS": (10, 20), "WIDTHS": (8,), "DROPPED": 0.1,
    "BULK_FILE": None, "MAX_GENES": 2500, "MAX_PCT_MT": 15.0, "DEVICE": "auto",
}  # fmt: skip


def test_without_options_the_constants_stay(script):
    module = script()
    from_command_line(module, [])
    assert constants(module) == DEFAULTS and list(constants(module)) == list(DEFAULTS)
    assert module["main"]() == 300


OPTIONS = [
    ("--epochs 50", "EPOCHS", 50), ("--epochs=50", "EPOCHS", 50), ("--learning-rate 1", "LEARNING_RATE", 1.0),
    ("--name 7", "NAME", "7"), ("--name none", "NAME", "none"), ("--resume", "RESUME", True), ("--no-shuffle", "SHUFFLE", False),
    ("--hidden 256 128 64", "HIDDEN", (256, 128, 64)), ("--hidden 256", "HIDDEN", (256,)), ("--parts 1 2", "PARTS", (1, 2)),
    ("--bulk-file bulk.csv", "BULK_FILE", "bulk.csv"), ("--bulk-file none", "BULK_FILE", None), ("--max-genes None", "MAX_GENES", None),
    ("--max-pct-mt 7", "MAX_PCT_MT", 7.0), ("--device cpu", "DEVICE", "cpu"), ("--patience 1", "PATIENCE", 1),
    ("--decay none", "DECAY", None), ("--widths 4 5 6", "WIDTHS", (4, 5, 6)), ("--dropped 1", "DROPPED", 1.0),
]  # fmt: skip


@pytest.mark.parametrize(("words", "name", "value"), OPTIONS)
def test_an_option_sets_its_constant_and_no_other(script, words, name, value):
    module = script()
    from_command_line(module, words.split())
    assert constants(module) == DEFAULTS | {name: value}
    assert type(module[name]) is type(value)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--epoch 50", "unrecognized arguments: --epoch 50"),  # no abbreviations: their meaning may change
        ("--local 3", "unrecognized arguments: --local"),
        ("--resume yes", "unrecognized arguments: yes"),
        ("--patience 0", "argument --patience: got '0'; expected greater than or equal to 1"),
        ("--patience 99999999999", "argument --patience: got '99999999999'; expected less than"),
        ("--decay nan", "argument --decay: got 'nan'; expected a finite number"),
        ("--learning-rate inf", "argument --learning-rate: got 'inf'; expected a finite number"),
        ("--dropped 1.01", "argument --dropped: got '1.01'; expected less than or equal to 1"),
        ("--parts 3", "argument --parts: expected 2 arguments"),
        ("--widths 8 -1", "argument --widths: got '-1'; expected greater than or equal to 1"),
        ("--epochs 2.5", "argument --epochs: got '2.5'; expected a valid integer"),
        ("--epochs none", "argument --epochs: got 'none'; expected a valid integer"),
        ("--hidden 128 wide", "argument --hidden: got 'wide'; expected a valid integer"),
        ("--device tpu", "argument --device: got 'tpu'; expected 'auto' or 'cpu'"),
    ],
)
def test_a_wrong_option_is_an_error_that_names_it(script, capsys, words, message):
    with pytest.raises(SystemExit) as ended:
        from_command_line(script(), words.split())
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


WRONG = [
    'DEVICE: Literal["auto", "cpu"] = "gpu"', "MAX_GENES: int | None = 2500.5", "MAX_PCT_MT: float | None = True",
    "BULK_FILE: str | None = 3", "HIDDEN = (128, 'wide')", "PATIENCE: Count = 0", "LEARNING_RATE = float('nan')",
    "PARTS: tuple[Count, Count] = (5,)",
]  # fmt: skip


@pytest.mark.parametrize("edit", WRONG)
def test_a_constant_edited_to_a_wrong_value_is_an_error_that_names_it(script, capsys, edit):
    name, module = edit.partition(" ")[0].strip(":"), script(edit)
    with pytest.raises(SystemExit) as ended:
        from_command_line(module, [])
    assert ended.value.code == 2
    assert f"{name} = {module[name]!r} in {module['__file__']}: " in capsys.readouterr().err


def test_a_preset_changes_only_what_the_user_has_not_set(script, monkeypatch):
    """EPOCHS was given on the command line, NAME was edited in the script; LEARNING_RATE and SHUFFLE were not."""
    module = script('NAME = "edited"')
    monkeypatch.setattr(options, "GIVEN", from_command_line(module, ["--epochs", "300"]))
    preset = {"EPOCHS": (300, 4000), "NAME": ("lung", "paper"), "LEARNING_RATE": (1e-3, 6e-6), "SHUFFLE": (True, False)}
    apply_preset(module, preset)
    assert [module[name] for name in preset] == [300, "edited", 6e-6, False]


@pytest.mark.parametrize("stage", [stage for stage in STAGES[1:] if stage != "_3_train_gmvae.py"])
def test_the_defaults_of_the_papers_preset_are_those_of_the_stage(stage):
    module = runpy.run_path(str(ROOT / stage))
    preset = module["paper_preset"]()
    assert {name: default for name, (default, _) in preset.items()} == {name: module[name] for name in preset}
    assert all(default != value for default, value in preset.values())


def test_help_shows_the_comments_of_the_source(script, capsys):
    with pytest.raises(SystemExit) as ended:
        from_command_line(script(), ["--help"])
    assert ended.value.code == 0
    text = re.sub(r"\s+", " ", capsys.readouterr().out)  # argparse breaks lines as wide as the terminal
    assert "Stage 9: a script of every kind of constant." in text
    training, places = text.split("Training (ours):")[1].split("Where things are:")
    for comment in (
        "passes over the data [300]", "of Adam; 10% of the paper's [0.001]", "of the run [lung]", "go on [False]", "layers [128 64]",
        "of the units, said in a comment on lines of its own [0.1]", "of weights [none]", "--resume, --no-resume",
    ):  # fmt: skip
        assert comment in training
    for comment in ("a table [none]", "genes of a cell [2500]", "to run on [auto]"):
        assert comment in places
    assert "--local" not in text and "private" not in text


# The six stages


@pytest.mark.parametrize("stage", STAGES)
def test_help_of_every_stage_lists_every_constant(stage, tmp_path):
    done = Workplace(tmp_path).run(stage, "--help")
    source = (ROOT / stage).read_text()
    code = source.split('"""', 2)[2]  # without the docstring
    names = re.findall(r"^([A-Z][A-Z0-9_]*)(?:: [^=]+)? = ", code, flags=re.MULTILINE)
    assert "DATA_DIR" in names
    listed = re.findall(r"^  (--[a-z0-9-]+)", done.stdout, flags=re.MULTILINE)
    assert listed == ["--" + name.lower().replace("_", "-") for name in names]
    assert [constant.name for constant in declared(runpy.run_path(str(ROOT / stage))) if not constant.comment] == []


@pytest.mark.parametrize("stage", STAGES)
def test_importing_a_stage_does_nothing(stage, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [stage, "--no-such-option"])
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(ROOT / stage))
    assert capsys.readouterr() == ("", "") and list(tmp_path.iterdir()) == []


def test_an_error_is_printed_in_one_line_with_its_place(tmp_path):
    done = Workplace(tmp_path).run(STAGES[1], check=False)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert f"error: {tmp_path / 'data' / 'counts.h5ad'} is missing: run _0_download_data.py first" in done.stderr
    assert re.search(r"\(from .*run.py, line \d+\)", done.stderr)
