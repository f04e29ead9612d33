from __future__ import annotations

from pathlib import Path

import pytest

from tests.jobs.helpers import run_here
from tests.small_models import save_small_model

JOB = "export_checkpoint.py"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_small_model(tmp_path_factory.mktemp("models") / "model")


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (["--to", "new", "--dtype", "q8_0"], "dtype is q8_0; it must be f32, f16 or bf16 for a directory"),
        (
            ["--to", "new.gguf", "--dtype", "q4_k"],
            "--dtype is q4_k; it must be auto or f32 or f16 or bf16 or q8_0",
        ),
        (["--to", "s3://bucket/new"], "to is s3://bucket/new; it must be on this machine"),
        (["--to", "there.gguf"], "there.gguf, which is a directory already; give another"),
        (["--to", "file"], "file, which is a file without .gguf already; give another"),
        (["--to", "new", "--max_shard_bytes", "0"], "max_shard_bytes is 0; it must be at least 1"),
        (["--to", "new", "--merge"], "is no adapter; leave out --merge"),
        ([], "--to is missing; give a directory"),
    ],
)
def test_what_cannot_be_written_is_refused_in_one_line(
    tmp_path: Path, model: Path, flags: list[str], line: str
) -> None:
    (tmp_path / "there.gguf").mkdir()
    (tmp_path / "file").touch()
    done = run_here(JOB, str(model), *flags, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert line in done.stderr
    assert done.stderr.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "there.gguf"]


def test_a_model_cannot_be_written_over_itself(model: Path) -> None:
    done = run_here(JOB, str(model), "--to", str(model), "--dtype", "bf16")
    assert done.returncode == 2
    assert "the model itself; give another place" in done.stderr
