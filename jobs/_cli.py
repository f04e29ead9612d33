"""The command line of all jobs: reading flags, and one line instead of a traceback for the user's errors."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import sys
import traceback
from collections.abc import Callable, Collection, Sequence
from typing import Any, NoReturn, TypeVar, get_args, get_type_hints

from docstring_parser import parse as parse_docstring
from jsonargparse import ArgumentError, ArgumentParser, Namespace

from llama_ray.utils.fields import shown
from llama_ray.utils.redact import redact

T = TypeVar("T")

SHAPE_FLAGS = (
    "vocab_size",
    "hidden_size",
    "num_layers",
    "num_heads",
    "num_kv_heads",
    "intermediate_size",
)
"""Sizes of a model that have a flag each."""

_UNITS = {
    "B": 1,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "MIB": 1024**2,
    "GIB": 1024**3,
    "TIB": 1024**4,
}


def parse(
    parser: ArgumentParser, argv: Sequence[str] | None = None, *, lists: Collection[str] = ()
) -> Namespace:
    """Parse `argv`, by default the command line.

    Flags may be written with dashes or with underscores, and a boolean flag without a value means true. A flag in
    `lists` takes one value or several, and may be repeated. Raises ValueError, with one line, for an unknown flag or an
    invalid value.
    """
    parser.exit_on_error = False
    argv = _underscored(sys.argv[1:] if argv is None else argv)
    booleans = {
        f"--{name}" for name, default in vars(parser.get_defaults()).items() if isinstance(default, bool)
    }
    try:
        return parser.parse_args(_with_lists(_with_true(argv, booleans), lists))
    except ArgumentError as error:
        raise ValueError(f"{_plain(str(error))} (--help lists all flags)") from error


def add_config(parser: ArgumentParser) -> None:
    """Let flags stand in a file, too."""
    parser.add_argument(
        "--config", action="config", metavar="FILE", help="YAML file of flags; flags given here override it."
    )


def from_flags(kind: type[T], flags: Namespace, **values: Any) -> T:
    """Make a dataclass from the flags named like its fields; `values` replace flags and give fields without a flag."""
    given = {field.name: flags[field.name] for field in dataclasses.fields(kind) if field.name in flags}
    return kind(**(given | values))


def add_fields(parser: ArgumentParser, kind: type, skip: Collection[str] = ()) -> None:
    """Add a flag for each field of a dataclass but those in `skip`; a list takes several values and may be repeated."""
    described = descriptions(kind)
    lists = list_fields(kind)
    for name in (name for name in lists if name not in skip):
        help = f"{described[name]} Takes several values, and may be repeated."
        parser.add_argument(f"--{name}", action="extend", nargs="+", type=str, metavar="VALUE", help=help)
    parser.add_class_arguments(kind, skip={*lists, *skip})


def list_fields(kind: type) -> list[str]:
    """Return the fields of a dataclass that hold several texts."""
    hints = get_type_hints(kind)
    return [name for name, hint in hints.items() if {list[str], tuple[str, ...]} & {hint, *get_args(hint)}]


def descriptions(kind: type) -> dict[str, str]:
    """Return what the docstring of a dataclass says of each field."""
    documented = parse_docstring(kind.__doc__ or "").params
    return {param.arg_name: param.description or "" for param in documented}


def split_commas(flags: Namespace, names: Collection[str]) -> None:
    """Divide the values of flags that may be separated by commas, too."""
    for name in names:
        if flags[name] is not None:
            flags[name] = [value for given in flags[name] for value in given.split(",") if value]


def main(job: Callable[[], None]) -> NoReturn:
    """Run `job` and exit: with code 0, 130 after Ctrl-C, or 2 and one line `error: ...` on stderr for a ValueError.

    An OSError that names a file is the user's, too: a name that is too long, a full disk, a missing permission. Other
    exceptions are bugs or outages: they show their traceback, in which a library may have quoted a URI.
    """
    try:
        job()
    except ValueError as error:
        _refuse(str(error))
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        if isinstance(error, OSError) and error.filename is not None:
            _refuse(f"{error.strerror}: {shown(str(error.filename))}")
        print(redact(traceback.format_exc()), end="", file=sys.stderr, flush=True)
        sys.exit(1)
    sys.exit(0)


def _refuse(message: str) -> NoReturn:
    print("error:", " ".join(redact(message).split()), file=sys.stderr, flush=True)
    sys.exit(2)


def read_bytes(text: str, flag: str) -> int:
    """Return the bytes that `text` means: `80GiB`, `80 GB` or a plain number. Else raises ValueError with the flag."""
    match = re.fullmatch(r"\s*([0-9]+\.?[0-9]*|\.[0-9]+)\s*([a-zA-Z]*)\s*", text)
    size = float(match[1]) * _UNITS.get(match[2].upper() or "B", math.nan) if match else math.nan
    if math.isfinite(size):
        return int(size)
    raise ValueError(f"{flag} is {shown(text)}; write a number and a unit, such as 80GiB or 24GB")


def _underscored(argv: Sequence[str]) -> list[str]:
    """Replace dashes in the names of flags but not in values: `--batch-size=a-b` becomes `--batch_size=a-b`."""
    normal: list[str] = []
    for position, argument in enumerate(argv):
        if argument == "--":
            return [*normal, *argv[position:]]
        name, equals, value = argument.partition("=")
        if name.startswith("--"):
            name = "--" + name[2:].replace("-", "_")
        normal.append(name + equals + value)
    return normal


def _with_true(argv: Sequence[str], booleans: Collection[str]) -> list[str]:
    """Turn a boolean flag without a value into `--flag=true`."""
    following = [*argv[1:], "--"]
    return [
        f"{flag}=true" if flag in booleans and after.startswith("--") else flag
        for flag, after in zip(argv, following, strict=False)
    ]


def _with_lists(argv: Sequence[str], names: Collection[str]) -> list[str]:
    """Turn all values of a flag in `names` into one, as a JSON list where there are several."""
    rest: list[str] = []
    last: Sequence[str] = ()
    values: dict[str, list[str]] = {}
    current: list[str] | None = None
    for position, argument in enumerate(argv):
        if argument == "--":
            last = argv[position:]
            break
        flag, equals, value = argument.partition("=")
        if argument.startswith("--"):
            current = values.setdefault(flag, []) if flag[2:] in names else None
            if current is None:
                rest.append(argument)
            elif equals:
                current.append(value)
        elif current is None:
            rest.append(argument)
        else:
            current.append(argument)
    flags = [f"{flag}={given[0] if len(given) == 1 else json.dumps(given)}" for flag, given in values.items()]
    return [*rest, *flags, *last]


def _plain(message: str) -> str:
    """Rewrite jsonargparse's message about a value as `--NAME is VALUE; it must be TYPE`."""
    name = re.match(r'Parser key "(.+?)":', message)
    value = re.search(r"(?:Given|Got) value: (.*)", message)
    types = re.findall(r"Expected an? (?:typing\.Literal\[(.+?)\]|<class '(.+?)'>)", message)
    if name is None or value is None or not types:
        return message
    allowed = [
        literal.replace("'", "").replace(", ", " or ") or kind
        for literal, kind in types
        if kind != "NoneType"
    ]
    return f"--{name[1]} is {value[1]}; it must be {' or '.join(allowed)}"
