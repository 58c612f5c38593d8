"""Every command that a README shows is run: this file says for each how, and fails for a command that it does not know."""

import re
import shlex
import shutil
import subprocess
import sys
from typing import NamedTuple

import numpy as np
import pandas as pd
import pytest
from helpers import ROOT, STAGES, Workplace, simulated_dataset

READMES = sorted([ROOT / "README.md", *ROOT.glob("lib/*/README.md"), ROOT / "tests/benchmarks/README.md"])


class Run(NamedTuple):
    """The command is run in a folder with all results of the pipeline, with options that make it small."""

    more: str = ""
    after: tuple[str, ...] = ()  # commands of this list that are run before it


class Elsewhere(NamedTuple):
    """The command is run by another test, or by .ci/run: file::name."""

    where: str


class Installation(NamedTuple):
    """The command installs packages from the network, which a test does not."""


BY_PIPELINE = Elsewhere("tests/conftest.py::pipeline")
BY_PAPER = Elsewhere("tests/test_paper.py::test_the_published_run_in_small")
BY_CI = Elsewhere(".ci/run::test_command")
FEW = "--max-cells-evaluated 60 --max-cells-plotted 100"

COMMANDS: dict[str, Run | Elsewhere | Installation] = {
    # README.md, quick start
    "python3 -m venv .venv": Installation(),
    ".venv/bin/pip install -r requirements.txt": Installation(),
    'python -m pytest -q -n 2 --dist loadfile tests -m "not slow"': BY_CI,
    "python _0_download_data.py --dataset pbmc68k_reduced": BY_PIPELINE,
    "python _1_split_train_test.py": BY_PIPELINE,
    "python _2_make_pseudobulk.py": BY_PIPELINE,
    "python _3_train_gmvae.py": BY_PIPELINE,
    "python _4_train_sctape.py": BY_PIPELINE,
    "python _5_generate.py": BY_PIPELINE,
    # data from the network: on the local server
    "python _0_download_data.py": Elsewhere(
        "tests/data/test_download.py::test_stage_0_downloads_and_writes_the_lung_cells"
    ),
    "python _0_download_data.py --dataset pbmc3k": Elsewhere("tests/data/test_datasets.py::test_pbmc3k"),
    # your own data
    "python _0_download_data.py --dataset my_cells.h5ad --cell-type-key annotation": Run(),
    "python _5_generate.py --bulk-file my_bulk.csv --n-cells 2000": Run(FEW),
    "torchrun --nproc-per-node 4 _3_train_gmvae.py": Run("--epochs 2"),
    # the run of the paper
    **{f"python {stage} --preset paper": BY_PAPER for stage in STAGES[1:]},
    # the folders of lib
    "python _3_train_gmvae.py --generator beta_vae": Run("--other-epochs 1"),
    "python _5_generate.py --generator beta_vae": Run(FEW, ("python _3_train_gmvae.py --generator beta_vae",)),
    "python _4_train_sctape.py --network bulk_encoder": Run(
        "--epochs 2 --n-state-samples 200 --cells-per-state-sample 100"
    ),
    "python _5_generate.py --deconvolution bulk_encoder": Run(
        FEW, ("python _4_train_sctape.py --network bulk_encoder",)
    ),
    # measurements: README.md, lib and tests/benchmarks
    "python tests/benchmarks/fidelity.py --data data/counts.h5ad --plot fig/readme_umap_by_cell_type.png": Run(
        "--seeds 1 --only real ours nb"
    ),
    "python tests/benchmarks/deconvolution.py": Run("--cases a --seeds 0 --only regression true-rna"),
    ".venv/bin/pip install -r requirements.txt -r tests/benchmarks/requirements.txt": Installation(),
    "python tests/benchmarks/fidelity.py --data data/counts.h5ad": Run("--seeds 1 --only real nb"),
    "python tests/benchmarks/generators.py --data pbmc68k_reduced --seeds 3": Run(
        "--seeds 1 --only gmvae conv_cvae --epochs 1"
    ),
    "python tests/benchmarks/cfgen.py --data data/counts.h5ad": Run("--seeds 1 --only real nb means"),
    "python tests/benchmarks/donors.py --data data/counts.h5ad": Run("--seeds 1 --only new"),
    "python tests/benchmarks/rare.py --data data/counts.h5ad": Run("--sizes 10"),
    "python tests/benchmarks/generators.py --data data/counts.h5ad": Run("--only conv_cvae --epochs 1"),
    "python tests/benchmarks/paper.py --data data/counts.h5ad": Run("--epochs 1 --sctape-epochs 1"),
    "python tests/benchmarks/bulk_states.py --data data/counts.h5ad": Run(),
    "python tests/benchmarks/deconvolution.py --data data/counts.h5ad --cases a b": Run(
        "--seeds 0 --only regression nnls constant true-rna"
    ),
    "python tests/benchmarks/speed.py --data data/counts.h5ad": Run("--rounds 1 --no-likelihood --n-cell-types 3"),
    "python tests/benchmarks/loader.py --folder /tmp/loader": Run("--folder loader --cells 400 --genes 2000"),
    "python tests/benchmarks/scale.py --folder /tmp/scale --cells 10000": Run(
        "--folder scale --cells 400 --genes 2000 --epochs 1"
    ),
}


