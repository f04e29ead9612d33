from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

JOBS = Path(__file__).parents[2] / "jobs"
SCRIPT = """
import sys
sys.path.insert(0, sys.argv.pop(1))
from typing import Literal
from _cli import main, parse
from jsonargparse import ArgumentParser

def job():
    parser = ArgumentParser()
    parser.add_argument("--batch_size", type=int, default=1)
    parser.add_argument("--prompt", default="")
    parser.add_argument("--fast", type=bool, default=False)
    parser.add_argument("--kind", type=Literal["a", "b"] | None)
    parser.add_argument("--data", type=list[str] | str | None)
    parser.add_argument("rest", nargs="*")
    flags = parse(parser, lists=["data"])
    if flags.prompt == "fail":
        raise ValueError("two\\nlines")
    if flags.prompt == "file":
        open("x" * 300)
    if flags.prompt == "bug":
        raise RuntimeError("bug at http://user:hidden@host")
    print(flags.batch_size, flags.prompt, flags.rest, *filter(None, [flags.fast, flags.data]))

main(job)
"""


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", SCRIPT, str(JOBS), *arguments], capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("flag", ["--batch_size", "--batch-size"])
def test_flags_may_have_dashes_and_values_keep_theirs(flag: str) -> None:
    assert run(flag, "3", "--prompt=--a-b=c-d").stdout == "3 --a-b=c-d []\n"
    assert run(f"{flag}=3", "--prompt", "a-b", "c-d", "--", "--e-f").stdout == "3 a-b ['c-d', '--e-f']\n"


@pytest.mark.parametrize("flags", [["--fast"], ["--fast", "true"], ["--fast=true"]])
def test_a_boolean_flag_without_a_value_means_true(flags: list[str]) -> None:
    assert run(*flags, "--batch_size", "3").stdout == "3  [] True\n"
    assert run("--batch_size", "3", *flags).stdout == "3  [] True\n"


@pytest.mark.parametrize(
    ("flags", "data"),
    [
        (["--data", "a"], "a"),
        (["--data=a=b:1"], "a=b:1"),
        (["--data", "a", "b"], "['a', 'b']"),
        (["--data", "a", "--batch-size=1", "--data=b", "c", "--", "rest"], "['a', 'b', 'c']"),
    ],
)
def test_a_flag_for_a_list_takes_one_value_or_several(flags: list[str], data: str) -> None:
    assert run(*flags).stdout.endswith(f"] {data}\n")


def test_no_flags_are_the_defaults() -> None:
    assert run().stdout == "1  []\n"


def test_user_errors_give_one_line_and_exit_code_2() -> None:
    for arguments, message in (
        (["--prompt", "fail"], "error: two lines\n"),
        (["--prompt", "file"], f"error: File name too long: '{'x' * 30}"),
        (["--batch-size", "x"], "error: --batch_size is x; it must be int (--help"),
        (["--fast", "maybe"], "error: --fast is maybe; it must be bool (--help"),
        (["--kind", "c"], "error: --kind is c; it must be a or b (--help"),
        (["--nonsense", "x"], "error: unrecognized arguments: --nonsense"),
        (["--batch-size", "s3://key:hidden@b"], "error: --batch_size is s3://***@b; it must be int (--help"),
    ):
        failed = run(*arguments)
        assert failed.returncode == 2
        assert failed.stderr.startswith(message)
        assert failed.stderr.count("\n") == 1


def test_bugs_keep_their_traceback() -> None:
    failed = run("--prompt", "bug")
    assert failed.returncode == 1
    assert "Traceback" in failed.stderr
    assert failed.stderr.endswith("RuntimeError: bug at http://***@host\n")
