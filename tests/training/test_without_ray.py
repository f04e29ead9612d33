"""Training and its benchmark need neither Ray nor MLflow, as on a bare GPU machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TRAIN = """
import sys
import torch
from llama_ray.model.config import LlamaConfig
from llama_ray.training.config import TrainConfig
from llama_ray.training.loop import train
from llama_ray.training.reporting.observer import Console

shape = LlamaConfig.preset("llama-tiny", max_seq_len=32)
config = TrainConfig(max_steps=2, batch_size=2)
done = train(shape, config, sys.argv[1], device=torch.device("cpu"), observer=Console())
print("steps", done.step)
"""


@pytest.fixture
def bare(tmp_path: Path) -> dict[str, str]:
    """An environment in which neither can be imported, not even by child processes."""
    for name in ("ray", "mlflow"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(f"raise ModuleNotFoundError('no {name} here')")
    return {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}


def run(environment: dict[str, str], *command: str) -> str:
    job = subprocess.run(
        [sys.executable, *command], env=environment, capture_output=True, text=True, check=False
    )
    assert job.returncode == 0, job.stderr
    return job.stdout


def test_a_run_needs_neither(bare: dict[str, str], dataset: Path) -> None:
    assert "steps 2" in run(bare, "-c", TRAIN, str(dataset))
    with pytest.raises(AssertionError, match="no ray here"):
        run(bare, "-c", "import ray")


def test_the_training_benchmark_needs_neither(bare: dict[str, str]) -> None:
    contestants = ["ours eager", "transformers eager"]
    size = ("--preset", "llama-tiny", "--batch_size", "2", "--seq_len", "32")
    turns = ("--rounds", "2", "--steps", "1", "--warmup", "1", "--contestants", json.dumps(contestants))
    lines = run(bare, str(ROOT / "benchmarks" / "train.py"), *size, *turns).splitlines()
    table = {
        line[:24].strip(): line[24:].split()
        for line in lines[lines.index(next(x for x in lines if "spread" in x)) :]
    }
    assert table[""] == ["tok/s", "spread", "MFU", "peak", "MiB", "ratio"]
    assert table.keys() == {"", *contestants}
    for name in contestants:
        rate, peak = (float(table[name][i].replace(",", "")) for i in (0, 3))
        assert rate > 0
        assert peak > 100
    assert float(table["ours eager"][4]) > 0
