"""The whole system on one machine: `make demo` runs `demo.py start`, `make stop` runs `demo.py stop`.

All files are written to `.demo/`. Existing data, models and running servers are used again, so a second start takes
seconds.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import psutil
import yaml
from openai import OpenAI

from llama_ray.tracking.uri import sqlite_uri
from serve_app import environment

ROOT = Path(__file__).resolve().parents[1]
HOME = ROOT / ".demo"
STATE = HOME / "state.json"
BIN = Path(sys.executable).parent

MODEL = "llama-ray"
EXPERIMENT = "llama-ray"
PREPARE = [
    *("--source", "builtin", "--output", str(HOME / "data")),
    *("--vocab_size", "4096", "--max_bytes", "12000000"),
]
TRAIN = [
    *("--data", str(HOME / "data"), "--output_dir", str(HOME / "checkpoints"), "--register_as", MODEL),
    *("--experiment", EXPERIMENT),
    *("--hidden_size", "256", "--num_layers", "4", "--num_heads", "4", "--intermediate_size", "688"),
    *("--max_seq_len", "256", "--world_size", "2", "--batch_size", "4", "--max_steps", "300"),
    *("--learning_rate", "2e-3", "--validate_every", "100", "--checkpoint_every", "100"),
]
_MODEL_TRAINING = "workflowType=machine_learning"
"""Makes MLflow's UI open on runs and charts instead of GenAI traces."""

_PREFIX = re.compile(r"(\x1b\[\d+m)?\(\w+ pid=\d+\)(\x1b\[0m)? ")
PROMPT = "def read_lines(path):\n"


def start() -> None:
    """Start the servers, train and deploy a model, each only if needed, and print an answer of the model."""
    began = time.monotonic()
    HOME.mkdir(exist_ok=True)
    state = _running() or _start_servers()
    env = _environment(state)
    if not _has_champion(state):
        _job(state, env, "prepare_data.py", PREPARE)
        _job(state, env, "train.py", TRAIN)
    _serve(state, env)
    _say(f"Asking the model to continue {PROMPT!r}")
    _stream_completion(state["endpoint"])
    _say(f"Ready after {time.monotonic() - began:.0f} s. Open in a browser:")
    print(
        f"\n  Playground      {state['endpoint']}/"
        f"\n  API             {state['endpoint']}/v1 (OpenAI-compatible, any key; documentation at /docs)"
        f"\n  Training runs   {state['mlflow']}/#/experiments/{_experiment(state)}?{_MODEL_TRAINING}"
        f"\n  Models          {state['mlflow']}/#/models/{MODEL}?{_MODEL_TRAINING}"
        f"\n  Ray dashboard   {state['dashboard']} (asks for a token: .venv/bin/ray get-auth-token)"
        "\n\n  make stop       stops all of it and keeps data, runs and models\n"
    )


def stop() -> None:
    """Stop the processes that `start` recorded, and no others. Data, runs and models stay in `.demo/`."""
    if not STATE.exists():
        print("The demo is not running.")
        return
    state = json.loads(STATE.read_text())
    processes = [p for entry in state["processes"] if (p := _process(entry))]
    # Ray's processes are descendants of `ray start --block` only while it runs, so list them before it is stopped.
    family = {child for p in processes for child in p.children(recursive=True)} | set(processes)
    for process in processes:
        process.send_signal(signal.SIGTERM)
    # Ray does not end HAProxy, and as long as it runs, it starts another one.
    haproxy = Path(state["haproxy_directory"])
    _, alive = psutil.wait_procs(family - environment.haproxy_processes(haproxy), timeout=20)
    alive += environment.haproxy_processes(haproxy)
    for process in alive:
        process.kill()
    psutil.wait_procs(alive, timeout=5)
    STATE.unlink()
    for directory in (state["ray_directory"], haproxy):
        shutil.rmtree(directory, ignore_errors=True)
    print(f"Stopped {len(family)} processes. Data, runs and models are kept in {HOME}.")


