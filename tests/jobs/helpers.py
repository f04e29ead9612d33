"""A job's script, in a process of its own or, where it ends before any work begins, in this one."""

from __future__ import annotations

import contextlib
import io
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path
from subprocess import CompletedProcess

JOBS = Path(__file__).parents[2] / "jobs"


def run_here(job: str, *flags: str, cwd: Path | None = None) -> CompletedProcess[str]:
    """Run `jobs/NAME` as its own `__main__` in this process, which saves the seconds that its imports take."""
    output, errors = io.StringIO(), io.StringIO()
    with (
        _command_line([str(JOBS / job), *flags]),
        contextlib.chdir(cwd or Path.cwd()),
        contextlib.redirect_stdout(output),
        contextlib.redirect_stderr(errors),
    ):
        try:
            runpy.run_path(str(JOBS / job), run_name="__main__")
            code: object = None
        except SystemExit as end:
            code = end.code
    assert isinstance(code, int), "a job ends with an exit code"
    return CompletedProcess([job, *flags], code, output.getvalue(), errors.getvalue())


@contextlib.contextmanager
def _command_line(argv: list[str]) -> Iterator[None]:
    before = sys.argv, sys.path
    sys.argv, sys.path = argv, [str(JOBS), *sys.path]
    try:
        yield
    finally:
        sys.argv, sys.path = before
