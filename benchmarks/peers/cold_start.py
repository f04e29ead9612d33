"""From nothing to the first token in a fresh process, with an empty kernel cache and with the one that this filled."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from peers import weights

CHILD = """
import json, sys, time
start = time.perf_counter()
import torch
from llama_ray import Engine, SamplingParams
torch.set_num_threads(int(sys.argv[3]))
imported = time.perf_counter()
options = {"quantization": sys.argv[2]} if sys.argv[2].startswith("int") else {}
engine = Engine.from_pretrained(sys.argv[1], dtype=torch.bfloat16, **options)
made = time.perf_counter()
engine.generate([list(range(3, 67))], SamplingParams(max_tokens=1, ignore_eos=True))
print(json.dumps([imported - start, made - imported, time.perf_counter() - made]))
"""


def run(directory: Path, preset: str, contestants: list[str], rounds: int, threads: int) -> None:
    """Print seconds for the imports, for `from_pretrained` and from there to the first token of 64."""
    model = weights.hf_directory(directory, preset)
    took: dict[tuple[str, str], list[list[float]]] = {}
    for _ in range(rounds):
        for name in contestants:
            with tempfile.TemporaryDirectory() as kernels:
                for state in ("cold", "warm"):
                    seconds = _first_token(model, name.split()[1], threads, kernels)
                    took.setdefault((name, state), []).append(seconds)
    print(f"\nstart-up: fresh processes, {rounds} rounds; cold: no kernel was ever compiled on the machine\n")
    print(
        "| start-up | imports, s | from_pretrained, s | first token after it, s | call to token, s | process, s |"
    )
    print("|---|---|---|---|---|---|")
    for (name, state), values in took.items():
        imports, load, token, process = (statistics.median(v) for v in zip(*values, strict=True))
        answer = statistics.median(v[1] + v[2] for v in values)
        print(
            f"| {name}, {state} | {imports:.2f} | {load:.2f} | {token:.2f} | {answer:.2f} | {process:.2f} |"
        )


def _first_token(model: Path, kind: str, threads: int, kernels: str) -> list[float]:
    """Seconds of the imports, `from_pretrained`, the first token after it, and the whole process."""
    places = ("XDG_CACHE_HOME", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")
    environment = {**os.environ, **dict.fromkeys(places, kernels), "OMP_NUM_THREADS": str(threads)}
    start = time.perf_counter()
    command = [sys.executable, "-c", CHILD, str(model), kind, str(threads)]
    child = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return [*json.loads(child.stdout.splitlines()[-1]), time.perf_counter() - start]
