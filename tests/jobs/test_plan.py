from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

from tests.jobs.helpers import run_here
from tests.token_data import write_dataset

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


def test_stages_have_a_line_each_and_the_run_a_sum() -> None:
    stages = [
        {"from_step": 1, "seq_len": 32, "batch_tokens": 2048},
        {"from_step": 101, "seq_len": 128, "weights": {"web": 3, "code": 1}},
    ]
    shape = ("--preset", "llama-tiny", "--seq_len", "128", "--gpus", "2", "--gpu-memory", "24GB")
    job = run(*shape, "--batch_size", "32", "--max_steps", "400", "--stages", json.dumps(stages))
    assert job.returncode == 0, job.stderr
    assert "From step 1: 64 sequences of 32 tokens, 0.00 s a step; 100 steps take" in job.stdout
    assert "From step 101: 16 sequences of 128 tokens (code 0.25, web 0.75)" in job.stdout
    assert "The run: 400 steps, 8.19e+05 tokens," in job.stdout


def test_repetitions_are_refused_when_the_run_is_planned(tmp_path: Path) -> None:
    data = write_dataset(tmp_path / "data")
    job = run_here(
        "plan.py", "--preset", "llama-tiny", "--gpus", "1", "--gpu_memory", "24GB", "--seq_len", "32",
        "--data", f"web={data}:1", f"code={data}:3",
        "--batch_size", "8", "--max_steps", "400", "--max_repetitions", "2",
    )  # fmt: skip
    assert job.returncode == 2
    assert re.search(
        r"max_repetitions is 2; up to step 400 the run goes \d+.\d\d times through source code", job.stderr
    )


def test_an_unreadable_size_is_refused_in_one_line() -> None:
    job = run_here("plan.py", "--preset", "llama-tiny", "--gpus", "2", "--gpu_memory", "plenty")
    assert job.returncode == 2
    assert job.stderr == "error: gpu_memory is 'plenty'; write a number and a unit, such as 80GiB or 24GB\n"


def test_adapters_are_planned_beside_frozen_weights() -> None:
    cluster = ("--preset", "llama-7b", "--gpus", "1", "--gpu-memory", "24GiB", "--seq_len", "512")
    job = run(*cluster, "--lora_rank", "16", "--lora-targets", "q_proj,v_proj", "down_proj")
    assert job.returncode == 0, job.stderr
    adapters = 32 * 16 * (2 * (4096 + 4096) + 11008 + 4096)
    assert f"6,738,415,616 parameters and {adapters:,} of adapters" in job.stdout
    assert "It fits" in job.stdout
    # The weights in bf16 and the adapters in fp32, with two averages for each of the latter.
    assert f"parameters     {(2 * 6_738_415_616 + 4 * adapters) / 2**30:8.2f} GiB" in job.stdout
    assert f"optimizer      {8 * adapters / 2**30:8.2f} GiB" in job.stdout
    assert "It does not fit" in run(*cluster).stdout