def _start_servers() -> dict[str, Any]:
    """Start MLflow and a Ray head node, record their addresses and processes, and wait until both answer."""
    ports = {
        name: _free_port(port) for name, port in (("mlflow", 5000), ("dashboard", 8265), ("endpoint", 8000))
    }
    # Paths of sockets are limited to 107 characters, and Ray and HAProxy add many, so they are not below the checkout.
    ray_directory = Path(f"/tmp/llama_ray_demo_{os.getuid()}_{ports['dashboard']}")
    haproxy_directory = Path(f"/tmp/haproxy_{os.getuid()}_{ports['dashboard']}")
    state: dict[str, Any] = {name: f"http://127.0.0.1:{port}" for name, port in ports.items()}
    state |= {
        "ray_directory": str(ray_directory),
        "haproxy_directory": str(haproxy_directory),
        "haproxy": environment.haproxy_apart(haproxy_directory, _free_port(8404), _free_port(9101)),
        "processes": [],
    }
    env = _environment(state)
    _say("Starting MLflow and Ray")
    # Ray requires the token in ~/.ray; this generates one if there is none.
    subprocess.run(
        [str(BIN / "ray"), "get-auth-token", "--generate"], env=env, check=True, capture_output=True
    )
    mlflow = [
        *("mlflow", "server", "--host", "127.0.0.1", "--port", str(ports["mlflow"]), "--workers", "1"),
        *("--backend-store-uri", sqlite_uri(HOME / "mlflow.db")),
        *("--artifacts-destination", (HOME / "mlartifacts").as_uri()),
    ]
    ray = [
        *("ray", "start", "--head", "--block", "--disable-usage-stats", "--port", str(_free_port(6379))),
        *("--dashboard-port", str(ports["dashboard"]), "--temp-dir", str(ray_directory)),
        # On a small machine, two workers, the Serve proxy and a replica need more CPUs than it has.
        *("--num-cpus", str(max(4, os.cpu_count() or 1)), "--object-store-memory", str(512 * 1024**2)),
    ]
    for name, command in (("mlflow", mlflow), ("ray", ray)):
        with (HOME / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(
                [str(BIN / command[0]), *command[1:]],
                env=env,
                cwd=HOME,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        state["processes"].append([process.pid, psutil.Process(process.pid).create_time()])
        STATE.write_text(json.dumps(state))
    _wait(state, "MLflow", f"{state['mlflow']}/health", HOME / "mlflow.log")
    _wait(state, "Ray", f"{state['dashboard']}/api/version", HOME / "ray.log")
    return state


def _running() -> dict[str, Any] | None:
    """Return the servers of an earlier start if all of them still run."""
    if not STATE.exists():
        return None
    state: dict[str, Any] = json.loads(STATE.read_text())
    if all(_process(entry) for entry in state["processes"]) and len(state["processes"]) == 2:
        _say("MLflow and Ray are already running")
        return state
    stop()
    return None


def _environment(state: dict[str, Any]) -> dict[str, str]:
    keep = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "MLFLOW_"))}
    demo = {
        # There is no other node on which what this one does could go on.
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
        "PATH": f"{BIN}:{os.environ['PATH']}",
        "RAY_AUTH_MODE": "token",
        "RAY_USAGE_STATS_ENABLED": "0",
        "MLFLOW_TRACKING_URI": state["mlflow"],
        # Nobody submits jobs to MLflow, for which eight processes would start.
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    }
    haproxy: dict[str, str] = state["haproxy"]
    return keep | environment.variables() | haproxy | demo


def _has_champion(state: dict[str, Any]) -> bool:
    alias = {"name": MODEL, "alias": "champion"}
    answer = httpx.get(f"{state['mlflow']}/api/2.0/mlflow/registered-models/alias", params=alias)
    if answer.status_code == 200:
        _say(
            f"Using version {answer.json()['model_version']['version']} of {MODEL}, which is registered already"
        )
    return answer.status_code == 200


def _experiment(state: dict[str, Any]) -> str:
    """Return the id of the experiment that holds the training runs."""
    name = {"experiment_name": EXPERIMENT}
    answer = httpx.get(f"{state['mlflow']}/api/2.0/mlflow/experiments/get-by-name", params=name)
    return str(answer.raise_for_status().json()["experiment"]["experiment_id"])


