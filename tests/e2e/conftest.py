"""A model that the suite itself prepares data for, trains on two workers and registers, once a session."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from ray._private.node import Node
from ray.cluster_utils import Cluster

from llama_ray.data.preparing.config import PrepareConfig
from llama_ray.data.preparing.prepare import prepare
from llama_ray.model.config import LlamaConfig
from llama_ray.orchestration.launch import LaunchConfig
from llama_ray.orchestration.trainer import Outcome, train_on_ray
from llama_ray.training.config import TrainConfig
from tests.warm_workers import forked_workers

MODEL = LlamaConfig.preset("llama-tiny", vocab_size=1024, max_seq_len=64)
CONFIG = TrainConfig(
    max_steps=60, batch_size=4, learning_rate=3e-3, log_every=2, validate_every=25, checkpoint_every=9,
    keep_checkpoints=2,
)  # fmt: skip


@dataclass(frozen=True)
class Trained:
    """What the session's training run was told and what came of it."""

    data: Path
    tracking_uri: str
    launch: LaunchConfig
    outcome: Outcome

    def again(self, config: TrainConfig = CONFIG, **launch: object) -> Outcome:
        """Another run like it, with single settings replaced."""
        return train_on_ray(MODEL, config, replace(self.launch, **launch), str(self.data))


@pytest.fixture(scope="session")
def trained(ray_cluster: str, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    directory = tmp_path_factory.mktemp("trained")
    uri = f"sqlite:///{directory}/mlflow.db"
    data = directory / "data"
    prepare(
        PrepareConfig(source=["builtin"], output=str(data), vocab_size=1024, max_bytes=400_000),
        log=lambda _: None,
    )
    launch = LaunchConfig(
        world_size=2, output_dir=str(directory / "checkpoints"), register_as="tiny", run_name="first"
    )
    evaluated = replace(
        launch,
        evaluate_every=20,
        evaluate_tasks=("none",),
        evaluate_limit=3,
        promote_if="bits_per_byte < champion",
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", uri)
        outcome = train_on_ray(MODEL, CONFIG, evaluated, str(data))
    return Trained(data, uri, replace(launch, run_name=None), outcome)


@pytest.fixture
def tracking(trained: Trained, monkeypatch: pytest.MonkeyPatch) -> str:
    """The tracking URI of the session's run, set as a user would set it."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", trained.tracking_uri)
    return trained.tracking_uri


@pytest.fixture(scope="package")
def nodes() -> Iterator[Cluster]:
    """A cluster of its own that takes jobs: a head without CPUs, and room for nodes with one each."""
    with forked_workers():
        yield from _nodes()


def _nodes() -> Iterator[Cluster]:
    cluster = Cluster(
        initialize_head=True,
        head_node_args={
            "num_cpus": 0,
            "include_dashboard": True,
            "dashboard_port": 0,
            "dashboard_agent_listen_port": 0,  # The session's cluster has the usual one.
            "object_store_memory": 100 * 1024**2,
            "_system_config": {"health_check_period_ms": 500, "health_check_failure_threshold": 4},
        },
    )
    yield cluster
    cluster.shutdown()


AddNode = Callable[..., Node]


@pytest.fixture
def add_node(nodes: Cluster) -> Iterator[AddNode]:
    """Adds a node with one CPU and perhaps GPUs, which is gone when the test ends."""
    added: list[Node] = []

    def add(num_gpus: int = 0) -> Node:
        added.append(nodes.add_node(num_cpus=1, num_gpus=num_gpus, object_store_memory=100 * 1024**2))
        return added[-1]

    yield add
    for node in added:
        if node in nodes.worker_nodes:
            nodes.remove_node(node)
