"""The constants of a script are its options: same names, same types, same comments."""

import re
import runpy
import subprocess
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
    """The script's `globals()`, after some of its lines were edited."""

    def make(**edits: str) -> dict:
        text = SCRIPT
        for old, new in edits.items():
            text, n = re.subn(rf"^{old}\b.*$", new, text, flags=re.MULTILINE)
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


@pytest.mark.parametrize(
    ("words", "name", "value"),
    [
        ("--epochs 50", "EPOCHS", 50),
        ("--epochs=50", "EPOCHS", 50),
        ("--learning-rate 2e-4", "LEARNING_RATE", 2e-4),
        ("--learning-rate 1", "LEARNING_RATE", 1.0),
        ("--name 7", "NAME", "7"),
        ("--name none", "NAME", "none"),
        ("--resume", "RESUME", True),
        ("--no-shuffle", "SHUFFLE", False),
        ("--hidden 256 128 64", "HIDDEN", (256, 128, 64)),
        ("--hidden 256", "HIDDEN", (256,)),
        ("--bulk-file bulk.csv", "BULK_FILE", "bulk.csv"),
        ("--bulk-file none", "BULK_FILE", None),
        ("--max-genes 3000", "MAX_GENES", 3000),
        ("--max-genes none", "MAX_GENES", None),
        ("--max-pct-mt 7", "MAX_PCT_MT", 7.0),
        ("--max-pct-mt None", "MAX_PCT_MT", None),
        ("--device cpu", "DEVICE", "cpu"),
        ("--patience 1", "PATIENCE", 1),
        ("--decay 2e-9", "DECAY", 2e-9),
        ("--decay none", "DECAY", None),
        ("--parts 1 2", "PARTS", (1, 2)),
        ("--widths 4 5 6", "WIDTHS", (4, 5, 6)),
        ("--dropped 1", "DROPPED", 1.0),
        ("--dropped 0", "DROPPED", 0.0),
    ],
)
def test_an_option_sets_its_constant_and_no_other(script, words, name, value):
    module = script()
    from_command_line(module, words.split())
    assert constants(module) == DEFAULTS | {name: value}
    assert type(module[name]) is type(value)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            "--epoch 50",
            "unrecognized arguments: --epoch 50",
        ),  # an abbreviation would change its meaning with the next constant
        ("--patience 0", "argument --patience: got '0'; expected greater than or equal to 1"),
        ("--patience 99999999999", "argument --patience: got '99999999999'; expected less than"),
        ("--decay 0", "argument --decay: got '0'; expected greater than 0"),
        ("--decay nan", "argument --decay: got 'nan'; expected a finite number"),
        ("--learning-rate inf", "argument --learning-rate: got 'inf'; expected a finite number"),
        ("--dropped 1.01", "argument --dropped: got '1.01'; expected less than or equal to 1"),
        ("--parts 3", "argument --parts: expected 2 arguments"),
        ("--widths 8 -1", "argument --widths: got '-1'; expected greater than or equal to 1"),
        ("--local 3", "unrecognized arguments: --local"),
        ("50", "unrecognized arguments: 50"),
        ("--epochs 2.5", "argument --epochs: got '2.5'; expected a valid integer"),
        ("--epochs none", "argument --epochs: got 'none'; expected a valid integer"),
        ("--max-genes few", "argument --max-genes: got 'few'; expected a valid integer"),
        ("--hidden 128 wide", "argument --hidden: got 'wide'; expected a valid integer"),
        ("--device tpu", "argument --device: got 'tpu'; expected 'auto' or 'cpu'"),
        ("--resume yes", "unrecognized arguments: yes"),
    ],
)
def test_a_wrong_option_is_an_error_that_names_it(script, capsys, words, message):
    with pytest.raises(SystemExit) as ended:
        from_command_line(script(), words.split())
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "edit",
    [
        'DEVICE: Literal["auto", "cpu"] = "gpu"', 'MAX_GENES: int | None = "2500"', "MAX_GENES: int | None = 2500.5",
        "MAX_PCT_MT: float | None = True", "BULK_FILE: str | None = 3", "HIDDEN = (128, 'wide')", "PATIENCE: Count = 0",
        "DECAY: Positive | None = -1", "LEARNING_RATE = float('nan')", "PARTS: tuple[Count, Count] = (5,)",
    ],
)  # fmt: skip
def test_a_constant_edited_to_a_wrong_value_is_an_error_that_names_it(script, capsys, edit):
    name = edit.partition(" ")[0].strip(":")
    module = script(**{name: edit})
    with pytest.raises(SystemExit) as ended:
        from_command_line(module, [])
    assert ended.value.code == 2
    assert f"{name} = {module[name]!r} in {module['__file__']}: " in capsys.readouterr().err


