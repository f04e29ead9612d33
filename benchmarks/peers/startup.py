"""Start-up: seconds to the first token of a fresh process, with an empty (cold) or filled (warm) kernel cache."""

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
loaded = time.perf_counter()
engine.generate([list(range(3, 67))], SamplingParams(max_tokens=1, ignore_eos=True))
print(json.dumps([imported - start, loaded - imported, time.perf_counter() - loaded]))
"""


def run(directory: Path, preset: str, contestants: list[str], rounds: int, threads: int) -> None:
    """Print the seconds of imports, of `from_pretrained`, and from there to the first token after 64 prompt tokens."""
    model = weights.hf_directory(directory, preset)
    seconds: dict[tuple[str, str], list[list[float]]] = {}
    for _ in range(rounds):
        for name in contestants:
            with tempfile.TemporaryDirectory() as kernels:
                for state in ("cold", "warm"):
                    parts = _first_token(model, name.split()[1], threads, kernels)
                    seconds.setdefault((name, state), []).append(parts)
    print(f"\nstart-up: fresh processes, {rounds} rounds; cold: with an empty kernel cache\n")
    print(
        "| start-up | imports, s | from_pretrained, s | first token after it, s | call to token, s | process, s |"
    )
    print("|---|---|---|---|---|---|")
    for (name, state), values in seconds.items():
        imports, load, token, process = (statistics.median(v) for v in zip(*values, strict=True))
        load_and_token = statistics.median(v[1] + v[2] for v in values)
        print(
            f"| {name}, {state} | {imports:.2f} | {load:.2f} | {token:.2f} | {load_and_token:.2f} | {process:.2f} |"
        )


def _first_token(model: Path, kind: str, threads: int, kernels: str) -> list[float]:
    """Return the seconds of imports, `from_pretrained`, the first token after it, and the whole process."""
    cache_variables = ("XDG_CACHE_HOME", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")
    environment = {**os.environ, **dict.fromkeys(cache_variables, kernels), "OMP_NUM_THREADS": str(threads)}
    start = time.perf_counter()
    command = [sys.executable, "-c", CHILD, str(model), kind, str(threads)]
    child = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return [*json.loads(child.stdout.splitlines()[-1]), time.perf_counter() - start]
