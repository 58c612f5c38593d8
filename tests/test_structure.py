"""The rules of the layout: imports flow one way, every folder explains itself, the top level is the user's list."""

import ast
import subprocess
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from helpers import ROOT, STAGES

FOLDERS = ("data", "models", "baselines", "bulk", "evaluation", "report")
FORBIDDEN = {  # folder of lib: folders that its files must not import; "" are the files directly in lib
    "data": {"models", "baselines", "bulk", "evaluation", "report"},
    "models": {"baselines", "bulk", "evaluation", "report"},
    "baselines": {"bulk", "evaluation", "report"},
    "bulk": {"baselines", "evaluation", "report"},
    "evaluation": {"report"},
    "report": set(),
    "": {"data", "models", "baselines", "bulk", "evaluation", "report"},
}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


SOURCES = {module_name(path): path.read_text() for path in [*ROOT.glob("_*.py"), *(ROOT / "lib").rglob("*.py")]}


def imports(source: str, known: set[str]) -> set[str]:
    """The modules that a source imports, anywhere in it; `from a import b` is a.b where that is a known module."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "the project imports by full names"
            whole = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= (whole & known) | ({node.module} if whole - known else set())
    return found


IMPORTS = {name: imports(source, set(SOURCES)) for name, source in SOURCES.items()}
IN_LIB = sorted(name for name in IMPORTS if name.split(".")[0] == "lib")


def folder_of(module: str) -> str:
    """The folder of lib that a module is in, or is; "" for the files directly in lib."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in FOLDERS else ""


def is_of(module: str, library: str) -> bool:
    return module == library or module.startswith(f"{library}.")


@pytest.mark.parametrize("module", IN_LIB)
def test_imports_flow_one_way(module):
    wrong = sorted(
        other for other in IMPORTS[module] if is_of(other, "lib") and folder_of(other) in FORBIDDEN[folder_of(module)]
    )
    assert not wrong, f"{module} imports {', '.join(wrong)}"


def test_no_module_imports_itself_by_way_of_others():
    TopologicalSorter({name: IMPORTS[name] & set(SOURCES) for name in SOURCES}).prepare()  # CycleError names the cycle


def test_nothing_imports_a_stage_script():
    stages = {stage.removesuffix(".py") for stage in STAGES}
    assert stages < set(IMPORTS)
    for name, imported in IMPORTS.items():
        assert not imported & stages, name


def test_figures_are_made_in_the_plot_files_alone_and_these_know_no_model():
    plots = [name for name in IN_LIB if name.startswith("lib.evaluation.plots_")]
    assert plots
    for name, imported in IMPORTS.items():
        if name in plots:
            assert not {folder_of(other) for other in imported} & {"models", "baselines"}, name
        else:
            assert not any(is_of(other, "matplotlib") for other in imported), name


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_folder_of_lib_explains_itself(folder):
    assert ast.get_docstring(ast.parse((ROOT / "lib" / folder / "__init__.py").read_text()))
    readme = (ROOT / "lib" / folder / "README.md").read_text()
    for path in (ROOT / "lib" / folder).glob("[!_]*.py"):
        assert path.name in readme or f"`{path.stem}`" in readme, f"{path.name} is not in the folder's README"


def test_the_top_level_is_what_the_user_decided():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    files = (
        listed.stdout.split()
        if listed.returncode == 0 and listed.stdout
        else [str(p.relative_to(ROOT)) for p in ROOT.iterdir()]
    )
    ours = {name.split("/")[0] for name in files if not name.startswith((".", "__"))}
    assert ours == {*STAGES, "README.md", "requirements.txt", "lib", "data", "models", "fig", "tests"}
