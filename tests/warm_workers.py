"""Ray's workers without the seconds that each of them needs for its imports.

Ray starts this file in place of its own `setup_worker.py`. It asks one process of the Ray session, which has imported
what workers import and computed nothing, to fork: that copy takes the command, variables, folder, limits and open files
that Ray gave, imports Ray and runs its `default_worker.py` as every worker does. The process begins with the first
request, and ends with the last raylet that it forked for.
"""

from __future__ import annotations

import fcntl
import gc
import importlib
import json
import os
import re
import resource
import runpy
import select
import signal
import socket
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
IMPORTED = (
    *("aiohttp", "fastapi", "jsonschema", "matplotlib.figure", "mlflow.pyfunc"),
    *("mlflow.system_metrics.system_metrics_monitor", "msgpack", "opentelemetry.exporter.prometheus"),
    *("opentelemetry.sdk.metrics", "pandas", "prometheus_client", "psutil", "pyarrow.compute"),
    *("pyarrow.dataset", "pyarrow.fs", "pyarrow.parquet", "requests", "torch", "torch.distributed.fsdp"),
    *("torch.distributed.tensor", "uvicorn", "uvloop", "yaml"),
    *("llama_ray.generation.engine", "llama_ray.pretrained", "llama_ray.tracking.buffer"),
    *("llama_ray.tracking.registry", "llama_ray.training.loop", "serve_app.protocol.completions"),
)
"""What takes long, and not Ray: it reads its variables, such as the worker's job, when it is imported."""
WAIT_S = 120.0
"""How long a worker waits for the imports."""


@contextmanager
def forked_workers() -> Iterator[None]:
    """Let the Ray clusters that this process starts have such workers."""
    import pytest
    from ray._private import ray_constants

    with pytest.MonkeyPatch.context() as patch:
        # Joined to Ray's folder, it stays as it is.
        patch.setattr(ray_constants, "SETUP_WORKER_FILENAME", __file__)
        yield


def set_up(words: list[str]) -> None:
    """Become the worker that Ray wants, or have a copy forked that does."""
    options = dict(word.removeprefix("--").split("=", 1) for word in words if "=" in word)
    context = json.loads(options.get("serialized-runtime-env-context", "{}"))
    plain = not (context.get("command_prefix") or context.get("override_worker_entrypoint"))
    if (
        plain
        and options.get("language") == "PYTHON"
        and context.get("py_executable") in (None, sys.executable)
    ):
        # .../session_.../sockets/raylet
        session = Path(options["raylet-name"]).parents[1]
        known = ("--serialized-runtime-env-context=", "--language=")
        _ask(session, [word for word in words if not word.startswith(known)], context.get("env_vars") or {})
    else:
        from ray._private.workers import setup_worker

        os.execv(sys.executable, [sys.executable, setup_worker.__file__, *words])


def _ask(session: Path, command: list[str], variables: dict[str, str]) -> None:
    limits = {getattr(resource, name) for name in dir(resource) if name.startswith("RLIMIT_")}
    request = {
        "command": command,
        "environment": dict(os.environ),
        "variables": variables,
        "folder": str(Path.cwd()),
        "limits": [(number, resource.getrlimit(number)) for number in limits],
        "niceness": os.nice(0),
        "raylet": int(os.environ["RAY_RAYLET_PID"]),
    }
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(WAIT_S)
        _connect(connection, session)
        socket.send_fds(connection, [b"."], [0, 1, 2])
        connection.sendall(json.dumps(request).encode())
        connection.shutdown(socket.SHUT_WR)
        if connection.recv(1) != b".":
            raise ConnectionError("the process that forks workers ended")


def _connect(connection: socket.socket, session: Path) -> None:
    """Connect to the process that forks, started if there is none."""
    place = session / "sockets" / "warm"
    with (session / "warm_workers.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            connection.connect(str(place))
        except OSError:
            place.unlink(missing_ok=True)
            _start(session, place)
            connection.connect(str(place))


def _start(session: Path, place: Path) -> None:
    with (session / "logs" / "warm_workers.log").open("a") as log, socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(place))
        listening.listen(1000)
        subprocess.Popen(
            [sys.executable, __file__, "--fork", str(listening.fileno()), str(session)],
            pass_fds=[listening.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )


def serve(listening: socket.socket) -> dict[str, Any] | None:
    """Fork for each request until no raylet is left. Returns the request in each copy, and None at the end."""
    # Copies that end are not waited for.
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    raylets: dict[int, Raylet] = {}
    while True:
        ready, _, _ = select.select([listening, *(raylet.file for raylet in raylets.values())], [], [])
        if listening in ready:
            connection, _ = listening.accept()
            with connection:
                request, files = _receive(connection)
                pid = request["raylet"]
                # The raylet may have ended meanwhile.
                with suppress(ProcessLookupError):
                    raylets[pid] = raylets.get(pid) or Raylet(pid)
                    if (worker := os.fork()) == 0:
                        _become(request, files)
                        return request
                    raylets[pid].add(worker)
                    connection.sendall(b".")
            for file in files:
                os.close(file)
        for pid in [pid for pid, raylet in raylets.items() if raylet.file in ready]:
            raylets.pop(pid).end()
        if not raylets:
            return None


def _receive(connection: socket.socket) -> tuple[dict[str, Any], list[int]]:
    _, files, _, _ = socket.recv_fds(connection, 1, 3)
    return json.loads(b"".join(iter(lambda: connection.recv(2**16), b""))), files


class Raylet:
    """A raylet that workers were forked for. They look whether their parent lives, which is another process here."""

    def __init__(self, pid: int) -> None:
        self.file = os.pidfd_open(pid)
        self._workers: list[int] = []

    def add(self, pid: int) -> None:
        """Note that a worker is the raylet's."""
        with suppress(ProcessLookupError):
            self._workers.append(os.pidfd_open(pid))

    def end(self) -> None:
        """End what it has left."""
        for worker in self._workers:
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(worker, signal.SIGKILL)
            os.close(worker)
        os.close(self.file)


def _become(request: dict[str, Any], files: list[int]) -> None:
    """Take what Ray gave to the process that asked."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    # Ray ends a worker with its group, so that its children end.
    os.setpgrp()
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    os.nice(request["niceness"] - os.nice(0))
    for number, limits in request["limits"]:
        resource.setrlimit(number, limits)
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])


def run(request: dict[str, Any]) -> None:
    """Run the worker."""
    import numpy as np

    # Otherwise all copies would draw the same numbers.
    np.random.seed()
    for name, value in request["variables"].items():
        # As Ray does, before it is imported.
        os.environ[name] = re.sub(r"\$\{[A-Z0-9_]+\}", "", os.path.expandvars(value))
    # As where Python starts with this file and these variables.
    path = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    sys.path[:] = [str(Path(request["command"][0]).parent), *filter(None, path), *sys.path]
    sys.argv = request["command"]
    runpy.run_path(sys.argv[0], run_name="__main__")


def main() -> None:
    """Ask for a worker, or fork them."""
    if sys.argv[1] != "--fork":
        return set_up(sys.argv[1:])
    with socket.socket(fileno=int(sys.argv[2])) as listening:
        path = sys.path[1:]
        sys.path[:] = [str(ROOT), *path]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for name in IMPORTED:
                importlib.import_module(name)
        assert "ray" not in sys.modules
        sys.path[:] = path
        gc.collect()
        gc.freeze()
        request = serve(listening)
    if request is not None:
        run(request)
    return None


if __name__ == "__main__":
    main()
