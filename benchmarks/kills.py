"""What failures cost: a training run whose workers are killed, again and again, against an undisturbed one.

    python -m benchmarks.kills                       # 100 workers; 30 minutes on 2 cores
    python -m benchmarks.kills --driver --kills 10
    python -m benchmarks.kills --node --kills 3

Each kill is a SIGKILL of a random victim at a random instant of a phase that is chosen beforehand, so that short phases
are hit as often as long ones. Afterwards the weights and the optimizer state must be those of the undisturbed run to
the bit, and MLflow must have each step once, with the same values.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import psutil
import ray
from mlflow import MlflowClient
from ray.cluster_utils import Cluster

from benchmarks.watched_run import (
    AFTER_A_LOSS,
    CHECKPOINT,
    LAST_STEP,
    NO_WORKERS,
    START,
    STEP,
    VALIDATION,
    WatchedRun,
    is_alive,
)
from llama_ray.data.mixtures.stages import Segment
from llama_ray.data.mixtures.timetable import Timetable
from llama_ray.data.preparing.config import PrepareConfig
from llama_ray.data.preparing.prepare import prepare
from llama_ray.orchestration.launch import LaunchConfig
from llama_ray.storage import run_directory
from llama_ray.training.config import Schedule
from tests.e2e.conftest import CONFIG
from tests.e2e.helpers import assert_same_state, curve, run_id_of

Victim = Literal["worker", "driver", "node"]

CHECKPOINT_EVERY, VALIDATE_EVERY = 5, 7
METRICS = ("loss/train", "loss/validation", "train/gradient_norm", "train/learning_rate", "progress/tokens")
"""What must not depend on kills; times and rates do."""
CONTROLLER = "controller"
"""Not a phase: the workers' controller is killed instead of a worker, with the actor that cleans up after it."""
TARGETS = {
    "worker": (START, START, STEP, VALIDATION, CHECKPOINT, AFTER_A_LOSS, CONTROLLER),
    "driver": (NO_WORKERS, START, STEP, VALIDATION, CHECKPOINT),
    "node": (START, STEP, CHECKPOINT),
}
LOOK_S, FIND_S = 0.004, 0.2
"""Seconds between two looks at the output, and between two searches for processes."""


