"""The constants at the top of a stage script are also its command-line options.

A stage declares `EPOCHS = 300  # passes over the data`; `python stage.py --epochs 50` sets it for one run. A comment on a line of
its own above a block of constants is the heading of that block in `--help`; the comment beside a constant is its help text.
A constant whose value does not show its type (None, a choice) has an annotation: `BULK_FILE: str | None = None`. A type of
`lib.ranges` declares the values that are allowed: `EPOCHS: Count = 300`. They are checked here and nowhere else.
"""

import argparse
import ast
import io
import math
import sys
import tokenize
import traceback
import types
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, NoReturn, Union, get_args, get_origin

from lib import log, runs
from lib.ranges import Range
from lib.runs import ROOT

DESCRIPTIONS = {types.NoneType: "none", bool: "True or False", int: "a whole number", float: "a number", str: "text"}


class Constant(NamedTuple):
    name: str
    type: Any
    group: str
    comment: str


GIVEN: set[str] = set()  # constants that were set on the command line of this process


def run(module: dict[str, Any]) -> None:
    """Run a stage: set its constants from the command line, then call its `main()`.

    Errors of the user's data, files and computer are printed in one line, and the process exits with 1; after a signal with 128
    plus its number. Errors of the program keep their traceback.
    """
    GIVEN.update(from_command_line(module))
    try:
        with (
            runs.started(Path(module["__file__"]).name, lambda: constants(module)),
            log.to_file(ROOT / Path(module.get("DATA_DIR", "data")).expanduser(), runs.invocation()["command"]),
        ):
            module["main"]()
    except runs.Stopped as stopped:
        end(
            f"stopped by {stopped}; files that were complete stay, and running the stage again is safe",
            128 + stopped.number,
        )
    except (ValueError, OSError) as error:
        end(f"error: {error}\n(from {_place(error)})", 1)
    except Exception as error:
        if not (
            isinstance(error, MemoryError) or "OutOfMemory" in type(error).__name__ or "allocate memory" in str(error)
        ):
            raise
        remedy = "lower MEMORY_GB, BATCH_SIZE or the number of cells, or use a computer with more memory"
        end(
            f"error: the memory is not enough ({error or 'no more could be allocated'}): {remedy}\n(from {_place(error)})",
            1,
        )


def end(message: str, status: int) -> NoReturn:
    """Print the last words of a stage and exit."""
    print(f"\n{message}", file=sys.stderr)
    sys.exit(status)