def test_edited_constants_are_the_new_defaults(script):
    module = script(
        EPOCHS="EPOCHS = 12", MAX_PCT_MT="MAX_PCT_MT: float | None = 5", BULK_FILE='BULK_FILE: str | None = "a.csv"'
    )
    from_command_line(module, ["--name", "x"])
    assert constants(module) == DEFAULTS | {"EPOCHS": 12, "MAX_PCT_MT": 5, "BULK_FILE": "a.csv", "NAME": "x"}


def test_a_preset_changes_only_what_the_user_has_not_set(script, monkeypatch):
    """EPOCHS was given on the command line, NAME was edited in the script; LEARNING_RATE and SHUFFLE were not."""
    module = script(NAME='NAME = "edited"')
    monkeypatch.setattr(options, "GIVEN", from_command_line(module, ["--epochs", "300"]))
    preset = {"EPOCHS": (300, 4000), "NAME": ("lung", "paper"), "LEARNING_RATE": (1e-3, 6e-6), "SHUFFLE": (True, False)}
    apply_preset(module, preset)
    changed = [module[name] for name in ("EPOCHS", "NAME", "LEARNING_RATE", "SHUFFLE")]
    assert changed == [300, "edited", 6e-6, False]


@pytest.mark.parametrize("stage", [stage for stage in STAGES[1:] if stage != "_3_train_gmvae.py"])
def test_the_defaults_of_the_papers_preset_are_those_of_the_stage(stage):
    module = runpy.run_path(str(ROOT / stage))
    preset = module["paper_preset"]()
    assert {name: default for name, (default, _) in preset.items()} == {name: module[name] for name in preset}
    assert all(default != value for default, value in preset.values())


def help_of(module, capsys) -> str:
    with pytest.raises(SystemExit) as ended:
        from_command_line(module, ["--help"])
    assert ended.value.code == 0
    return re.sub(r"\s+", " ", capsys.readouterr().out)  # argparse breaks lines as wide as the terminal


def test_help_shows_the_comments_of_the_source(script, capsys):
    text = help_of(script(), capsys)
    assert "Stage 9: a script of every kind of constant." in text
    first, second = text.index("Training (ours):"), text.index("Where things are:")
    assert first < text.index("passes over the data [300]") < text.index("layers [128 64]") < second
    for help_text in ("of Adam; 10% of the paper's [0.001]", "of the run [lung]", "go on [False]"):
        assert first < text.index(help_text) < second
    assert "of the units, said in a comment on lines of its own [0.1]" in text and "of weights [none]" in text
    for help_text in ("a table [none]", "genes of a cell [2500]", "to run on [auto]"):
        assert second < text.index(help_text)
    assert "--resume, --no-resume" in text and "--local" not in text and "private" not in text


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


def test_importing_the_stages_does_nothing(tmp_path):
    code = "import importlib, sys; sys.path.insert(0, sys.argv[1]); stages = sys.argv[2:]; sys.argv[1:] = ['--no-such-option']; "
    code += "[importlib.import_module(stage) for stage in stages]"
    command = [sys.executable, "-c", code, str(ROOT), *(stage.removesuffix(".py") for stage in STAGES)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert list(tmp_path.iterdir()) == []


def test_an_error_is_printed_in_one_line_with_its_place(tmp_path):
    done = Workplace(tmp_path).run(STAGES[1], check=False)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert f"error: {tmp_path / 'data' / 'counts.h5ad'} is missing: run _0_download_data.py first" in done.stderr
    assert re.search(r"\(from .*run.py, line \d+\)", done.stderr)
