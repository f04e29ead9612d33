"""A submitted job on machines that come and go."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from ray.cluster_utils import Cluster
from ray.job_submission import JobStatus, JobSubmissionClient

from llama_ray.storage import run_directory
from tests.e2e.conftest import CONFIG, AddNode, Trained
from tests.e2e.helpers import (
    checkpoint_steps,
    curve,
    has_checkpoint,
    has_restarted,
    newest_step,
    run_id_of,
    wait_for,
)

ROOT = Path(__file__).parents[2]
CHECKPOINT_EVERY = 200


@dataclass(frozen=True)
class Job:
    """A training job that `ray job submit` would start."""

    client: JobSubmissionClient
    id: str

    @classmethod
    def submit(cls, nodes: Cluster, flags: Mapping[str, Any], variables: Mapping[str, str]) -> Job:
        client = JobSubmissionClient(f"http://{nodes.head_node.webui_url}")
        script = [sys.executable, str(ROOT / "jobs" / "train.py")]
        command = shlex.join(script + [f"--{name}={value}" for name, value in flags.items()])
        accepted: list[str] = []

        def accept() -> bool:
            try:
                accepted.append(
                    client.submit_job(entrypoint=command, runtime_env={"env_vars": dict(variables)})
                )
            except RuntimeError as error:
                if "No available agent" not in str(error):  # The head has just started.
                    raise
            return bool(accepted)

        wait_for(accept)
        return cls(client, accepted[0])

    def logs(self) -> str:
        return str(self.client.get_job_logs(self.id))

    def wait_for(self, condition: Any) -> None:
        def holds() -> bool:
            assert not self.client.get_job_status(self.id).is_terminal(), self.logs()
            return bool(condition())

        wait_for(holds)

    def stop(self) -> JobStatus:
        self.client.stop_job(self.id)
        wait_for(lambda: self.client.get_job_status(self.id).is_terminal())
        return self.client.get_job_status(self.id)


def test_a_job_grows_saves_when_a_node_is_drained_shrinks_is_stopped_and_resumed(
    trained: Trained, tracking: str, nodes: Cluster, add_node: AddNode
) -> None:
    """The life of a run on spot machines, with the same global batches throughout."""
    add_node()
    run = Path(trained.launch.output_dir) / "spot"
    client = MlflowClient(tracking)
    flags = {
        "data": trained.data, "vocab_size": 1024, "preset": "llama-tiny", "max_seq_len": 64,
        "batch_size": CONFIG.batch_size, "world_size": "1..2", "resize_interval_s": 1.0,
        "max_steps": 100_000, "checkpoint_every": CHECKPOINT_EVERY, "validate_every": 100_000, "log_every": 20,
        "output_dir": run.parent, "run_name": run.name, "register_as": "",
    }  # fmt: skip
    variables = {
        "PYTHONPATH": str(ROOT), "MLFLOW_TRACKING_URI": tracking, "RAY_JOB_STOP_WAIT_TIME_S": "120"
    }  # fmt: skip
    job = Job.submit(nodes, flags, variables)
    job.wait_for(has_checkpoint(str(run), CHECKPOINT_EVERY))
    run_id = run_id_of(run)

    spot = add_node()
    job.wait_for(has_restarted(run, 1))

    _announce_preemption(nodes.address, spot.node_id)
    job.wait_for(lambda: _saved_out_of_turn(run) > 0)
    saved = _saved_out_of_turn(run)
    job.wait_for(lambda: newest_step(run) > saved)  # It goes on.

    nodes.remove_node(spot, allow_graceful=False)
    job.wait_for(has_restarted(run, 2))

    assert job.stop() == JobStatus.STOPPED
    said, step = job.logs(), newest_step(run)
    assert "SIGTERM: saving, then stopping" in said
    assert f"stopped after step {step}, as asked; --resume goes on from there" in said
    stopped = client.get_run(run_id)
    assert stopped.info.status == "KILLED"
    assert stopped.data.tags["restart.1"].endswith(", 2 workers")
    assert stopped.data.tags["restart.2"].endswith(", 1 workers")
    _assert_every_batch_was_taken_once(run)
    steps = list(curve(client, run_id, "loss/train"))
    # The lost node's last steps are in the curve; the run may have been stopped before it came to them again.
    assert [s for s in steps[1:] if s <= step] == list(range(20, step + 1, 20))

    outcome = trained.again(replace(CONFIG, max_steps=step + 10), resume=run.name, register_as="")
    assert outcome.run_id == run_id
    assert outcome.checkpoint == str(run / f"step_{step + 10:08d}")
    assert client.get_run(run_id).info.status == "FINISHED"
    assert max(curve(client, run_id, "loss/train")) == step + 10


def test_a_cluster_that_has_no_cpu_is_refused_at_once(nodes: Cluster, tmp_path: Path) -> None:
    job = subprocess.run(
        [sys.executable, str(ROOT / "jobs" / "prepare_data.py"), "--source", "builtin", "--output", "data"],
        env=os.environ | {"PYTHONPATH": str(ROOT), "RAY_ADDRESS": nodes.address},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert job.returncode == 2
    assert "error: this cluster has 0 CPUs; preparing data needs 1; add a node" in job.stderr
    assert "Traceback" not in job.stderr


def _announce_preemption(address: str, node_id: str) -> None:
    ray = Path(sys.executable).with_name("ray")
    reason = ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot"]
    deadline = ["--deadline-remaining-seconds", "60"]
    subprocess.run(
        [ray, "drain-node", "--address", address, "--node-id", node_id, *reason, *deadline], check=True
    )


def _saved_out_of_turn(run: Path) -> int:
    """The newest checkpoint that is not due by the schedule, 0 without one."""
    return max((step for step in checkpoint_steps(run) if step % CHECKPOINT_EVERY), default=0)


def _assert_every_batch_was_taken_once(run: Path) -> None:
    marker = run_directory.read_marker(run_directory.list_checkpoints(str(run))[0])
    assert marker is not None
    position = marker["loader"]
    assert position["windows_per_step"] == 8
    assert position["position"] == 8 * marker["step"]
