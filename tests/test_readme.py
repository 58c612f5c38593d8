"""Every command that a README shows can be typed: the file is there and knows every option; each benchmark runs, in small."""

import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT, STAGES, Workplace

from lib.options import from_command_line

READMES = sorted([ROOT / "README.md", *ROOT.glob("lib/*/README.md"), ROOT / "tests/benchmarks/README.md"])
FIRST = r"(?:\.venv/bin/)?(?:python3?|torchrun) "
# Options that make a benchmark small; the data are the 700 cells of the pipeline
BENCHMARKS = {
    "bulk_states.py": "", "cfgen.py": "--seeds 1 --only real nb", "cross_reference.py": "",
    "deconvolution.py": "--cases a --seeds 0 --only regression nnls constant", "donors.py": "--seeds 1 --only new",
    "fidelity.py": "--seeds 1 --only real nb conv_cvae --epochs 1", "paper.py": "--epochs 1",
    "rare.py": "--sizes 10", "scale.py": "--folder scale --cells 400 --genes 2000 --epochs 1",
    "speed.py": "--rounds 1 --n-cell-types 3",
}  # fmt: skip


def commands_of(text: str) -> list[str]:
    """Commands in blocks of ```bash, in indented lines, and in `code` within the text; .venv/bin/python is python."""
    blocks = re.findall(r"^```bash\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
    parts = [part for block in blocks for line in block.splitlines() for part in re.split(r"&&|\\$", line)]
    parts += re.findall(rf"^    ({FIRST}.*)$", text, flags=re.MULTILINE) + re.findall(rf"`({FIRST}[^`]+)`", text)
    return sorted({re.sub(r"\s+# .*", "", part).strip() for part in parts if re.match(rf"\s*{FIRST}", part)})


COMMANDS = sorted({command for path in READMES for command in commands_of(path.read_text())})


def test_commands_are_found_in_blocks_lines_and_text():
    text = "```bash\npip install x &&\n.venv/bin/python _5.py\n```\n\n    python _3.py --a   # hours\n\nMeasured (`python b.py`); `--c`.\n"
    assert commands_of(text) == [".venv/bin/python _5.py", "python _3.py --a", "python b.py"]
    assert len(COMMANDS) > 20


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_knows_its_file_and_its_options(command):
    words = shlex.split(command)
    script = next((i for i, word in enumerate(words) if word.endswith(".py")), None)
    if script is None:
        assert "-m venv" in command or "-m pytest" in command
    elif words[script] in STAGES:
        module = runpy.run_path(str(ROOT / words[script]))
        from_command_line(module, words[script + 1 :])  # ends the process if one is unknown
    else:
        text = (ROOT / words[script]).read_text() + (ROOT / "tests/benchmarks/shared.py").read_text()
        for option in (word for word in words[script + 1 :] if word.startswith("--")):
            assert f'"{option}"' in text, f"{words[script]} has no {option}"


@pytest.mark.slow
@pytest.mark.parametrize("name", BENCHMARKS)
def test_a_benchmark_runs(name, pipeline, tmp_path):
    if name == "cross_reference.py" and not (ROOT.parent / "shared" / "data").exists():
        pytest.skip("needs the blood cells in ../shared/data")
    place = Workplace(tmp_path / "place")
    shutil.copytree(pipeline.data, place.data)
    command = [sys.executable, str(ROOT / "tests/benchmarks" / name), *shlex.split(BENCHMARKS[name])]
    done = subprocess.run(command, cwd=place.path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_benchmark_is_run_and_in_the_readme():
    names = {path.name for path in Path(ROOT / "tests/benchmarks").glob("*.py")} - {"shared.py", "test_cfgen.py"}
    assert names == set(BENCHMARKS)
    text = (ROOT / "tests/benchmarks/README.md").read_text()
    assert all(f"`{name}`" in text for name in names)
