"""Watching and disturbing a training run from outside, and comparing what it left."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from mlflow import MlflowClient
from safetensors.torch import load_file

from llama_ray.storage import run_directory, store
from llama_ray.training.checkpointing.files import local_copy
from tests.e2e.conftest import MODEL, Trained


def start_driver(
    trained: Trained,
    address: str,
    name: str,
    config: dict[str, Any] | None = None,
    model: dict[str, Any] | None = None,
    **launch: Any,
) -> subprocess.Popen[str]:
    """Start a run like the session's in a process of its own, with single settings replaced."""
    settings = {
        "address": address,
        "tracking_uri": trained.tracking_uri,
        "data": str(trained.data),
        "config": config or {},
        "model": model or {},
        "launch": asdict(trained.launch) | {"run_name": name, "register_as": ""} | launch,
    }
    return subprocess.Popen(
        [sys.executable, "-m", "tests.e2e.driver", json.dumps(settings)], stdout=subprocess.PIPE, text=True
    )


def wait_for(condition: Callable[[], Any], process: subprocess.Popen[str] | None = None) -> None:
    """Return once `condition` holds; fail after minutes, or at once when `process` has ended before."""
    deadline = time.monotonic() + 240
    while not condition():
        if process is not None and process.poll() is not None:
            pytest.fail(f"the driver ended: {process.communicate()[0]}")
        assert time.monotonic() < deadline
        time.sleep(0.02)


def has_checkpoint(run: str, step: int) -> Callable[[], bool]:
    return lambda: run_directory.read_marker(store.join(run, f"step_{step:08d}")) is not None


def has_restarted(run: Path, times: int) -> Callable[[], bool]:
    """Whether workers have begun to train once more; MLflow knows a moment later, when they may have ended."""
    return lambda: len(json.loads((run / "starts.json").read_text())) > times


def has_logged_a_loss(client: MlflowClient, run: Path) -> bool:
    if not (run / "run.json").exists():
        return False
    return "loss/train" in client.get_run(run_id_of(run)).data.metrics


def run_id_of(run: Path) -> str:
    return str(json.loads((run / "run.json").read_text())["run_id"])


def checkpoint_steps(run: Path | str) -> Iterable[int]:
    """The steps that have a checkpoint, newest first."""
    names = map(store.name_of, run_directory.list_checkpoints(str(run)))
    return (run_directory.checkpoint_step(name) or 0 for name in names)


def newest_step(run: Path | str) -> int:
    return next(iter(checkpoint_steps(run)))


def train_workers(session_dir: str) -> list[psutil.Process]:
    """The processes of Ray Train's workers in the Ray cluster of `session_dir`."""
    return [
        process
        for process in psutil.process_iter(["cmdline"])
        if "RayTrainWorker" in "".join(process.info["cmdline"] or []) and _belongs_to(process, session_dir)
    ]


def _belongs_to(process: psutil.Process, session_dir: str) -> bool:
    try:
        return any(session_dir in part for parent in process.parents() for part in parent.cmdline())
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return False


def curve(client: MlflowClient, run_id: str, metric: str) -> dict[int, float]:
    """Step -> value; fails where a step was logged twice."""
    points = client.get_metric_history(run_id, metric)
    assert len({p.step for p in points}) == len(points), f"{metric} has a step twice"
    return {p.step: p.value for p in points}


def artifacts(client: MlflowClient, run_id: str, path: str = "") -> set[str]:
    return {f.path for f in client.list_artifacts(run_id, path)}


def assert_same_state(checkpoint: str, other: str) -> None:
    """Weights and optimizer state of two checkpoints of whole tensors are the same to the bit."""
    ours, theirs = _state(checkpoint), _state(other)
    assert ours.keys() == theirs.keys()
    assert sum(t.numel() for t in ours.values()) > 3 * MODEL.num_parameters()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


def _state(checkpoint: str) -> dict[str, torch.Tensor]:
    with local_copy(checkpoint) as local:
        files = [load_file(path) for path in local.glob("*-rank*.safetensors")]
    return {name: tensor for file in files for name, tensor in file.items()}
