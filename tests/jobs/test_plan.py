from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.jobs.helpers import run_here

JOB = Path(__file__).parents[2] / "jobs" / "plan.py"


def run(*flags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(JOB), *flags], capture_output=True, text=True, check=False)


def test_a_plan_shows_whether_it_fits_its_memory_by_kind_and_its_time() -> None:
    job = run("--preset", "llama-tiny", "--gpus", "2", "--gpu-memory", "24GB", "--tokens", "1e9")
    assert job.returncode == 0, job.stderr
    assert "It fits: " in job.stdout
    for word in (
        "parameters",
        "gradients",
        "optimizer",
        "activations",
        "communication",
        "40% of 989",
        "overlapped",
        "days",
    ):
        assert word in job.stdout


def test_a_run_that_does_not_fit_is_told_the_flags_of_one_that_does() -> None:
    shape = ("--preset", "llama-30m", "--gpus", "1", "--gpu_memory", "2.4GiB", "--batch_size", "32")
    job = run(*shape, "--seq_len", "256")
    assert job.returncode == 0, job.stderr
    assert "It does not fit" in job.stdout
    assert "nearest configuration that fits: --" in job.stdout


def test_an_unreadable_size_is_refused_in_one_line() -> None:
    job = run_here("plan.py", "--preset", "llama-tiny", "--gpus", "2", "--gpu_memory", "plenty")
    assert job.returncode == 2
    assert job.stderr == "error: gpu_memory is 'plenty'; write a number and a unit, such as 80GiB or 24GB\n"
