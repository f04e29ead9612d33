"""The contestants: our engine without a server, our application on a Ray of its own, and vLLM's server."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from benchmarks.serving.client import Client
from benchmarks.serving.load import Load, Measured
from benchmarks.serving.processes import Family
from serve_app.environment import haproxy_apart

ROOT = Path(__file__).parents[2]
_START_S = 300
"""Longest start of a server; vLLM compiles for a minute."""
_TOKENS = 256
"""Of a sequence, prompt and output."""


@dataclass(frozen=True)
class Setting:
    """What all contestants share: the model, the sequences that run at once, and the threads of the model."""

    directory: Path
    sequences: int
    threads: int
    cache_bytes: int
    vocab_size: int

    @property
    def engine(self) -> dict[str, int]:
        """Options of our engine, with a cache of the size that the sequences need."""
        return {
            "max_num_seqs": self.sequences,
            "max_seq_len": _TOKENS,
            "kv_cache_memory_bytes": self.cache_bytes,
        }

    @classmethod
    def of(cls, directory: Path, sequences: int, threads: int) -> Setting:
        """Return the setting for a model, whose cache holds one sequence more, as a block is reserved."""
        config = json.loads((directory / "config.json").read_text())
        head = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
        # Keys and values, two bytes each.
        token = 4 * config["num_hidden_layers"] * config["num_key_value_heads"] * head
        return cls(
            directory, sequences, threads, (sequences + 1) * _TOKENS * token, vocab_size=config["vocab_size"]
        )


class Contestant(Protocol):
    """Something that can be measured while it is up."""

    name: str
    family: Family

    def start(self) -> None:
        """Start it, or let it go on; return when it can answer."""

    def measure(self, load: Load) -> Measured:
        """Let it answer `load`."""

    def rest(self) -> None:
        """Take no processor time until the next start."""

    def stop(self) -> None:
        """End all its processes."""


class Offline:
    """Our engine in a process of its own."""

    name = "engine"

    def __init__(self, setting: Setting) -> None:
        self._setting, self.family = setting, Family()
        self._process: subprocess.Popen[str] | None = None

    def start(self) -> None:
        """Load the engine, unless it is loaded."""
        if self._process is not None:
            return
        command = [sys.executable, "-m", "benchmarks.serving.offline"]
        environment = {**os.environ, **self.family.environment, "OMP_NUM_THREADS": str(self._setting.threads)}
        self._process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._say(
            {
                "directory": str(self._setting.directory),
                "threads": self._setting.threads,
                "engine": self._setting.engine,
            }
        )
        self._hear()

    def measure(self, load: Load) -> Measured:
        """Submit the requests of `load` to the engine."""
        self._say(asdict(load))
        return Measured.from_json(json.loads(self._hear()))

    def rest(self) -> None:
        """Do nothing: it waits for the next load."""

    def stop(self) -> None:
        """End the process."""
        self.family.kill()

    def _say(self, task: dict[str, Any]) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(task) + "\n")
        self._process.stdin.flush()

    def _hear(self) -> str:
        assert self._process is not None
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the engine's process ended with {self._process.wait()}")
        return line


@dataclass
class _Server:
    """A server on a free port; `log` has what its processes say. Clients ask for `model`, the directory by default."""

    name: str
    setting: Setting
    log: Path
    family: Family = field(default_factory=Family)
    port: int = 0
    model: str = ""

    def __post_init__(self) -> None:
        self.model = self.model or self.setting.directory.name

    def client(self, load: Load) -> Client:
        """Begin to send `load` from a client beside it."""
        return Client(load, self.port, self.model)

    def measure(self, load: Load) -> Measured:
        """Send `load` from a client beside it."""
        return self.client(load).result()

    def stop(self) -> None:
        """Kill its processes."""
        self.family.kill()

    def _spawn(
        self, command: list[str], environment: Mapping[str, str], **options: Any
    ) -> subprocess.Popen[str]:
        with self.log.open("ab") as log:
            return subprocess.Popen(
                command,
                env={**os.environ, "PYTHONPATH": str(ROOT), **environment, **self.family.environment},
                stderr=log,
                start_new_session=True,
                text=True,
                **{"stdout": log, "stdin": subprocess.DEVNULL, **options},
            )

    def _wait(self, process: subprocess.Popen[str]) -> None:
        """Return when it answers a request."""
        deadline, said = time.monotonic() + _START_S, "nothing"
        load = Load(new_tokens=2, vocab_size=self.setting.vocab_size)
        while True:
            if process.poll() is not None:
                raise RuntimeError(f"{self.name} ended with {process.returncode}; see {self.log}")
            if time.monotonic() > deadline:
                raise RuntimeError(f"{self.name} answers {said} after {_START_S} s; see {self.log}")
            if listens(self.port):
                error = self.measure(load).outcomes[0].error
                if error is None:
                    return
                said = error
            time.sleep(0.5)


@dataclass
class OurApplication(_Server):
    """Our application on a Ray cluster of its own, which is started with `environment`; each turn starts it anew.

    `arguments` are those of the application; they replace what serves the directory with one replica.
    """

    environment: Mapping[str, str] = field(default_factory=dict)
    arguments: dict[str, Any] = field(default_factory=dict)
    _directory: Path | None = None

    def start(self) -> None:
        """Start Ray and the application."""
        self.port, ray_port, dashboard_port = free_port(), free_port(), free_port()
        # Paths of Ray's sockets are long and limited to 107 characters.
        self._directory = Path(tempfile.mkdtemp(prefix="sb_", dir="/tmp"))
        environment = {
            "RAY_AUTH_MODE": "disabled",
            # By default Ray's workers have niceness 15, and yield to the client beside them.
            "RAY_worker_niceness": "0",
            **haproxy_apart(self._directory, free_port(), free_port()),
            **self.environment,
        }
        ray = [
            *(
                str(Path(sys.executable).parent / "ray"),
                "start",
                "--head",
                "--block",
                "--disable-usage-stats",
            ),
            *("--port", str(ray_port), "--dashboard-port", str(dashboard_port)),
            *("--num-cpus", str(2 * self.setting.threads + 4), "--object-store-memory", str(256 * 1024**2)),
            *("--temp-dir", str(self._directory)),
        ]
        self._spawn(ray, environment)
        address = f"127.0.0.1:{ray_port}"
        _wait_for_port(ray_port)
        task = {"port": self.port, "address": address, "args": self._args()}
        driver = self._spawn(
            [sys.executable, "-m", "benchmarks.serving.application"], environment, stdin=subprocess.PIPE
        )
        assert driver.stdin is not None
        driver.stdin.write(json.dumps(task) + "\n")
        driver.stdin.flush()
        self._wait(driver)

    def rest(self) -> None:
        """End it: a Ray that was stopped for a while takes its own processes for dead."""
        self.stop()

    def stop(self) -> None:
        """Kill its processes, Ray's too."""
        super().stop()
        if self._directory is not None:
            shutil.rmtree(self._directory, ignore_errors=True)

    def _args(self) -> dict[str, Any]:
        return {
            "model": str(self.setting.directory),
            "num_cpus": self.setting.threads,
            "max_replicas": 1,
            **self.setting.engine,
            **self.arguments,
        }


