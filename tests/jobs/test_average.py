from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from llama_ray.model.checkpoint import load_model
from llama_ray.pretrained import save_pretrained
from llama_ray.storage.run_directory import MARKER
from tests.jobs.helpers import run_here
from tests.small_models import random_model, small_config, small_tokenizer

JOB = "average.py"
# Which checkpoint is passed over, and why, is a warning.
pytestmark = pytest.mark.filterwarnings("ignore:.*model.safetensors has 3 bytes")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three of a run, of which the second is not complete."""
    run, tokenizer = tmp_path_factory.mktemp("runs") / "run", small_tokenizer()
    found = []
    for step in (10, 20, 30):
        checkpoint = run / f"step_{step:08d}"
        save_pretrained(random_model(small_config(tokenizer.vocab_size), step), tokenizer, checkpoint)
        files = {"model.safetensors": {"bytes": (checkpoint / "model.safetensors").stat().st_size}}
        (checkpoint / MARKER).write_text(json.dumps({"step": step, "files": files}))
        found.append(checkpoint)
    (found[1] / "model.safetensors").write_bytes(b"cut")
    return found


def norm(directory: Path) -> torch.Tensor:
    return load_model(directory).norm.weight


def test_the_last_checkpoints_of_a_run_are_averaged(tmp_path: Path, checkpoints: list[Path]) -> None:
    run = checkpoints[0].parent
    flags = ["--run", str(run), "--last", "2", "--weights", "1", "3", "--to", "average", "--dtype", "bf16"]
    done = run_here(JOB, *flags, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    lines = [
        f"0.2500 of {checkpoints[0]}",
        f"0.7500 of {checkpoints[2]}",
        f"averaged to {tmp_path / 'average'}",
    ]
    assert done.stdout.splitlines() == lines
    expected = (0.25 * norm(checkpoints[0]) + 0.75 * norm(checkpoints[2])).bfloat16()
    assert torch.equal(norm(tmp_path / "average"), expected)


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (
            ["--run", "{run}", "--to", "average"],
            "has 2 complete checkpoints; it must have 5; keep more of them",
        ),
        (["{run}/step_00000010", "{run}", "--to", "average"], "is the directory of a run; give one of its"),
        (["{run}/step_00000010", "--to", "average"], "is one model; give at least two"),
        (["{run}/a", "{run}/b", "--weights", "1", "x", "--to", "average"], "weights is"),
        (["{run}/a", "{run}/b"], "give either --to DIR or --register_as NAME"),
        (
            ["{run}/a", "{run}/b", "--to", "a.gguf"],
            "--to is 'a.gguf'; it must be a directory on this machine",
        ),
    ],
)
def test_what_cannot_be_averaged_is_refused_in_one_line(
    tmp_path: Path, checkpoints: list[Path], flags: list[str], line: str
) -> None:
    run = str(checkpoints[0].parent)
    done = run_here(JOB, *(flag.replace("{run}", run) for flag in flags), cwd=tmp_path)
    assert (done.returncode, done.stdout, list(tmp_path.iterdir())) == (2, "", [])
    assert line in done.stderr
    assert done.stderr.count("\n") == 1
