"""The whole path on one machine: ``demo.py start`` and ``demo.py stop``, behind ``make demo`` and ``make stop``.

Everything it makes lies in ``.demo/``. What is there already (data, a registered model, running servers) is used
again, so a second start takes seconds.
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

ROOT = Path(__file__).resolve().parents[1]
HOME = ROOT / ".demo"
STATE = HOME / "state.json"
BIN = Path(sys.executable).parent

MODEL = "llama-ray"
PREPARE = [
    "--source",
    "builtin",
    "--output",
    str(HOME / "data"),
    "--vocab_size",
    "4096",
    "--max_bytes",
    "12000000",
]
TRAIN = [
    *("--data", str(HOME / "data"), "--output_dir", str(HOME / "checkpoints"), "--register_as", MODEL),
    *("--hidden_size", "256", "--num_layers", "4", "--num_heads", "4", "--intermediate_size", "688"),
    *("--max_seq_len", "256", "--world_size", "2", "--batch_size", "4", "--max_steps", "300"),
    *("--learning_rate", "2e-3", "--validate_every", "100", "--checkpoint_every", "100"),
]
_PREFIX = re.compile(r"(\x1b\[\d+m)?\(\w+ pid=\d+\)(\x1b\[0m)? ")
PROMPT = "def read_lines(path):\n"


def start() -> None:
    """Bring up what is missing, stage by stage, and print an answer of the trained model."""
    began = time.monotonic()
    HOME.mkdir(exist_ok=True)
    state = _running() or _start_servers()
    env = _environment(state)
    if not _champion(state):
        _job(state, env, "prepare_data.py", PREPARE)
        _job(state, env, "train.py", TRAIN)
    _serve(state, env)
    _say(f"asking {state['endpoint']} to continue {PROMPT!r}")
    _stream_completion(state["endpoint"])
    _say(f"done in {time.monotonic() - began:.0f} s")
    print(
        f"\n  playground   {state['endpoint']}/\n"
        f"  API          {state['endpoint']}/v1 (any key)   documented at {state['endpoint']}/docs\n"
        f"  MLflow       {state['mlflow']}\n"
        f"  Ray          {state['dashboard']}  (its token: ray get-auth-token)\n"
        f"  end it all   make stop\n"
    )


def stop() -> None:
    """End the processes that `start` recorded, and no others. Data, runs and models stay in ``.demo/``."""
    if not STATE.exists():
        print("the demo is not running")
        return
    state = json.loads(STATE.read_text())
    processes = [p for entry in state["processes"] if (p := _process(entry))]
    # Ray's own children are in its tree only as long as `ray start --block` lives: list them before it is told to end.
    family = {child for p in processes for child in p.children(recursive=True)} | set(processes)
    for process in processes:
        process.send_signal(signal.SIGTERM)
    _, alive = psutil.wait_procs(family, timeout=20)
    for process in alive:
        process.kill()
    psutil.wait_procs(alive, timeout=5)
    STATE.unlink()
    shutil.rmtree(state["ray_directory"], ignore_errors=True)
    print(f"stopped {len(family)} processes; data, runs and models are still in {HOME}")


def _start_servers() -> dict[str, Any]:
    """Start MLflow and a Ray head, wait until both answer, and record how to reach and end them."""
    ports = {
        name: _free_port(port) for name, port in (("mlflow", 5000), ("dashboard", 8265), ("endpoint", 8000))
    }
    # Ray's sockets have long names, and a path to one may have 107 characters: not below the checkout.
    ray_directory = Path(f"/tmp/llama_ray_demo_{os.getuid()}_{ports['dashboard']}")
    state: dict[str, Any] = {name: f"http://127.0.0.1:{port}" for name, port in ports.items()}
    state |= {"ray_directory": str(ray_directory), "processes": []}
    env = _environment(state)
    _say("starting MLflow and Ray")
    # Ray's doors are locked with the token in ~/.ray, made here where there is none.
    subprocess.run(
        [str(BIN / "ray"), "get-auth-token", "--generate"], env=env, check=True, capture_output=True
    )
    mlflow = [
        *("mlflow", "server", "--host", "127.0.0.1", "--port", str(ports["mlflow"]), "--workers", "1"),
        *(
            "--backend-store-uri",
            f"sqlite:///{HOME}/mlflow.db",
            "--artifacts-destination",
            f"{HOME}/mlartifacts",
        ),
    ]
    ray = [
        *("ray", "start", "--head", "--block", "--disable-usage-stats", "--port", str(_free_port(6379))),
        *("--dashboard-port", str(ports["dashboard"]), "--temp-dir", str(ray_directory)),
        # Train workers, the Serve proxy and one replica share a small machine.
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
    """The servers of an earlier start, where all of them still run."""
    if not STATE.exists():
        return None
    state: dict[str, Any] = json.loads(STATE.read_text())
    if all(_process(entry) for entry in state["processes"]) and len(state["processes"]) == 2:
        _say("Ray and MLflow are running already")
        return state
    stop()
    return None


def _environment(state: dict[str, Any]) -> dict[str, str]:
    keep = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "MLFLOW_"))}
    return keep | {
        "PATH": f"{BIN}:{os.environ['PATH']}",
        "RAY_AUTH_MODE": "token",
        "RAY_USAGE_STATS_ENABLED": "0",
        "MLFLOW_TRACKING_URI": state["mlflow"],
    }


def _champion(state: dict[str, Any]) -> bool:
    alias = {"name": MODEL, "alias": "champion"}
    answer = httpx.get(f"{state['mlflow']}/api/2.0/mlflow/registered-models/alias", params=alias)
    if answer.status_code == 200:
        _say(f"version {answer.json()['model_version']['version']} of {MODEL} is registered already")
    return answer.status_code == 200


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
        _wait(state, "the endpoint", f"{state['endpoint']}/health", HOME / "ray.log")
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
    """Run `command` to its end. With `begin` its output is shown only after a line with that, or if it fails."""
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
            # The process number in front of a worker's lines says nothing here.
            print(_PREFIX.sub("", line), end="", flush=True)
        elif begin in line:
            begin, held = None, []
        else:
            held.append(line)
    if process.wait():
        print(*held, sep="", end="")
        sys.exit(
            f"demo: {' '.join(command[:3])} ended with exit code {process.returncode}; its messages are above"
        )


def _wait(state: dict[str, Any], what: str, url: str, log: Path) -> None:
    """Wait until `url` answers: with 200, or with 401 where it wants Ray's token."""
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
    sys.exit(f"demo: {what} does not answer at {url}{last}; its log is {log}. make stop, then try again")


def _process(entry: tuple[int, float]) -> psutil.Process | None:
    """The recorded process, unless it has ended (and its number may have gone to another one)."""
    pid, created = entry
    try:
        process = psutil.Process(pid)
        return (
            process if process.create_time() == created and process.status() != psutil.STATUS_ZOMBIE else None
        )
    except psutil.NoSuchProcess:
        return None


def _free_port(wanted: int) -> int:
    """`wanted`, or any free port where somebody else has it."""
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
