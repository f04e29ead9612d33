"""What the whole suite shares: its environment, Ray and MLflow, and how tests are divided among processes.

`make test` runs two processes side by side. Tests that need Ray wait most of the time, so they form two groups, one for
each process, which start first; the other modules fill up whichever process is free.
"""

from __future__ import annotations

import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("RAY_memory_monitor_refresh_ms", "0")
os.environ.setdefault("RAY_enable_worker_prestart", "0")
# Ray Train looks at its workers each 2 s, at drained nodes each 5 s, and waits 60 s for a node that is gone.
os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
os.environ.setdefault("RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S", "1")
os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "5")
# For the S3 server that tests start; it takes any.
os.environ |= {
    "AWS_ACCESS_KEY_ID": "tests",
    "AWS_SECRET_ACCESS_KEY": "tests",
    "AWS_EC2_METADATA_DISABLED": "true",
}
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")

import pytest
import torch

from tests.mlflow_server import MlflowServer
from tests.smollm2 import smollm2 as smollm2
from tests.warm_workers import forked_workers

CLUSTERS = {"ray_cluster", "nodes"}
RAY = (
    "tests/batch_inference/test_interrupted_jobs.py",
    "tests/batch_inference/test_job.py",
    "tests/batch_inference/test_job_checks.py",
    "tests/data/preparing/test_prepare.py",
    "tests/jobs/test_generate.py",
    "tests/jobs/test_prepare_data.py",
    "tests/orchestration/test_placement_groups.py",
    "tests/serve_app/test_adapters.py",
    "tests/serve_app/test_draining.py",
    "tests/serve_app/test_following.py",
    "tests/serve_app/test_front.py",
    "tests/serve_app/registry/test_follower.py",
    "tests/serve_app/test_losses.py",
    "tests/serve_app/test_scaling.py",
    "tests/serve_app/test_serving.py",
    "tests/serve_app/test_serving_errors.py",
    "tests/serve_app/test_surge.py",
)
"""Modules outside e2e that need Ray, at least for one of their tests."""
SLOW_CLIENT_S = 5
"""After this time the tests' HAProxy cuts off a client that sends nothing, or does not read: 60 s for users."""


REGISTRY = (
    "tests/evaluation/test_promotion.py",
    "tests/evaluation/test_recording.py",
    "tests/jobs/test_begin_guide.py",
    "tests/orchestration/test_importing.py",
    "tests/tracking/",
    "tests/serve_app/registry/",
    "tests/serve_app/api/clients/test_mlflow_gateway.py",
)
"""Tests that share an MLflow store and a server, each of which takes seconds to start."""


def group(nodeid: str) -> str:
    """Return the name that all tests have in common which one process runs, one after the other."""
    module = nodeid.partition("::")[0]
    if module.startswith("tests/e2e/"):
        return "e2e"
    if module in RAY:
        return "ray"
    return "tracking" if module.startswith(REGISTRY) else module


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark tests that need Ray, skip those that need a GPU, and put the groups that take longest first."""
    for item in items:
        if CLUSTERS.intersection(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.ray)
        if item.get_closest_marker("cuda") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="there is no CUDA device"))
        if item.get_closest_marker("ray") and group(item.nodeid) not in ("e2e", "ray"):
            raise pytest.UsageError(f"{item.nodeid} needs Ray; add its module to RAY in tests/conftest.py")
    items.sort(key=lambda item: _precedence(group(item.nodeid)))


def _precedence(name: str) -> int:
    if name in ("e2e", "ray"):
        return ("e2e", "ray").index(name)
    return 2 if name.startswith("tests/training/") else 3


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> object:
    """Give whole groups to whichever process is free."""
    from xdist.scheduler import LoadScopeScheduling

    class GroupScheduling(LoadScopeScheduling):
        # The marks of xdist's own loadgroup have no effect from pytest 9.2 on.
        def _split_scope(self, nodeid: str) -> str:
            return group(nodeid)

    return GroupScheduling(config, log)


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[str]:
    """The address of a local cluster with four logical CPUs that belongs to this test session alone.

    Its processes have the variables that users are told to set; this process has not, as a driver may not.
    """
    # Imported here, because tests of the kernels run on GPU machines that have pytest and nothing else.
    import ray

    from serve_app import environment

    # Short, for sockets: pytest's own directories are not.
    haproxy = Path(tempfile.mkdtemp(prefix="hap-", dir="/tmp"))
    # Where models are cached, but not kernels, which take long to build.
    home = {
        "HOME": str(haproxy),
        "XDG_CACHE_HOME": os.environ.get("XDG_CACHE_HOME", str(Path("~/.cache").expanduser())),
    }
    with pytest.MonkeyPatch.context() as patch, forked_workers():
        for name, value in (_serve_variables(haproxy) | home).items():
            patch.setenv(name, value)
        context = ray.init(
            address="local",
            num_cpus=4,
            include_dashboard=False,
            object_store_memory=256 * 1024 * 1024,
            log_to_driver=False,
        )
    yield context.address_info["address"]
    ray.shutdown()
    for process in environment.haproxy_processes(haproxy):
        process.kill()
    shutil.rmtree(haproxy)


def _serve_variables(haproxy: Path) -> dict[str, str]:
    from serve_app import environment

    with socket.socket() as stats, socket.socket() as metrics:
        stats.bind(("", 0))
        metrics.bind(("", 0))
        apart = environment.haproxy_apart(haproxy, stats.getsockname()[1], metrics.getsockname()[1])
    users = environment.variables()
    defaults = users["RAY_SERVE_HAPROXY_BALANCE_ALGORITHM"]
    shorter = {
        # No load balancer of another machine has to learn that a replica of the API ends.
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "0",
        "RAY_SERVE_HAPROXY_TIMEOUT_CLIENT_S": str(SLOW_CLIENT_S),
        "RAY_SERVE_HAPROXY_BALANCE_ALGORITHM": defaults.replace("request 60s", f"request {SLOW_CLIENT_S}s"),
    }
    return users | apart | shorter


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The URI of an SQLite store that this test session alone uses."""
    return f"sqlite:///{tmp_path_factory.mktemp('store')}/mlflow.db"


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a real MLflow server that stores and serves artifacts itself."""
    server = MlflowServer(tmp_path_factory.mktemp("server"))
    server.start()
    yield server.url
    server.stop()
