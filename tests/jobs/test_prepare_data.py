from __future__ import annotations

import dataclasses
import itertools
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from llama_ray.data.dataset.info import read_info
from llama_ray.data.preparing.config import PrepareConfig
from llama_ray.data.preparing.prepare import prepare

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


@pytest.mark.ray
def test_a_preparation_that_ends_early_goes_on_with_the_parts_that_are_not_done(
    tmp_path: Path, ray_cluster: str
) -> None:
    flags = {"vocab_size": 512, "max_bytes": 4_000_000, "shard_bytes": 400_000, "workers": 1}
    config = PrepareConfig(["builtin"], str(tmp_path / "data"), **flags)
    whole = prepare(dataclasses.replace(config, output=str(tmp_path / "whole")), lambda line: None)
    done = end_early(signal.SIGINT, config, flags, ray_cluster)
    assert 1 <= len(done) < len(whole.splits["train"])
    done |= end_early(signal.SIGKILL, config, flags, ray_cluster, at_least=len(done))
    lines: list[str] = []
    assert prepare(config, lines.append) == whole
    assert was_done(lines) >= len(done)
    assert {file: (tmp_path / "data" / file).stat().st_mtime_ns for file in done} == done


def end_early(
    end: signal.Signals, config: PrepareConfig, flags: dict[str, int], cluster: str, at_least: int = 0
) -> dict[str, int]:
    """Send a signal after a part is done; return when the training shards of the parts that were done were written."""
    command = [sys.executable, str(JOB), "--source", *config.source, "--output", config.output]
    command += [f"--{name}={value}" for name, value in flags.items()]
    pipe = subprocess.PIPE
    with subprocess.Popen(
        command, env={**os.environ, "RAY_ADDRESS": cluster}, stdout=pipe, stderr=pipe, text=True
    ) as job:
        assert job.stdout is not None
        lines = list(itertools.takewhile(lambda line: not line.startswith("tokenised"), job.stdout))
        job.send_signal(end)
        rest, errors = job.communicate(timeout=60)
    [staging] = Path(config.output).glob(".partial-*")
    assert was_done(lines) >= at_least
    if end is signal.SIGINT:
        assert job.returncode == 130, errors
        assert rest.endswith(f"stopped; the same command goes on from {staging}\n")
    done = [path.stem.removeprefix("tokenised-") for path in (staging / "work").glob("tokenised-*.json")]
    return {f"train-{part}.bin": (staging / f"train-{part}.bin").stat().st_mtime_ns for part in done}


def was_done(lines: list[str]) -> int:
    found = re.search(r"going on: (\d+) of \d+ parts were tokenised before", "".join(lines))
    return int(found[1]) if found else 0


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
        (["--source", "nowhere", "--output", "a"], "no text found in"),
        (
            ["--source", "builtin", "builtin", "--output", "a"],
            "2 sources are named builtin; each must have a name of its own; write --source NAME=WHERE",
        ),
        (["--source", "builtin", "--output", "a", "--clean", "c4,c5"], "clean is 'c5'; choose among"),
        (["--config", "{tmp}/flags.yaml"], "no text found in '{tmp}/b'"),
    ],
)
def test_invalid_flags_give_one_line_and_start_no_cluster(
    tmp_path: Path, arguments: list[str], message: str
) -> None:
    (tmp_path / "flags.yaml").write_text("source: [b, a=c]\noutput: data\nclean: [c4]\nmax_bytes: 7\n")
    arguments = [argument.format(tmp=tmp_path) for argument in arguments]
    message = message.format(tmp=tmp_path)
    failed = run(*arguments, cwd=tmp_path, RAY_ADDRESS="127.0.0.1:1")
    assert failed.returncode == 2
    assert failed.stderr.startswith("error: ")
    assert message in failed.stderr
    assert failed.stderr.count("\n") == 1
    assert failed.stdout == ""
