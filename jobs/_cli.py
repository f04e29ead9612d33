"""The command line of all jobs: reading flags, and one line instead of a traceback for the user's errors."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from jsonargparse import ArgumentError, ArgumentParser, Namespace

_UNITS = {
    "B": 1,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "MIB": 1024**2,
    "GIB": 1024**3,
    "TIB": 1024**4,
}


def parse(parser: ArgumentParser, argv: Sequence[str] | None = None) -> Namespace:
    """Parse `argv`, by default the command line; flags may be written with dashes or with underscores.

    Raises ValueError, with one line, for an unknown flag or an invalid value.
    """
    parser.exit_on_error = False
    try:
        return parser.parse_args(_underscored(sys.argv[1:] if argv is None else argv))
    except ArgumentError as error:
        raise ValueError(f"{error} (--help lists all flags)") from error


def main(job: Callable[[], None]) -> NoReturn:
    """Run `job` and exit: with code 0, 130 after Ctrl-C, or 2 and one line `error: ...` on stderr for a ValueError."""
    try:
        job()
    except ValueError as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr, flush=True)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    sys.exit(0)


def read_bytes(text: str, flag: str) -> int:
    """Return the bytes that `text` means: `80GiB`, `80 GB` or a plain number. Else raises ValueError with the flag."""
    match = re.fullmatch(r"\s*([\d.]+)\s*([a-zA-Z]*)\s*", text)
    if match and match[1].count(".") < 2 and (unit := match[2].upper() or "B") in _UNITS:
        return int(float(match[1]) * _UNITS[unit])
    raise ValueError(f"{flag} is {text!r}; write a number and a unit, such as 80GiB or 24GB")


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
