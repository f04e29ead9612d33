"""A driver that is killed or asked to stop, a job that is stopped, and nodes that come and go."""

from __future__ import annotations

import json
import os
import resource
import shlex
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
from ray._private.node import Node
from ray.cluster_utils import Cluster
from ray.job_submission import JobStatus, JobSubmissionClient

from llama_ray.data.loader import Loader, TokenDataset
from llama_ray.storage import run_directory, store
from tests.e2e.conftest import CONFIG, MODEL, Trained
from tests.e2e.test_training import assert_same_state, curve
from tests.object_store import s3_server, uri

ROOT = Path(__file__).parents[2]
ENDLESS = {"max_steps": 100_000, "validate_every": 100_000, "log_every": 20}


def start_driver(
    trained: Trained,
    address: str,
    name: str,
    config: dict[str, Any] | None = None,
    model: dict[str, Any] | None = None,
    **launch: Any,
) -> subprocess.Popen[str]:
    plan = {
        "address": address,
        "tracking_uri": trained.tracking_uri,
        "data": str(trained.data),
        "config": config or {},
        "model": model or {},
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


def whole(run: str, step: int) -> Callable[[], bool]:
    return lambda: run_directory.read_marker(store.join(run, f"step_{step:08d}")) is not None


def run_id_of(run: Path) -> str:
    return str(json.loads((run / "run.json").read_text())["run_id"])


def trains(tracking: str, run: Path) -> bool:
    """Whether the run has logged a loss."""
    if not (run / "run.json").exists():
        return False
    return "train/loss" in MlflowClient(tracking).get_run(run_id_of(run)).data.metrics


def step_of(checkpoint: str) -> int:
    return int(store.name_of(checkpoint).rpartition("_")[2])


def newest_step(run: Path) -> int:
    return step_of(run_directory.list_checkpoints(str(run))[0])


def test_a_killed_driver_costs_nothing_on_an_object_store(
    trained: Trained, tracking: str, ray_cluster: str
) -> None:
    with s3_server() as port:
        place = uri(port, "checkpoints")
        run = store.join(place, "driver-killed")
        driver = start_driver(trained, ray_cluster, "driver-killed", output_dir=place)
        wait_for(whole(run, 9), driver)
        os.kill(driver.pid, signal.SIGKILL)
        driver.wait()
        run_id = json.loads(store.read_text(store.join(run, "run.json")) or "")["run_id"]
        outcome = trained.again(resume="latest", register_as="resumed", output_dir=place)
        assert outcome.run_id == run_id
        assert outcome.version is not None
        assert_same_state(outcome.checkpoint, trained.outcome.checkpoint)
    client = MlflowClient(tracking)
    first = curve(client, trained.outcome.run_id, "train/loss")
    assert curve(client, outcome.run_id, "train/loss") == {
        step: loss for step, loss in first.items() if step <= 24
    }
    tags = client.get_run(outcome.run_id).data.tags
    assert tags["restarts"] == "1"
    assert "2 workers" in tags["restart.1"]


@pytest.fixture(scope="module")
def nodes() -> Iterator[Cluster]:
    """A cluster of its own that takes jobs: a head without CPUs, and room for nodes with one each."""
    cluster = Cluster(
        initialize_head=True,
        head_node_args={
            "num_cpus": 0,
            "include_dashboard": True,
            "dashboard_port": 0,
            "dashboard_agent_listen_port": 0,  # the session's cluster has the usual one
            "object_store_memory": 100 * 1024**2,
            "_system_config": {"health_check_period_ms": 500, "health_check_failure_threshold": 4},
        },
    )
    yield cluster
    cluster.shutdown()


@pytest.fixture
def add_node(nodes: Cluster) -> Iterator[Callable[[], Node]]:
    """Adds a node, which is gone when the test ends."""
    added: list[Node] = []

    def add() -> Node:
        added.append(nodes.add_node(num_cpus=1, object_store_memory=100 * 1024**2))
        return added[-1]

    yield add
    for node in added:
        if node in nodes.worker_nodes:
            nodes.remove_node(node)


AddNode = Callable[[], Node]


def test_a_stopped_job_saves_is_marked_killed_and_can_be_resumed(
    trained: Trained, tracking: str, nodes: Cluster, add_node: AddNode
) -> None:
    add_node()
    run = Path(trained.launch.output_dir) / "job"
    flags = {
        "data": trained.data, "vocab_size": 1024, "preset": "llama-tiny", "max_seq_len": 64, "world_size": 1,
        "output_dir": run.parent, "register_as": "", "batch_size": 8, "log_every": 20, "run_name": run.name,
        "max_steps": 100_000,
    }  # fmt: skip
    script = [sys.executable, str(ROOT / "jobs" / "train.py")]
    command = shlex.join(script + [f"--{name}={value}" for name, value in flags.items()])
    variables = {
        "PYTHONPATH": str(ROOT), "MLFLOW_TRACKING_URI": tracking, "RAY_JOB_STOP_WAIT_TIME_S": "120"
    }  # fmt: skip
    jobs = JobSubmissionClient(f"http://{nodes.head_node.webui_url}")
    taken: list[str] = []

    def accepted() -> bool:
        try:
            taken.append(jobs.submit_job(entrypoint=command, runtime_env={"env_vars": variables}))
        except RuntimeError as e:
            if "No available agent" not in str(e):  # the head has just started
                raise
        return bool(taken)

    wait_for(accepted)
    [job] = taken

    def goes_on() -> bool:
        assert not jobs.get_job_status(job).is_terminal(), jobs.get_job_logs(job)
        return trains(tracking, run)

    wait_for(goes_on)
    jobs.stop_job(job)
    wait_for(lambda: jobs.get_job_status(job).is_terminal())
    assert jobs.get_job_status(job) == JobStatus.STOPPED
    said = jobs.get_job_logs(job)
    assert "SIGTERM: saving, then stopping" in said
    step, run_id = newest_step(run), run_id_of(run)
    assert f"stopped after step {step}, as asked; --resume goes on from there" in said
    client = MlflowClient(tracking)
    assert client.get_run(run_id).info.status == "KILLED"

    longer = replace(CONFIG, max_steps=step + 10)
    outcome = trained.again(longer, resume=run.name, register_as="")
    assert outcome.run_id == run_id
    assert outcome.checkpoint == str(run / f"step_{step + 10:08d}")
    assert client.get_run(run_id).info.status == "FINISHED"
    assert max(curve(client, run_id, "train/loss")) == step + 10


def test_memory_that_is_missing_at_the_same_step_again_ends_the_run(
    trained: Trained, tracking: str, nodes: Cluster, add_node: AddNode
) -> None:
    """A layer so wide that one activation takes 16 GiB, on a node whose processes may have 8."""
    [raylet] = add_node().all_processes["raylet"]
    resource.prlimit(raylet.process.pid, resource.RLIMIT_DATA, (8 * 2**30, 8 * 2**30))
    batch = 1024
    width = 16 * 2**30 // (batch * MODEL.max_seq_len * 4)
    driver = start_driver(
        trained, nodes.address, "exhausted", {"batch_size": batch, "precision": "fp32"},
        {"intermediate_size": width}, world_size=1,
    )  # fmt: skip
    said, _ = driver.communicate(timeout=200)
    assert "a worker ran out of memory at step 1 twice; lower batch_size" in said
    run = Path(trained.launch.output_dir) / "exhausted"
    found = MlflowClient(tracking).get_run(run_id_of(run))
    assert found.info.status == "FAILED"
    assert found.data.tags["restarts"] == "1"


def test_a_lost_node_whose_place_another_takes_costs_nothing(
    trained: Trained, tracking: str, nodes: Cluster, add_node: AddNode
) -> None:
    add_node()
    lost = add_node()
    run = Path(trained.launch.output_dir) / "replaced"
    driver = start_driver(trained, nodes.address, run.name)
    wait_for(whole(str(run), 9), driver)
    nodes.remove_node(lost, allow_graceful=False)
    add_node()
    said, _ = driver.communicate(timeout=200)
    assert "finished" in said
    assert_same_state(str(run / "step_00000024"), trained.outcome.checkpoint)
    client = MlflowClient(tracking)
    first = curve(client, trained.outcome.run_id, "train/loss")
    assert curve(client, run_id_of(run), "train/loss") == {s: loss for s, loss in first.items() if s <= 24}
    assert client.get_run(run_id_of(run)).data.tags["restart.1"].endswith(", 2 workers")


def test_a_run_grows_with_the_cluster_saves_when_a_node_is_drained_and_shrinks_when_it_is_gone(
    trained: Trained, tracking: str, nodes: Cluster, add_node: AddNode
) -> None:
    """The life of a run on spot machines, with the same global batches throughout."""
    every = 200
    add_node()
    run = Path(trained.launch.output_dir) / "elastic"
    driver = start_driver(
        trained, nodes.address, run.name, ENDLESS | {"checkpoint_every": every},
        world_size="1..2", resize_interval_s=1.0,
    )  # fmt: skip
    client = MlflowClient(tracking)

    def restarted(times: int) -> Callable[[], bool]:
        return lambda: f"restart.{times}" in client.get_run(run_id_of(run)).data.tags

    wait_for(whole(str(run), every), driver)
    spot = add_node()
    wait_for(restarted(1), driver)

    notice = ["drain-node", "--address", nodes.address, "--node-id", spot.node_id]
    reason = ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot"]
    seconds = ["--deadline-remaining-seconds", "60"]
    subprocess.run([Path(sys.executable).with_name("ray"), *notice, *reason, *seconds], check=True)
    saved = 0

    def saved_out_of_turn() -> bool:
        nonlocal saved
        saved = max(
            (s for s in map(step_of, run_directory.list_checkpoints(str(run))) if s % every), default=0
        )
        return saved > 0

    wait_for(saved_out_of_turn, driver)
    wait_for(lambda: newest_step(run) > saved, driver)  # it goes on
    nodes.remove_node(spot, allow_graceful=False)
    wait_for(restarted(2), driver)
    driver.send_signal(signal.SIGINT)
    said, _ = driver.communicate(timeout=120)
    assert "SIGINT: saving, then stopping" in said
    assert f"stopped after step {newest_step(run)}" in said
    assert driver.returncode == 0
    assert client.get_run(run_id_of(run)).info.status == "KILLED"

    tags = client.get_run(run_id_of(run)).data.tags
    assert tags["restart.1"].endswith(", 2 workers")
    assert tags["restart.2"].endswith(", 1 workers")
    marker = run_directory.read_marker(run_directory.list_checkpoints(str(run))[0])
    assert marker is not None
    loader = Loader(
        TokenDataset(trained.data, "train"),
        seq_len=MODEL.max_seq_len, batch_size=8, rank=0, world_size=1, seed=CONFIG.seed,
    )  # fmt: skip
    position = marker["loader"]
    assert position["global_batch_size"] == 8
    assert position["epoch"] * loader.batches_per_epoch + position["global_batch"] == marker["step"]
    steps = list(curve(client, run_id_of(run), "train/loss"))
    # The lost node's last steps are in the curve; the run may have been stopped before it came to them again.
    assert [s for s in steps[1:] if s <= marker["step"]] == list(range(20, marker["step"] + 1, 20))
