"""Workers, nodes and drivers that are lost: the run ends as the undisturbed one did, to the bit."""

from __future__ import annotations

import json
import os
import resource
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
import torch
from mlflow import MlflowClient
from ray.cluster_utils import Cluster

from llama_ray.storage import store
from tests.e2e.conftest import MODEL, AddNode, Trained
from tests.e2e.helpers import (
    assert_same_state,
    curve,
    has_checkpoint,
    has_restarted,
    newest_step,
    run_id_of,
    start_driver,
    train_workers,
    wait_for,
)
from tests.object_store import s3_server, uri


def test_killed_workers_a_hung_worker_and_a_lost_node_cost_nothing(
    trained: Trained, tracking: str, nodes: Cluster, add_node: AddNode
) -> None:
    """The second worker is killed while its group starts, which is not a restart of the run in MLflow."""
    add_node()
    lost = add_node()
    run = Path(trained.launch.output_dir) / "disturbed"
    client = MlflowClient(tracking)
    session_dir = nodes.head_node.get_session_dir_path()
    driver = start_driver(trained, nodes.address, run.name, {"collective_timeout_s": 10}, max_failures=4)

    wait_for(has_checkpoint(str(run), 9), driver)
    killed = train_workers(session_dir)
    os.kill(killed[0].pid, signal.SIGKILL)

    starting: list[psutil.Process] = []

    def next_group_starts() -> bool:
        starting[:] = [worker for worker in train_workers(session_dir) if worker not in killed]
        return bool(starting)

    wait_for(next_group_starts, driver)
    os.kill(starting[0].pid, signal.SIGKILL)
    wait_for(has_restarted(run, 1), driver)

    os.kill(train_workers(session_dir)[0].pid, signal.SIGSTOP)
    wait_for(has_restarted(run, 2), driver)

    # Last, because to add a node takes longer than to train to the end.
    nodes.remove_node(lost, allow_graceful=False)
    add_node()

    said, _ = driver.communicate(timeout=200)
    assert "finished" in said
    assert_same_state(str(run / Path(trained.outcome.checkpoint).name), trained.outcome.checkpoint)
    first = curve(client, trained.outcome.run_id, "loss/train")
    assert curve(client, run_id_of(run), "loss/train") == first
    tags = client.get_run(run_id_of(run)).data.tags
    assert tags["restarts"] == "3"
    assert all(tags[f"restart.{n}"].endswith(", 2 workers") for n in (1, 2, 3))


def test_attempts_elsewhere_that_hang_or_are_killed_cost_nothing_on_an_object_store(
    trained: Trained, tracking: str, ray_cluster: str
) -> None:
    """The first one hangs, as on a node out of reach, and comes back when the third one has finished the run."""
    client = MlflowClient(tracking)
    with s3_server() as port:
        place = uri(port, "checkpoints")
        run = store.join(place, "tried")
        again: dict[str, Any] = {"resume": "if_there", "register_as": "tried", "output_dir": place}
        hung = start_driver(trained, ray_cluster, "tried", **again)
        wait_for(has_checkpoint(run, 9), hung)
        workers = train_workers(ray._private.worker._global_node.get_session_dir_path())
        for process in (psutil.Process(hung.pid), *workers):
            process.suspend()
        seem_elsewhere(run)
        killed = start_driver(trained, ray_cluster, "tried", **again)
        wait_for(lambda: newest_step(run) > 9, killed)
        killed.kill()
        killed.communicate()
        seem_elsewhere(run)

        outcome = trained.again(run_name="tried", **again)
        assert outcome.version is not None
        for process in (*workers, psutil.Process(hung.pid)):
            process.resume()
        said, _ = hung.communicate(timeout=100)
        assert "attempt 1 at run tried ends, because attempt 3 on " in said
        assert_same_state(outcome.checkpoint, trained.outcome.checkpoint)

        once_more = trained.again(run_name="tried", **again)
        assert once_more == replace(outcome, decision=None)
        assert len(store.list_files(store.join(run, "attempts"))) == 3
    assert client.get_run(outcome.run_id).info.status == "FINISHED"
    first = curve(client, trained.outcome.run_id, "loss/train")
    assert curve(client, outcome.run_id, "loss/train") == first
    assert len(client.search_model_versions("name = 'tried'")) == 1
    tags = client.get_run(outcome.run_id).data.tags
    assert tags["restarts"] == "2"
    assert "2 workers" in tags["restart.1"]


def seem_elsewhere(run: str) -> None:
    """Let the attempts at `run` seem to have begun on another machine."""
    directory = store.join(run, "attempts")
    for name in store.list_files(directory):
        file = store.join(directory, name)
        store.write_text(file, json.dumps(json.loads(store.read_text(file) or "") | {"host": "elsewhere"}))


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
    said, _ = driver.communicate(timeout=240)
    assert "a worker ran out of memory at step 1 twice; lower batch_size" in said
    run = Path(trained.launch.output_dir) / "exhausted"
    found = MlflowClient(tracking).get_run(run_id_of(run))
    assert found.info.status == "FAILED"
    assert found.data.tags["restarts"] == "1"


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs workers that cannot do what they are told to")
def test_an_error_that_only_a_worker_can_know_ends_the_run_at_once_in_one_line(
    trained: Trained, tracking: str, nodes: Cluster, add_node: AddNode
) -> None:
    add_node(num_gpus=1)
    driver = start_driver(trained, nodes.address, "without-cuda", world_size=1)
    said, _ = driver.communicate(timeout=240)
    assert "has a GPU, but torch" in said.splitlines()[-1]
    assert "restart" not in said
    run = Path(trained.launch.output_dir) / "without-cuda"
    assert MlflowClient(tracking).get_run(run_id_of(run)).info.status == "FAILED"
