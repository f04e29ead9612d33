from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from llama_ray.model.config import LlamaConfig
from llama_ray.model.config_files import config_files
from llama_ray.orchestration.launch import LaunchConfig
from llama_ray.storage.run_directory import MARKER
from llama_ray.training.checkpointing.progress import Progress
from llama_ray.training.config import TrainConfig
from tests.jobs.helpers import run_here
from tests.token_data import write_dataset

JOB = Path(__file__).parents[2] / "jobs" / "train.py"


def run(*flags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(JOB), *flags],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"COLUMNS": "120"},
    )


@pytest.fixture(scope="module")
def help_text() -> str:
    job = run("--help")
    assert job.returncode == 0, job.stderr
    return job.stdout


@pytest.mark.parametrize("kind", [LlamaConfig, TrainConfig, LaunchConfig])
def test_every_setting_is_a_flag_with_a_sentence_of_help(kind: type, help_text: str) -> None:
    described = dict(
        re.findall(r"^  --(\w+) \S+(?: \[\S+ \.\.\.\])?\s+([A-Z0-9a-z].*)$", help_text, re.MULTILINE)
    )
    for field in dataclasses.fields(kind):
        assert len(described[field.name].split()) > 1, f"--{field.name} has no help"


def test_help_shows_no_type_expressions(help_text: str) -> None:
    assert "type: " not in help_text
    assert "default: null" not in help_text


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("nowhere", "nowhere is not a prepared dataset"),
    ],
)
def test_data_that_cannot_be_read_is_one_line_before_ray_starts(
    data: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    job = run_here("train.py", "--data", data)
    assert job.returncode == 2
    assert message in job.stderr
    assert job.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["a={0}:1", "b={1}:2"],
            r"error: source b \(.*two\) has another tokenizer \(\w+\) than source a .*--tokenizer",
        ),
        (["a={0}:1", "b={0}"], "error: data has no weight for source b; give all sources a weight, or none"),
        (["{0}", "{1}"], "error: data has several sources, and '.* has no name; write NAME=DIR"),
        (["a={0}", "b={0}#lab"], "error: .* has no source 'lab'; choose one of test"),
        (["a={0}", "b=nowhere"], "error: .*nowhere is not a prepared dataset"),
    ],
)
def test_sources_that_make_no_mixture_are_one_line_before_ray_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: list[str], message: str
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    one, two = write_dataset(tmp_path / "one"), write_dataset(tmp_path / "two", vocab_size=300)
    job = run_here("train.py", "--data", *(flag.format(one, two) for flag in flags))
    assert job.returncode == 2
    assert re.match(message, job.stderr)
    assert job.stderr.count("\n") == 1


def test_sources_and_stages_are_read_from_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are refused for the stage alone, whose source is not among those of the file."""
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    data = write_dataset(tmp_path / "data")
    settings = tmp_path / "settings.yaml"
    settings.write_text(
        f"data:\n  web: {data}:0.7\n  code: {{location: {data}, weight: 0.3, label: test}}\n"
        "stages:\n  - {from_step: 5, seq_len: 64}\n  - {from_step: 9, weights: {code: 1, math: 1}}\n"
    )
    job = run_here("train.py", "--config", str(settings))
    assert job.stderr == (
        "error: the stage from step 9 has a weight for 'math'; the sources are code, web; correct the name, or give "
        "that source with --data\n"
    )


def test_an_unusable_number_of_workers_is_one_line_before_ray_starts() -> None:
    job = run_here("train.py", "--world_size", "8..2")
    assert job.returncode == 2
    assert job.stderr == (
        "error: world_size is 8..2; it must be a number from 1 up, or a range such as 2..8\n"
    )


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("learning_rate", ".nan", "learning_rate is nan; it must be above 0"),
        ("beta1", "1", "beta1 is 1.0; it must be at least 0 and below 1"),
        ("z_loss", "1e400", "z_loss is inf; it must be at most 3.4e+38"),
        ("seed", str(2**64), f"seed is {2**64}; it must be at most {2**63 - 1}"),
        ("world_size", f"1..{2**64}", f"world_size is {2**64}; it must be at most 131072"),
        ("norm_eps", ".inf", "norm_eps is inf; it must be above 0 and at most 1"),
    ],
)
def test_a_number_out_of_range_is_one_line_from_flags_and_from_a_file(
    tmp_path: Path, name: str, value: str, message: str
) -> None:
    settings = tmp_path / "settings.yaml"
    settings.write_text(f"{name}: {value}\n")
    for flags in ((f"--{name}", value), ("--config", str(settings))):
        job = run_here("train.py", *flags)
        assert (job.returncode, job.stderr) == (2, f"error: {message}\n")


def test_a_tuned_run_that_resumes_knows_what_it_began_with(tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoints" / "tuned" / "step_00000001"
    checkpoint.mkdir(parents=True)
    for name, text in config_files(LlamaConfig.preset("llama-tiny"), torch.float32).items():
        (checkpoint / name).write_text(text)
    marker = Progress(step=1, parent="models:/base/1").marker("tuned", 1, {})
    (checkpoint / MARKER).write_text(marker)
    flags = ("--task", "sft", "--output_dir", str(tmp_path / "checkpoints"))
    resumed = run_here("train.py", *flags, "--resume", "tuned")
    assert resumed.stderr.startswith("error: data is missing; task sft needs data")
    begun = run_here("train.py", *flags, "--run_name", "other")
    assert "it needs a model to tune; give it with --init_from REF" in begun.stderr