def _job(state: dict[str, Any], env: dict[str, str], script: str, flags: list[str]) -> None:
    _say(f"ray job submit -- python jobs/{script} {' '.join(flags)}")
    submit = ("ray", "job", "submit", "--address", state["dashboard"], "--working-dir", str(ROOT))
    _run([*submit, "--", "python", f"jobs/{script}", *flags], env, begin="Tailing logs")


def _serve(state: dict[str, Any], env: dict[str, str]) -> None:
    config = yaml.safe_load((ROOT / "serve_app" / "config.yaml").read_text())
    port = int(state["endpoint"].rpartition(":")[2])
    config["http_options"] |= {"host": "127.0.0.1", "port": port}
    config["applications"][0]["args"]["tracking_uri"] = state["mlflow"]
    file = HOME / "serve.yaml"
    file.write_text(yaml.safe_dump(config, sort_keys=False))
    _say("serve deploy serve_app/config.yaml")
    _run(["serve", "deploy", "--address", state["dashboard"], str(file)], env)
    try:
        _wait(state, "the endpoint", f"{state['endpoint']}/ready", HOME / "ray.log")
    except SystemExit:
        _run(["serve", "status", "--address", state["dashboard"]], env)
        raise


def _stream_completion(endpoint: str) -> None:
    client = OpenAI(base_url=f"{endpoint}/v1", api_key="none")
    print(PROMPT, end="", flush=True)
    for chunk in client.completions.create(
        model=MODEL, prompt=PROMPT, max_tokens=80, temperature=0.7, stream=True, seed=1
    ):
        print(chunk.choices[0].text, end="", flush=True)
    print()


def _run(command: list[str], env: dict[str, str], begin: str | None = None) -> None:
    """Run `command` to its end. Output before a line that contains `begin` is shown only if the command fails."""
    process = subprocess.Popen(
        [str(BIN / command[0]), *command[1:]],
        env=env,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout is not None
    held: list[str] = []
    for line in process.stdout:
        if begin is None:
            # Drop the process name and number that Ray puts in front of the lines of workers.
            print(_PREFIX.sub("", line), end="", flush=True)
        elif begin in line:
            begin, held = None, []
        else:
            held.append(line)
    if process.wait():
        print(*held, sep="", end="")
        sys.exit(
            f"demo: {' '.join(command[:3])} failed with exit code {process.returncode}; its messages are above"
        )


def _wait(state: dict[str, Any], what: str, url: str, log: Path) -> None:
    """Wait until `url` answers with 200, or with 401 if it requires Ray's token."""
    deadline = time.monotonic() + 120
    last = ""
    while time.monotonic() < deadline and all(_process(entry) for entry in state["processes"]):
        try:
            response = httpx.get(url, timeout=5)
            if response.status_code in (200, 401):
                return
            last = f" ({response.text[:500]})"
        except httpx.HTTPError:
            pass
        time.sleep(0.3)
    sys.exit(f"demo: {what} does not answer at {url}{last}; see {log}, then run `make stop` and `make demo`")


def _process(entry: tuple[int, float]) -> psutil.Process | None:
    """Return the recorded process, or None if it has ended; another process may have its number now."""
    pid, created = entry
    try:
        process = psutil.Process(pid)
        return (
            process if process.create_time() == created and process.status() != psutil.STATUS_ZOMBIE else None
        )
    except psutil.NoSuchProcess:
        return None


def _free_port(wanted: int) -> int:
    """Return `wanted`, or any free port if it is in use."""
    for port in (wanted, 0):
        with socket.socket() as s:
            s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                s.bind(("127.0.0.1", port))
            except OSError:
                continue
            return int(s.getsockname()[1])
    raise AssertionError("unreachable: port 0 is always free")


def _say(line: str) -> None:
    print(f"\n=== {line}", flush=True)


if __name__ == "__main__":
    {"start": start, "stop": stop}[sys.argv[1]]()