def commands_of(text: str) -> set[str]:
    """Commands in blocks of ```bash, in indented lines, and in `code` within the text; .venv/bin/python is python."""
    blocks = re.findall(r"^```bash\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
    parts = [part for block in blocks for line in block.splitlines() for part in re.split(r"&&|\\$", line)]
    first = r"(?:\.venv/bin/)?(?:python3?|pip|torchrun) "
    parts += re.findall(rf"^    ({first}.*)$", text, flags=re.MULTILINE)
    parts += re.findall(rf"`({first}[^`]+)`", text)
    bare = (re.sub(r"\s+# .*", "", part).strip().replace(".venv/bin/python ", "python ") for part in parts)
    return {re.sub(r"  +", " ", part) for part in bare if part and not part.startswith("#")}


SHOWN = {str(path.relative_to(ROOT)): commands_of(path.read_text()) for path in READMES}


def test_commands_are_found_in_blocks_lines_and_text():
    text = """
```bash
python3 -m venv .venv && .venv/bin/pip install -r requirements.txt &&
.venv/bin/python _5_generate.py
```

    python _3_train_gmvae.py --paper   # hours

Measured (`python tests/benchmarks/fidelity.py`); `EPOCHS = 300` is `--epochs 300`.
"""
    assert commands_of(text) == {
        "python3 -m venv .venv", ".venv/bin/pip install -r requirements.txt", "python _5_generate.py",
        "python _3_train_gmvae.py --paper", "python tests/benchmarks/fidelity.py",
    }  # fmt: skip


@pytest.mark.parametrize("readme", SHOWN)
def test_every_command_of_a_readme_is_known_here(readme):
    unknown = sorted(SHOWN[readme] - set(COMMANDS))
    assert not unknown, "add these to COMMANDS, with options that make them small"


def test_every_command_here_is_in_a_readme():
    gone = sorted(set(COMMANDS) - set().union(*SHOWN.values()))
    assert not gone, "no README shows these"


def test_installations_alone_are_not_run():
    for command, how in COMMANDS.items():
        assert isinstance(how, Run | Elsewhere) or re.match(r"python3 -m venv |(\.venv/bin/)?pip install ", command)


@pytest.mark.parametrize("command", [name for name, how in COMMANDS.items() if isinstance(how, Elsewhere)])
def test_what_runs_elsewhere_is_run_there(command, pipeline):
    file, name = COMMANDS[command].where.split("::")
    assert name in (ROOT / file).read_text()
    if COMMANDS[command] is BY_PIPELINE:
        assert "wrote" in pipeline.output[command.split()[1]]


@pytest.fixture(scope="module")
def place(pipeline, tmp_path_factory) -> Workplace:
    """Results of the pipeline, and the files of a user."""
    place = Workplace(tmp_path_factory.mktemp("readme") / "place")
    shutil.copytree(pipeline.path, place.path)
    cells = simulated_dataset(n_cells=200)
    cells.obs["annotation"] = cells.obs.pop("cell_type")
    cells.write_h5ad(place.path / "my_cells.h5ad")
    tpm = pd.read_csv(place.data / "pseudobulk_test_tpm.csv", index_col=0, comment="#")
    tpm.select_dtypes(np.number).iloc[:2].rename_axis(None).to_csv(place.path / "my_bulk.csv")
    return place


def run(words: list[str], place: Workplace) -> None:
    """A command in the folder of the place; a stage in this process, anything else in one of its own."""
    if words[0] == "torchrun":
        stage = next(i for i, word in enumerate(words) if word in STAGES)
        torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone", *words[1:stage])
        place.process(words[stage], *words[stage + 1 :], program=torchrun)
    elif words[1] in STAGES:
        place.run(*words[1:])
    else:
        command = [sys.executable, str(ROOT / words[1]), *words[2:]]
        done = subprocess.run(command, cwd=place.path, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("command", [name for name, how in COMMANDS.items() if isinstance(how, Run)])
def test_a_command_runs_as_shown(command, place, tmp_path):
    own = Workplace(tmp_path / "place")
    shutil.copytree(place.path, own.path)
    for name in (*COMMANDS[command].after, command):
        run(shlex.split(f"{name} {COMMANDS[name].more}"), own)
