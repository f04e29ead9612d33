"""What the whole suite shares: its environment, one Ray cluster a process, and how tests are divided among processes.

`make test` runs two processes side by side. Tests that need Ray wait most of the time, so they form two groups, one for
each process, which start first; the other modules fill up whichever process is free.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

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

CLUSTERS = {"ray_cluster", "nodes"}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark tests that need Ray, and put each test in its group, those that take longest first."""
    for item in items:
        if CLUSTERS.intersection(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.ray)
        item.add_marker(pytest.mark.xdist_group(_group(item)))
    order = {"e2e": 0, "ray": 1}
    items.sort(key=lambda item: order.get(_group(item), 2))


def _group(item: pytest.Item) -> str:
    folder, *rest = item.path.relative_to(item.config.rootpath / "tests").parts
    if folder == "e2e":
        return folder
    if item.get_closest_marker("ray"):
        return "ray"
    # The MLflow server of its tests takes seconds to start.
    return folder if folder == "tracking" else "/".join([folder, *rest])


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[str]:
    """The address of a local cluster with four logical CPUs that belongs to this test session alone."""
    import ray

    context = ray.init(
        address="local",
        num_cpus=4,
        include_dashboard=False,
        object_store_memory=256 * 1024 * 1024,
        log_to_driver=False,
    )
    yield context.address_info["address"]
    ray.shutdown()
