"""What jobs/inspect_data.py prints, and with which exit code."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.jobs.helpers import JOBS, run_here
from tests.token_data import write_dataset

JOB = "inspect_data.py"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("inspect") / "data")


def test_data_is_shown_without_torch_and_ray_because_they_take_seconds(data: Path) -> None:
    modules = "import runpy, sys\ntry: runpy.run_path(sys.argv[0], run_name='__main__')\nfinally: print(*sys.modules)"
    command = [
        sys.executable,
        "-c",
        f"import sys; sys.argv = sys.argv[1:]; sys.path.insert(0, {str(JOBS)!r})\n{modules}",
    ]
    job = subprocess.run([*command, str(JOBS / JOB), str(data)], capture_output=True, text=True, check=True)
    *lines, loaded = job.stdout.splitlines()
    assert any(line.startswith("train ") for line in lines)
    assert "<|begin_of_text|>def f" in job.stdout
    assert not {"torch", "ray", "mlflow", "pyarrow", "matplotlib"} & set(loaded.split())


def test_batches_of_a_mixture_name_their_sources(data: Path) -> None:
    job = run_here(
        JOB, f"old={data}:1", f"new={data}:3", "--batches=2", "--max-seq-len=64", "--batch_size=2", "--world_size=2"
    )  # fmt: skip
    assert job.returncode == 0, job.stderr
    assert "step 2: 4 sequences of 64 tokens, windows 4 to 7" in job.stdout
    named = job.stdout.count(", old ──"), job.stdout.count(", new ──")
    assert sum(named) == 8
    assert min(named) > 0


def test_verify_ends_with_2_and_a_line_for_each_damaged_file(data: Path, tmp_path: Path) -> None:
    job = run_here(JOB, str(data), "--verify")
    assert (job.returncode, job.stderr) == (0, "")
    assert ": all 4 files " in job.stdout
    other = write_dataset(tmp_path / "other")
    (other / "train-00000.bin").unlink()
    job = run_here(JOB, str(other), "--verify")
    assert (job.returncode, job.stderr) == (2, f"{other}: train-00000.bin is missing\n")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--output", "a.txt"], "a.txt; it must end with .svg, .png or .pdf"),
        (["--batches", "1"], "seq_len is 0; it must be that of the run; give --seq_len"),
        (["--split", "test"], "split is 'test'; it must be train or validation"),
        (["--samples", "-1"], "samples is -1; it must be at least 0"),
        (["--batches", "1", "--seq_len", "8", "--world_size", "0"], "world_size is 0; it must be at least 1"),
    ],
)
def test_flags_that_cannot_work_are_one_line(data: Path, flags: list[str], message: str) -> None:
    job = run_here(JOB, str(data), *flags)
    assert job.returncode == 2
    assert message in job.stderr
    assert job.stderr.count("\n") == 1
