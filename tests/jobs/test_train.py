from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from llama_ray.model.config import LlamaConfig
from llama_ray.orchestration.launch import LaunchConfig
from llama_ray.training.config import TrainConfig
from tests.jobs.helpers import run_here

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
    described = dict(re.findall(r"^  --(\w+) \S+\s+([A-Z0-9a-z].*)$", help_text, re.MULTILINE))
    for field in dataclasses.fields(kind):
        assert len(described[field.name].split()) > 1, f"--{field.name} has no help"


def test_help_shows_no_type_expressions(help_text: str) -> None:
    assert "type: " not in help_text
    assert "default: null" not in help_text


def test_an_unusable_number_of_workers_is_one_line_before_ray_starts() -> None:
    job = run_here("train.py", "--world_size", "8..2")
    assert job.returncode == 2
    assert job.stderr == (
        "error: world_size is 8..2; it must be a number from 1 up, or a range such as 2..8\n"
    )
