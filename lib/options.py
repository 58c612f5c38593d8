"""The constants at the top of a stage script are also its command-line options.

A stage declares `EPOCHS = 300  # passes over the data`; `python stage.py --epochs 50` sets it for one run. A comment after an empty
line is the heading of the constants below it in `--help`; a comment beside a constant, or directly above it, is its help text.
A constant whose value does not show its type (None, a choice, a range) has an annotation: `EPOCHS: Count | None = None`.
"""

import argparse
import ast
import re
import sys
import traceback
import types
from pathlib import Path
from typing import Annotated, Any, NamedTuple, NoReturn, get_args, get_origin

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from lib import run as runs

LARGEST = 2**31 - 1  # whole numbers above it do not fit into the index types of the libraries
GIVEN: set[str] = set()  # constants that were set on the command line of this process

# Types of constants with a range
Whole = Annotated[int, Field(ge=0, le=LARGEST)]
Count = Annotated[int, Field(ge=1, le=LARGEST)]
Several = Annotated[int, Field(ge=2, le=LARGEST)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]  # what NumPy takes
NotNegative = Annotated[float, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Fraction = Annotated[float, Field(gt=0, lt=1)]
Part = Annotated[float, Field(ge=0, lt=1)]
Percent = Annotated[float, Field(gt=0, le=100)]


class Constant(NamedTuple):
    name: str
    type: Any
    group: str
    comment: str


def run(module: dict[str, Any]) -> None:
    """Run a stage: set its constants from the command line, then call its `main()`. module: `globals()` of the script.

    Errors of data, files and computer end it with one line and status 1, a signal with 128 + its number, errors of the program with a
    traceback.
    """
    GIVEN.update(from_command_line(module))
    log_folder = runs.ROOT / Path(module.get("DATA_DIR", "data")).expanduser()
    try:
        with runs.started(Path(module["__file__"]).name, lambda: constants(module), log_folder):
            module["main"]()
    except runs.Stopped as stopped:
        end(
            f"stopped by signal {stopped}; complete files stay, and running the stage again is safe",
            128 + stopped.args[0],
        )
    except (ValueError, OSError) as error:
        end(f"error: {error}\n(from {_place(error)})", 1)
    except Exception as error:
        is_memory = isinstance(error, MemoryError) or re.search("OutOfMemory|allocate memory", f"{type(error)} {error}")
        if not is_memory:
            raise
        remedy = "lower MEMORY_GB, BATCH_SIZE or the number of cells, or use a computer with more memory"
        end(
            f"error: the memory is not enough ({error or 'no more could be allocated'}): {remedy}\n(from {_place(error)})",
            1,
        )


def end(message: str, status: int) -> NoReturn:
    print(f"\n{message}", file=sys.stderr)
    sys.exit(status)


def _place(error: BaseException) -> str:
    """File and line of the project where an error was raised."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [f for f in frames if f.filename.startswith(str(runs.ROOT)) and "site-packages" not in f.filename]
    return f"{ours[-1].filename}, line {ours[-1].lineno}" if ours else "the program"


def from_command_line(module: dict[str, Any], arguments: list[str] | None = None) -> set[str]:
    """Set the constants of a script from the command line; returns the names of those that were given.

    module: `globals()` of the script, changed in place; arguments: words of the command line, None for those of this process.
    A wrong option, a constant edited to a wrong value, and `--help` end the process.
    """
    parser = argparse.ArgumentParser(
        description=module["__doc__"], formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    groups: dict[str, Any] = {}
    for constant in declared(module):
        default = module[constant.name]
        try:
            _adapter(constant.type).validate_python(default, strict=True)
        except ValidationError as error:
            parser.error(f"{constant.name} = {default!r} in {module['__file__']}: {_reason(error)}")
        if constant.group not in groups:
            groups[constant.group] = parser.add_argument_group(constant.group)
        _add_option(groups[constant.group], constant, default)
    given = {name: tuple(v) if isinstance(v, list) else v for name, v in vars(parser.parse_args(arguments)).items()}
    module.update(given)
    return set(given)


def apply_preset(module: dict[str, Any], preset: dict[str, tuple[Any, Any]]) -> None:
    """Set constants to the values of a preset, except those that the user has set: on the command line, or by editing the script.

    preset: for each constant its default in the script and its value in the preset.
    """
    for name, (default, value) in preset.items():
        if name not in GIVEN and module[name] == default:
            module[name] = value


def preset_option(preset: str) -> str:
    """The option that continues with the same preset in the next stage; none for the default."""
    return "" if preset == "ours" else f" --preset {preset}"


def constants(module: dict[str, Any]) -> dict[str, Any]:
    """Present values of the constants of a script, to be stored with its output."""
    return {constant.name: module[constant.name] for constant in declared(module)}


def declared(module: dict[str, Any]) -> list[Constant]:
    """The constants of a script, with their types, headings and comments."""
    source = Path(module["__file__"]).read_text(encoding="utf-8")
    kinds = module.get("__annotations__", {})
    return [
        Constant(name, kinds.get(name) or _type_of(module[name]), group, comment)
        for name, _, group, comment in _assignments(source)
    ]


def defaults(source: str) -> dict[str, tuple[Any, str]]:
    """Value and comment of every constant in the text of a script, which is not run."""
    return {name: (ast.literal_eval(value), comment) for name, value, _, comment in _assignments(source)}


def _assignments(source: str) -> list[tuple[str, ast.expr, str, str]]:
    """UPPER_CASE assignments at the top level, in order: name, value, heading, comment."""
    lines, assignments, heading, after = source.split("\n"), [], "constants", 0
    for node in ast.parse(source).body:
        target = node.target if isinstance(node, ast.AnnAssign) else getattr(node, "targets", [None])[0]
        if isinstance(target, ast.Name) and target.id.isupper():
            comments = []
            for number in range(after, node.lineno - 1):
                if lines[number].startswith("#"):
                    if lines[number - 1].strip():
                        comments.append(lines[number])
                    else:
                        heading = lines[number].strip("# ")
            comments += re.findall("  (# .*)$", "\n".join(lines[node.lineno - 1 : node.end_lineno]), re.MULTILINE)
            comment = " ".join(text.strip("# ") for text in comments)
            assignments.append((target.id, node.value, heading, comment))  # type: ignore[attr-defined]
        after = node.end_lineno or 0
    return assignments


def _type_of(value: Any) -> Any:
    return tuple[type(value[0]), ...] if isinstance(value, tuple) and value else type(value)  # type: ignore[misc]


def _adapter(kind: Any) -> TypeAdapter:
    return TypeAdapter(kind, config=ConfigDict(allow_inf_nan=False))


def _reason(error: ValidationError) -> str:
    """What pydantic expected."""
    return " or ".join(dict.fromkeys(one["msg"].replace("Input should be", "expected") for one in error.errors()))


def _parser_of(kind: Any):
    """A function from one word of the command line to a value of the type."""
    adapter, may_be_none = _adapter(kind), types.NoneType in get_args(kind)

    def parse(word: str) -> Any:
        if may_be_none and word.lower() == "none":
            return None
        try:
            return adapter.validate_python(word)
        except ValidationError as error:
            raise argparse.ArgumentTypeError(f"got {word!r}; {_reason(error)}") from None

    return parse


def _add_option(group: Any, constant: Constant, default: Any) -> None:
    shown = " ".join(map(str, default)) if isinstance(default, tuple) else "none" if default is None else default
    arguments: dict[str, Any] = {"dest": constant.name, "default": argparse.SUPPRESS}
    arguments["help"] = f"{constant.comment} [{shown}]".strip().replace("%", "%%")
    if constant.type is bool:
        arguments["action"] = argparse.BooleanOptionalAction
    elif get_origin(constant.type) is tuple:
        items = get_args(constant.type)
        arguments |= {"nargs": "*" if items[-1] is Ellipsis else len(items), "type": _parser_of(items[0])}
        arguments["metavar"] = "VALUE"
    else:
        arguments |= {"type": _parser_of(constant.type), "metavar": constant.name.split("_")[-1]}
    group.add_argument("--" + constant.name.lower().replace("_", "-"), **arguments)
