"""The rules of the layout: imports flow one way, every folder explains itself, the top level is the user's list."""

import ast
import subprocess
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from helpers import ROOT, STAGES

# "": files directly in lib
LEVELS = {"": 0, "data": 1, "models": 2, "baselines": 3, "bulk": 3, "evaluation": 4, "report": 5}
FOLDERS = list(LEVELS)[1:]


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


SOURCES = {module_name(path): path.read_text() for path in [*ROOT.glob("_*.py"), *(ROOT / "lib").rglob("*.py")]}


def imports(source: str) -> set[str]:
    """The modules that a source imports, anywhere in it; `from a import b` is a.b where that is a module of the project."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            whole = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= {name if name in SOURCES else str(node.module) for name in whole}
    return names


IMPORTS = {name: imports(source) for name, source in SOURCES.items()}


def folder_of(module: str) -> str:
    """The folder of lib that a module is in, or is; "" for the files directly in lib."""
    folder = module.removeprefix("lib.").split(".")[0]
    return folder if folder in FOLDERS else ""


@pytest.mark.parametrize("module", sorted(name for name in IMPORTS if name.startswith("lib.")))
def test_imports_flow_one_way(module):
    """A file imports from its own folder and from those of lower levels."""
    folder = folder_of(module)
    for other in (name for name in IMPORTS[module] if name.startswith("lib")):
        assert folder_of(other) == folder or LEVELS[folder_of(other)] < LEVELS[folder], f"{module} imports {other}"


def test_no_module_imports_itself_by_way_of_others():
    TopologicalSorter({name: IMPORTS[name] & set(SOURCES) for name in SOURCES}).prepare()  # CycleError names the cycle


def test_nothing_imports_a_stage_script():
    stages = {stage.removesuffix(".py") for stage in STAGES}
    assert stages < set(IMPORTS) and not any(stages & names for names in IMPORTS.values())


def test_figures_are_made_in_the_plot_files_alone_and_these_know_no_model():
    plots = {name for name in IMPORTS if name.startswith("lib.evaluation.plots_")}
    assert plots == {name for name in IMPORTS if any(other.startswith("matplotlib") for other in IMPORTS[name])}
    for name in plots:
        assert not {folder_of(other) for other in IMPORTS[name]} & {"models", "baselines"}, name


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_folder_of_lib_explains_itself(folder):
    assert ast.get_docstring(ast.parse(SOURCES[f"lib.{folder}"]))
    readme = (ROOT / "lib" / folder / "README.md").read_text()
    for path in (ROOT / "lib" / folder).glob("[!_]*.py"):
        assert path.name in readme or f"`{path.stem}`" in readme, f"{path.name} is not in the folder's README"


def test_the_top_level_is_what_the_user_decided():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    files = listed or [path.name for path in ROOT.iterdir()]  # a copy without git
    ours = {name.split("/")[0] for name in files if not name.startswith((".", "__"))}
    assert ours == {*STAGES, "README.md", "requirements.txt", "lib", "data", "models", "fig", "tests"}