def main() -> None:
    """Print each kill, and at the end the hits by phase, the costs and the verdict."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    victims = parser.add_mutually_exclusive_group()
    victims.add_argument("--driver", action="store_true", help="kill the driver; --resume starts it again")
    victims.add_argument("--node", action="store_true", help="kill a node; another one replaces it")
    parser.add_argument("--kills", type=int, default=100, help="number of kills (100)")
    parser.add_argument("--seed", type=int, default=0, help="of the random victims and instants (0)")
    parser.add_argument("--steps_per_kill", type=int, default=6, help="length of the run, for each kill (6)")
    arguments = parser.parse_args()
    victim: Victim = "driver" if arguments.driver else "node" if arguments.node else "worker"
    _run(victim, arguments.kills, arguments.seed, arguments.steps_per_kill)


def _run(victim: Victim, kills: int, seed: int, steps_per_kill: int) -> None:
    os.environ |= {
        "RAY_AUTH_MODE": "disabled",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_memory_monitor_refresh_ms": "0",
        # By default Ray workers have niceness 15 and yield to other processes.
        "RAY_worker_niceness": "0",
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "10",
        "OMP_NUM_THREADS": "1",
    }
    with tempfile.TemporaryDirectory(prefix="kills-") as directory, started(victim) as cluster:
        prepare_data(Path(directory, "data"), cluster)
        bench = Bench(Path(directory), cluster, victim, steps_per_kill * max(kills, 10), random.Random(seed))
        print("undisturbed", flush=True)
        undisturbed = bench.run("undisturbed", kills=0)
        disturbed = bench.run("disturbed", kills=kills)
        bench.compare(undisturbed, disturbed)


@contextmanager
def started(victim: Victim) -> Iterator[Cluster]:
    """Yield a cluster for two workers; its nodes can be lost if they are the victims."""
    head = {
        "num_cpus": 0 if victim == "node" else 2,
        "include_dashboard": False,
        "object_store_memory": 100 * 1024**2,
        "_system_config": {"health_check_period_ms": 500, "health_check_failure_threshold": 4},
    }
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        for _ in range(2 if victim == "node" else 0):
            cluster.add_node(num_cpus=1, object_store_memory=100 * 1024**2)
        yield cluster
    finally:
        cluster.shutdown()


def prepare_data(directory: Path, cluster: Cluster) -> None:
    """Write a small data set to `directory`."""
    ray.init(cluster.address, log_to_driver=False, logging_level="ERROR")
    source = PrepareConfig(
        source=["builtin"],
        output=str(directory),
        vocab_size=1024,
        max_bytes=1_000_000,
        validation_fraction=0.2,
    )
    prepare(source, log=print)
    # Connected processes may not remove nodes.
    ray.shutdown()


@dataclass
class Finished:
    """A run that has ended, and what it took."""

    directory: Path
    hits: Counter[str]
    seconds: float
    steps_trained: int
    restarts: int


class Bench:
    """Runs the same training, disturbed or not."""

    def __init__(self, root: Path, cluster: Cluster, victim: Victim, steps: int, rng: random.Random) -> None:
        self.root, self.cluster, self.victim, self.steps, self.rng = root, cluster, victim, steps, rng
        self.tracking_uri = f"sqlite:///{root}/mlflow.db"
        self.config = {
            "max_steps": steps,
            "log_every": 1,
            "validate_every": VALIDATE_EVERY,
            "checkpoint_every": CHECKPOINT_EVERY,
            "collective_timeout_s": 60,
        }
        self.schedule = Schedule.of(replace(CONFIG, **self.config), Timetable([Segment(1, 1, 1, {})]), steps)

    def run(self, name: str, kills: int) -> Finished:
        """Train, with `kills` kills, until the driver has ended by itself."""
        begin = time.monotonic()
        logs = Path(self.cluster.head_node.get_session_dir_path()) / "logs"
        watched = WatchedRun(self.root / name, logs, self.schedule, self._raylets)
        disturbed = Disturbance(self, watched, self.start(name, kills), begin)
        for i, target in enumerate(self._targets(kills), 1):
            if not disturbed.kill(target, f"{i}/{kills}", kills):
                break
        code = disturbed.wait()
        print(f"the driver exited with {code} after {time.monotonic() - begin:.0f} s", flush=True)
        said = (self.root / f"{name}.log").read_text()
        return Finished(
            watched.directory,
            disturbed.hits,
            time.monotonic() - begin,
            watched.steps_trained,
            said.count("; restart ") + said.count("run disturbed: ") - (1 if kills else 0),
        )

    def _targets(self, kills: int) -> list[str]:
        """Choose the phase of each kill: all kinds equally often in random order, and an eighth at the end."""
        last = max(1, kills // 8) if kills else 0
        kinds = TARGETS[self.victim]
        targets = [kinds[i % len(kinds)] for i in range(kills - last)]
        self.rng.shuffle(targets)
        return targets + [LAST_STEP] * last

    def _raylets(self) -> list[int]:
        nodes = [self.cluster.head_node, *self.cluster.worker_nodes]
        return [process.process.pid for node in nodes for process in node.all_processes["raylet"]]

    def start(self, name: str, kills: int) -> subprocess.Popen[bytes]:
        """Start the driver of the run, or start it again if it has a checkpoint."""
        directory = self.root / name
        resume = bool(run_directory.latest_checkpoint(str(directory)))
        launch = LaunchConfig(
            world_size=2,
            output_dir=str(self.root),
            run_name=None if resume else name,
            resume=name if resume else None,
            register_as="",
            max_failures=2 * kills,
        )
        settings = {
            "address": self.cluster.address,
            "tracking_uri": self.tracking_uri,
            "data": str(self.root / "data"),
            "model": {},
            "config": self.config,
            "launch": asdict(launch),
        }
        with (self.root / f"{name}.log").open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "tests.e2e.driver", json.dumps(settings)], stdout=log, stderr=log
            )

    def compare(self, undisturbed: Finished, disturbed: Finished) -> None:
        """Print what the kills cost, and whether the runs came to the same."""
        extra = disturbed.seconds - undisturbed.seconds
        kills = disturbed.hits.total()
        print(f"\n{kills} kills; by phase:")
        for phase, hits in disturbed.hits.most_common():
            print(f"  {phase:24} {hits}")
        print(
            f"{disturbed.restarts} restarts; {disturbed.steps_trained - self.steps} steps of {self.steps} were trained "
            f"again; {disturbed.seconds:.0f} s instead of {undisturbed.seconds:.0f} s: "
            f"{extra / max(kills, 1):.1f} s a kill"
        )
        client = MlflowClient(self.tracking_uri)
        ours, theirs = run_id_of(disturbed.directory), run_id_of(undisturbed.directory)
        for metric in METRICS:
            points = curve(client, ours, metric)
            assert points == curve(client, theirs, metric), f"{metric} differs"
            print(f"{metric}: {len(points)} points, each step once, equal to those of the undisturbed run")
        last = f"step_{self.steps:08d}"
        assert_same_state(str(disturbed.directory / last), str(undisturbed.directory / last))
        print("weights and optimizer state: equal to the bit")
        print(f"MLflow run: {client.get_run(ours).info.status}")
        left, expected = ({p.name for p in run.directory.iterdir()} for run in (disturbed, undisturbed))
        assert expected <= left
        print(f"left behind in the run's directory: {', '.join(sorted(left - expected)) or 'nothing'}")


class Disturbance:
    """Kills parts of one run."""

    def __init__(
        self, bench: Bench, watched: WatchedRun, driver: subprocess.Popen[bytes], begin: float
    ) -> None:
        self.bench, self.watched, self.driver, self.begin = bench, watched, driver, begin
        self.hits: Counter[str] = Counter()
        self._lasted: dict[str, float] = {START: 5.0, NO_WORKERS: 5.0, AFTER_A_LOSS: 0.5, LAST_STEP: 1.0}
        """How long a phase was the last time, in seconds."""
        self._found = 0.0

    def wait(self) -> int:
        """Wait until the driver ends; return its exit status."""
        while self.driver.poll() is None:
            self._look()
        self.watched.read_output()
        return self.driver.returncode

    def kill(self, target: str, label: str, kills: int) -> bool:
        """Kill a victim at a random instant of the phase `target`; return False if the driver has ended before."""
        while phase := self._wait_for(STEP if target == CONTROLLER else target):
            hit = CONTROLLER if target == CONTROLLER and phase == STEP else phase
            if not self._strike(hit, kills):
                continue
            self.hits[hit] += 1
            at = time.monotonic() - self.begin
            print(f"kill {label} after {at:.0f} s: {hit}, step {self.watched.last_step}", flush=True)
            return True
        return False

    def _strike(self, phase: str, kills: int) -> bool:
        """Kill a victim; return False if it has just ended by itself."""
        bench, watched = self.bench, self.watched
        if phase == CONTROLLER:
            controllers = watched.find_processes("TrainController")
            return bool(controllers) and killed(
                [*controllers, *watched.find_processes("PlacementGroupCleaner")]
            )
        if bench.victim == "worker":
            alive = [worker for worker in watched.workers if is_alive(worker)]
            return bool(alive) and killed([bench.rng.choice(alive)])
        if bench.victim == "node":
            node = bench.rng.choice(sorted(bench.cluster.worker_nodes, key=lambda node: node.node_id))
            bench.cluster.remove_node(node, allow_graceful=False)
            bench.cluster.add_node(num_cpus=1, object_store_memory=100 * 1024**2)
            return True
        self.driver.kill()
        self.driver.wait()
        self.driver = bench.start(watched.directory.name, kills)
        return True

    def _wait_for(self, target: str) -> str | None:
        """Return at a random instant of `target`, or of another phase if that one cannot come any more."""
        rng = self.bench.rng
        passes = 0 if target in (START, NO_WORKERS, AFTER_A_LOSS, LAST_STEP) else rng.randrange(3)
        seen = AFTER_A_LOSS
        while True:
            since, wait = time.monotonic(), rng.uniform(0, self._lasted.get(target, 0.02))
            while (phase := self._look()) != target:
                if self.driver.poll() is not None:
                    return None
                # The run is at its end, or the next group has come up meanwhile.
                if phase == LAST_STEP or (target == AFTER_A_LOSS and phase == START and seen != AFTER_A_LOSS):
                    target = phase
                seen, since = phase, time.monotonic()
            while self._look() == target:
                if passes == 0 and time.monotonic() - since >= wait:
                    return target
                if self.driver.poll() is not None:
                    return None
            passes = max(0, passes - 1)
            self._lasted[target] = time.monotonic() - since

    def _look(self) -> str:
        """Return the phase of the run now."""
        time.sleep(LOOK_S)
        if time.monotonic() - self._found > FIND_S:
            self.watched.look_for_workers()
            self._found = time.monotonic()
        self.watched.read_output()
        return self.watched.phase


def killed(processes: Sequence[psutil.Process]) -> bool:
    """Kill `processes`, and return once they are gone, so that none is killed twice; False if one was gone before."""
    try:
        for process in processes:
            process.kill()
    except psutil.NoSuchProcess:
        return False
    while any(is_alive(process) for process in processes):
        time.sleep(LOOK_S)
    return True


if __name__ == "__main__":
    main()