@dataclass
class VLLM(_Server):
    """vLLM's server, run by `python` of its environment; between turns it is stopped as Ctrl-Z does."""

    python: Path = Path("python")
    _process: subprocess.Popen[str] | None = None

    def start(self) -> None:
        """Start it, or let it go on."""
        if self._process is not None:
            self.family.send(signal.SIGCONT)
            return
        self.port = free_port()
        threads = self.setting.threads
        command = [
            *(str(self.python), "-m", "vllm.entrypoints.openai.api_server"),
            *("--model", str(self.setting.directory), "--served-model-name", self.model),
            *("--host", "127.0.0.1", "--port", str(self.port), "--dtype", "bfloat16"),
            *("--max-model-len", str(_TOKENS), "--max-num-seqs", str(self.setting.sequences)),
        ]
        libraries = [
            *Path("/usr/lib").glob("*/libtcmalloc_minimal.so.4"),
            *self.python.parents[1].glob("lib/libiomp5.so"),
        ]
        environment = {
            "PYTHONPATH": "",
            "OMP_NUM_THREADS": str(threads),
            "VLLM_CPU_OMP_THREADS_BIND": ",".join(str(i) for i in range(threads)),
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "LD_PRELOAD": ":".join(str(library) for library in libraries),
            "HF_HUB_OFFLINE": "1",
        }
        self._process = self._spawn(command, environment)
        self._wait(self._process)

    def rest(self) -> None:
        """Stop its processes until they go on."""
        self.family.send(signal.SIGSTOP)


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


def listens(port: int) -> bool:
    """Return whether somebody listens on `port`."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _wait_for_port(port: int) -> None:
    deadline = time.monotonic() + 60
    while not listens(port):
        if time.monotonic() > deadline:
            raise RuntimeError(f"nothing listens on port {port} after 60 s")
        time.sleep(0.1)
