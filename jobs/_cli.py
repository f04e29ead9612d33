"""What all jobs share: reading flags, and errors as one line instead of a traceback."""

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
    """Reads ``argv`` (the command line by default); flags may be written with dashes or with underscores.

    Raises ValueError with one line for a flag or a value that does not fit.
    """
    parser.exit_on_error = False
    try:
        return parser.parse_args(_underscored(sys.argv[1:] if argv is None else argv))
    except ArgumentError as error:
        raise ValueError(f"{error} (--help lists all flags)") from error


def main(job: Callable[[], None]) -> NoReturn:
    """Runs ``job`` and ends the process: exit code 0, or 2 with ``error: ...`` on stderr for a ValueError."""
    try:
        job()
    except ValueError as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr, flush=True)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    sys.exit(0)


def read_bytes(text: str, flag: str) -> int:
    """``80GiB``, ``80 GB`` or plain bytes. Raises ValueError, which names the flag, for anything else."""
    match = re.fullmatch(r"\s*([\d.]+)\s*([a-zA-Z]*)\s*", text)
    if match and match[1].count(".") < 2 and (unit := match[2].upper() or "B") in _UNITS:
        return int(float(match[1]) * _UNITS[unit])
    raise ValueError(f"{flag} is {text!r}; write a number and a unit, such as 80GiB or 24GB")


def _underscored(argv: Sequence[str]) -> list[str]:
    """``--batch-size=a-b`` becomes ``--batch_size=a-b``: names change, values never."""
    normal: list[str] = []
    for position, argument in enumerate(argv):
        if argument == "--":
            return [*normal, *argv[position:]]
        name, equals, value = argument.partition("=")
        if name.startswith("--"):
            name = "--" + name[2:].replace("-", "_")
        normal.append(name + equals + value)
    return normal