def _place(error: BaseException) -> str:
    """File and line of the project where an error was raised."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [f for f in frames if f.filename.startswith(str(ROOT)) and "site-packages" not in f.filename]
    return f"{ours[-1].filename}, line {ours[-1].lineno}" if ours else "the program"


def from_command_line(module: dict[str, Any], arguments: list[str] | None = None) -> set[str]:
    """Set the UPPER_CASE constants of a script from the command line; returns the names of those that were given.

    Parameters
    ----------
    module
        `globals()` of the script; its constants are replaced in place.
    arguments
        Words of the command line; None: those of this process.

    Raises
    ------
    SystemExit
        For an unknown option, a value of a wrong type, a constant edited to a wrong type, and for `--help`.
    """
    declared = _declared(module)
    parser = argparse.ArgumentParser(
        description=module["__doc__"], formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    groups = {}
    for constant in declared:
        default = module[constant.name]
        if not _fits(default, constant.type):
            parser.error(f"{constant.name} = {default!r} in {module['__file__']} is not {_describe(constant.type)}")
        if constant.group not in groups:
            groups[constant.group] = parser.add_argument_group(constant.group)
        _add_option(groups[constant.group], constant, default)
    given = vars(parser.parse_args(arguments))
    module.update(given)
    return set(given)


def apply_preset(module: dict[str, Any], preset: dict[str, tuple[Any, Any]]) -> None:
    """Set constants to the values of a preset, except those that the user has set: on the command line, or by editing the script.

    Parameters
    ----------
    preset
        For each constant its default in the script and its value in the preset.
    """
    for name, (default, value) in preset.items():
        if name not in GIVEN and module[name] == default:
            module[name] = value


def preset_option(preset: str) -> str:
    """The option that continues with the same preset in the next stage; none for the default."""
    return "" if preset == "ours" else f" --preset {preset}"


def constants(module: dict[str, Any]) -> dict[str, Any]:
    """Present values of the constants of a script, to be stored with its output."""
    return {constant.name: module[constant.name] for constant in _declared(module)}


def _declared(module: dict[str, Any]) -> list[Constant]:
    with open(module["__file__"], encoding="utf-8") as file:
        return read_constants(file.read(), module)


def read_constants(source: str, module: dict[str, Any]) -> list[Constant]:
    """UPPER_CASE assignments at the top level of a script, in order, with their types, headings and comments."""
    inline: dict[int, str] = {}
    alone: dict[int, str] = {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            text = token.string.lstrip("# ").rstrip()
            (alone if not token.line[: token.start[1]].strip() else inline)[token.start[0]] = text
    found, group = [], "constants"
    last_line = 0
    for node in ast.parse(source).body:
        target = node.target if isinstance(node, ast.AnnAssign) else getattr(node, "targets", [None])[0]
        if isinstance(target, ast.Name) and target.id.isupper():
            headings = [alone[line] for line in range(last_line + 1, node.lineno) if line in alone]
            group = " ".join(headings) or group
            annotation = module.get("__annotations__", {}).get(target.id)
            lines = range(node.lineno, (node.end_lineno or 0) + 1)
            comment = " ".join(inline[line] for line in lines if line in inline)
            found.append(Constant(target.id, annotation or _type_of(module[target.id]), group, comment))
        last_line = node.end_lineno or 0
    return found


def defaults(source: str) -> dict[str, tuple[Any, str]]:
    """Value and comment of every constant in the text of a script, which is not run."""
    values = {}
    for node in ast.parse(source).body:
        target = node.target if isinstance(node, ast.AnnAssign) else getattr(node, "targets", [None])[0]
        if isinstance(target, ast.Name) and target.id.isupper():
            assert isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None
            values[target.id] = ast.literal_eval(node.value)
    return {constant.name: (values[constant.name], constant.comment) for constant in read_constants(source, values)}


def _type_of(value: Any) -> Any:
    if isinstance(value, tuple) and value:
        return tuple[type(value[0]), ...]  # type: ignore[misc]  # a type made at run time
    return type(value)


def _members(kind: Any) -> list[Any]:
    """The alternatives of a union, or the type alone."""
    return list(get_args(kind)) if get_origin(kind) in (Union, types.UnionType) else [kind]


def _split(kind: Any) -> tuple[Any, Range | None]:
    """A type without its range, and the range."""
    return get_args(kind)[:2] if get_origin(kind) is Annotated else (kind, None)


def _fits(value: Any, kind: Any) -> bool:
    for member in _members(kind):
        plain, allowed = _split(member)
        if allowed is not None and _fits(value, plain) and allowed.holds(value):
            return True
        if get_origin(member) is Literal and value in get_args(member):
            return True
        if get_origin(member) is tuple and isinstance(value, tuple):
            items = get_args(member)
            size = len(value) if items[-1] is Ellipsis else len(items)
            return len(value) == size > 0 and all(_fits(item, items[0]) for item in value)
        if member is types.NoneType and value is None:
            return True
        if member is float and isinstance(value, (int, float)) and not isinstance(value, bool):
            return math.isfinite(value)
        if member in (bool, int, str) and type(value) is member:
            return True
    return False


def _describe(kind: Any) -> str:
    names = []
    for member in _members(kind):
        plain, allowed = _split(member)
        if get_origin(member) is Literal:
            names += [repr(choice) for choice in get_args(member)]
        elif get_origin(member) is tuple:
            item, allowed = _split(get_args(member)[0])
            several = "a list" if get_args(member)[-1] is Ellipsis else f"{len(get_args(member))} values"
            names.append(f"{several} of {item.__name__}" + (f", {allowed.words}" if allowed else ""))
        elif allowed is not None:
            names.append(f"{DESCRIPTIONS[plain]}, {allowed.words}")
        else:
            names.append(DESCRIPTIONS.get(member, "one of text, a number, True or False, or a tuple such as (128, 64)"))
    return " or ".join(names)


def _allowed(kind: Any) -> str:
    """The range of a type in words, for --help; "" if it has none."""
    members = [get_args(member)[0] if get_origin(member) is tuple else member for member in _members(kind)]
    return ", ".join(allowed.words for _, allowed in map(_split, members) if allowed is not None)


def _parser_of(kind: Any):
    """A function from one word of the command line to a value of the type."""

    def parse(word: str) -> Any:
        for member in sorted(_members(kind), key=lambda m: m is str):  # text last: it takes everything
            if member is types.NoneType:
                if word.lower() == "none":
                    return None
            elif get_origin(member) is Literal:
                if word in get_args(member):
                    return word
            else:
                try:
                    value = _split(member)[0](word)
                except ValueError:
                    continue
                if _fits(value, member):
                    return value
        raise argparse.ArgumentTypeError(f"got {word!r}, expected {_describe(kind)}")

    return parse


def _add_option(group: Any, constant: Constant, default: Any) -> None:
    option = "--" + constant.name.lower().replace("_", "-")
    shown = (
        " ".join(map(str, default))
        if isinstance(default, tuple)
        else str(default).lower()
        if default is None
        else default
    )
    allowed = _allowed(constant.type)
    text = f"{constant.comment} [{shown}{'; ' * bool(allowed)}{allowed}]".strip().replace("%", "%%")
    arguments = {"dest": constant.name, "default": argparse.SUPPRESS, "help": text}
    if constant.type is bool:
        group.add_argument(option, action=argparse.BooleanOptionalAction, **arguments)
    elif get_origin(constant.type) is tuple:
        items = get_args(constant.type)
        size: Any = "+" if items[-1] is Ellipsis else len(items)
        metavar = _split(items[0])[0].__name__.upper()
        group.add_argument(
            option, nargs=size, type=_parser_of(items[0]), action=_StoreTuple, metavar=metavar, **arguments
        )
    else:
        metavar = constant.name.split("_")[-1]
        group.add_argument(option, type=_parser_of(constant.type), metavar=metavar, **arguments)


class _StoreTuple(argparse.Action):
    def __call__(self, parser, namespace, values, option_string=None):
        setattr(namespace, self.dest, tuple(values))
