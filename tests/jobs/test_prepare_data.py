from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from llama_ray.data.dataset.info import read_info

JOB = Path(__file__).parents[2] / "jobs" / "prepare_data.py"


def run(*arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(JOB), *arguments],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.mark.ray
def test_the_builtin_corpus_becomes_a_dataset(tmp_path: Path, ray_cluster: str) -> None:
    done = run(
        "--source", "builtin", "--output", "data", "--vocab-size=512", "--max-bytes", "500000",
        cwd=tmp_path, RAY_ADDRESS=ray_cluster,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    info = read_info(tmp_path / "data")
    assert info.vocab_size == 512
    assert info.source == "builtin"
    assert info.tokens("train") > 50_000
    assert info.tokens("validation") > 0
    assert "training a tokenizer of 512 entries" in done.stdout
    assert f"{info.tokens('train'):,} training and" in done.stdout.splitlines()[-1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--source", "builtin"], "the following arguments are required: output"),
        (["--source", "builtin", "--output", "a", "--sauce", "b"], "unrecognized arguments: --sauce"),
        (
            ["--source", "builtin", "--output", "a", "--vocab-size", "9"],
            "vocab_size is 9; it must be at least 258",
        ),
        (
            ["--source", "builtin", "--output", "a", "--vocab_size", "300", "--tokenizer", "t"],
            "not allowed with",
        ),
    ],
)
def test_invalid_flags_give_one_line_and_start_no_cluster(
    tmp_path: Path, arguments: list[str], message: str
) -> None:
    failed = run(*arguments, cwd=tmp_path, RAY_ADDRESS="127.0.0.1:1")
    assert failed.returncode == 2
    assert failed.stderr.startswith("error: ")
    assert message in failed.stderr
    assert failed.stderr.count("\n") == 1
    assert failed.stdout == ""
