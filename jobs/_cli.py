"""What all jobs share: reading flags, and errors as one line instead of a traceback."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from jsonargparse import ArgumentError, ArgumentParser, Namespace


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
