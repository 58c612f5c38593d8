"""What was done: the commands, constants, versions and seconds of every stage, from the records beside the files."""

import json
import shlex
from pathlib import Path
from typing import Any, NamedTuple

from lib import options, records, runs
from lib.runs import ROOT, git

FOLDERS = {"DATA_DIR", "MODELS_DIR", "FIG_DIR", "OUTPUT"}  # constants that change no number


class Changed(NamedTuple):
    """A constant that is not as in the script."""

    name: str
    value: str
    default: str
    comment: str

    @property
    def option(self) -> str:
        """The command-line option that sets it."""
        name = self.name.lower().replace("_", "-")
        if self.value in ("True", "False"):
            return f"--{name}" if self.value == "True" else f"--no-{name}"
        return f"--{name} {self.value if ' ' in self.default else shlex.quote(self.value)}"


class Stage(NamedTuple):
    """One run of a stage."""

    script: str
    command: str | None  # None: not recorded
    seconds: float | None
    changed: list[Changed]
    versions: dict[str, str]
    commit: str | None

    @property
    def shown_command(self) -> str:
        """The command, or one with the same constants."""
        return self.command or " ".join(["python", self.script, *(one.option for one in self.changed)])


def stages(last_files: list[Path], checkpoints: list[dict[str, Any]]) -> list[Stage]:
    """The stages that made these results, in order, and the present run.

    Parameters
    ----------
    last_files
        Of each stage before the present one, the last file that it writes, whose record tells about the run.
    checkpoints
        Of the models in use: they say how they were trained where the records are not at hand (models of somebody else).
    """
    read = [records.read(path) for path in last_files if path.exists()]
    found = {record["stage"]: record for record in read if record is not None and "stage" in record}
    for checkpoint in checkpoints:
        script = checkpoint["stage"]
        found[script] = found.get(script) or checkpoint.get("made_by") or {"constants": checkpoint["constants"]}
    if present := runs.description():
        found[present["stage"]] = present | runs.invocation()
    return [_stage(script, record) for script, record in sorted(found.items())]


def _stage(script: str, record: dict[str, Any]) -> Stage:
    commit = record.get("commit")
    return Stage(
        script,
        record.get("command"),
        record.get("seconds"),
        changed_constants(script, record.get("constants", {}), commit),
        record.get("versions", {}),
        commit,
    )


def changed_constants(script: str, constants: dict[str, Any], commit: str | None) -> list[Changed]:
    """Constants of a run that differ from those of the script at its commit, or of the script as it is, without git.

    A constant that was set on the command line, by a preset, or by editing the script is therefore listed.
    """
    changed = []
    for name, (default, comment) in options.defaults(_source(script, commit)).items():
        if name in constants and name not in FOLDERS:
            got, expected = (json.loads(json.dumps(value, default=str)) for value in (constants[name], default))
            if got != expected:
                changed.append(Changed(name, _shown(got), _shown(expected), comment))
    return changed


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(map(str, value))
    return "none" if value is None else str(value)


def _source(script: str, commit: str | None) -> str:
    """Text of a script at a commit; the file as it is where git does not know it."""
    at_commit = git("show", f"{commit.split()[0]}:{script}") if commit is not None else None
    return (ROOT / script).read_text(encoding="utf-8") if at_commit is None else at_commit


def duration(seconds: float | None) -> str:
    """Such as "42 s", "3 min", "2.5 h"."""
    if seconds is None:
        return "not recorded"
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
