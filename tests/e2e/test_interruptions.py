"""A driver that is killed or asked to stop, and nodes that come and go."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from ray.cluster_utils import Cluster

from llama_ray import storage
from tests.e2e.conftest import CONFIG, Trained
from tests.e2e.test_training import curve


def start_driver(
    trained: Trained, address: str, name: str, config: dict[str, Any] | None = None, **launch: Any
) -> subprocess.Popen[str]:
    plan = {
        "address": address,
        "tracking_uri": trained.tracking_uri,
        "data": str(trained.data),
        "config": config or {},
        "launch": asdict(trained.launch) | {"run_name": name, "register_as": ""} | launch,
    }
    return subprocess.Popen(
        [sys.executable, "-m", "tests.e2e.driver", json.dumps(plan)], stdout=subprocess.PIPE, text=True
    )


def wait_for(condition: Callable[[], Any], process: subprocess.Popen[str] | None = None) -> None:
    deadline = time.monotonic() + 150
    while not condition():
        if process is not None and process.poll() is not None:
            pytest.fail(f"the driver ended: {process.communicate()[0]}")
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_killed_driver_costs_nothing(trained: Trained, tracking: str, ray_cluster: str) -> None:
    run = Path(trained.launch.output_dir) / "driver-killed"
    driver = start_driver(trained, ray_cluster, run.name)
    wait_for((run / "step_00000009" / storage.MARKER).exists, driver)
    os.kill(driver.pid, signal.SIGKILL)
    driver.wait()
    outcome = trained.again(resume=run.name, register_as="")
    client = MlflowClient(tracking)
    first = curve(client, trained.outcome.run_id, "train/loss")
    assert curve(client, outcome.run_id, "train/loss") == {
        step: loss for step, loss in first.items() if step <= 24
    }
    tags = client.get_run(outcome.run_id).data.tags
    assert tags["restarts"] == "1"
    assert "2 workers" in tags["restart.1"]


def test_sigint_saves_marks_the_run_killed_and_can_be_resumed(
    trained: Trained, tracking: str, ray_cluster: str
) -> None:
    run = Path(trained.launch.output_dir) / "interrupted"
    endless = {"max_steps": 100_000, "validate_every": 100_000, "checkpoint_every": 50_000}
    driver = start_driver(trained, ray_cluster, run.name, endless)
    client = MlflowClient(tracking)

    def trains() -> bool:
        record = storage.read_text(str(run / "run.json"))
        return bool(record) and "train/loss" in client.get_run(json.loads(record)["run_id"]).data.metrics

    wait_for(trains, driver)
    driver.send_signal(signal.SIGINT)
    said, _ = driver.communicate(timeout=120)
    assert "SIGINT: saving, then stopping" in said
    assert driver.returncode == 0
    [checkpoint] = storage.checkpoints(str(run))
    step = int(checkpoint.rsplit("_", 1)[1])
    assert f"stopped after step {step}" in said
    run_id = json.loads((run / "run.json").read_text())["run_id"]
    assert client.get_run(run_id).info.status == "KILLED"

    longer = replace(CONFIG, **(endless | {"max_steps": step + 10}))
    outcome = trained.again(longer, resume=run.name, register_as="")
    assert outcome.run_id == run_id
    assert client.get_run(run_id).info.status == "FINISHED"
    assert max(curve(client, run_id, "train/loss")) == step + 10


@pytest.fixture
def nodes() -> Iterator[Cluster]:
    """A cluster of its own: a head without CPUs, and room for nodes with one each."""
    cluster = Cluster(
        initialize_head=True,
        head_node_args={
            "num_cpus": 0,
            "include_dashboard": False,
            "object_store_memory": 100 * 1024**2,
            "_system_config": {"health_check_period_ms": 500, "health_check_failure_threshold": 4},
        },
    )
    yield cluster
    cluster.shutdown()


def test_a_run_survives_its_nodes_with_as_many_workers_as_are_left(
    trained: Trained, tracking: str, nodes: Cluster
) -> None:
    """Two workers on two nodes, one node is lost: the other goes on with the same global batches."""
    nodes.add_node(num_cpus=1, object_store_memory=100 * 1024**2)
    lost = nodes.add_node(num_cpus=1, object_store_memory=100 * 1024**2)
    run = Path(trained.launch.output_dir) / "elastic"
    driver = start_driver(trained, nodes.address, run.name, world_size="1..2")
    wait_for((run / "step_00000009" / storage.MARKER).exists, driver)
    nodes.remove_node(lost, allow_graceful=False)
    said, _ = driver.communicate(timeout=200)
    assert "finished" in said
    client = MlflowClient(tracking)
    first = curve(client, trained.outcome.run_id, "train/loss")
    run_id = json.loads((run / "run.json").read_text())["run_id"]
    losses = curve(client, run_id, "train/loss")
    assert losses == pytest.approx({s: loss for s, loss in first.items() if s <= 24}, rel=2e-3)
    assert client.get_run(run_id).data.tags["restart.1"].endswith(", 1 workers")
    [theirs] = [
        c for c in storage.checkpoints(trained.outcome.checkpoint.rsplit("/", 1)[0]) if c.endswith("24")
    ]
    ours = storage.read_marker(str(run / "step_00000024"))
    assert ours is not None
    assert ours["loader"] == (storage.read_marker(theirs) or {})["loader"]
