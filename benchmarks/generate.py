"""Our generation engine beside its peers: the same weights, prompts and sampling, in alternating rounds.

    pip install -e ".[dev,bench]"
    python benchmarks/generate.py --scenario single       # 1 request, 64 prompt tokens and 64 new ones
    python benchmarks/generate.py --scenario crowd        # 32 of them at once
    python benchmarks/generate.py --scenario mixed        # 256 of mixed lengths that arrive over time
    python benchmarks/generate.py --scenario prefix       # first token with and without a cached prefix of 512
    python benchmarks/generate.py --scenario startup      # a fresh process: from_pretrained to the first token
    python benchmarks/generate.py --scenario cuda         # on a GPU; needs no peer but transformers

Each contestant lives in a process of its own and they take turns; figures are medians of the rounds, ratios medians
of the ratios within a round. Before anything is timed, every contestant's log-probabilities for a prompt are
compared with transformers' in fp32: one that computes another model is no contestant. The floor is what the bytes
and operations of the task need at the bandwidth and the rate of a large matrix product measured in the same rounds.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any, Literal

import torch
from jsonargparse import auto_cli
from peers import cold_start, scenarios
from peers.turns import CPU_CONTESTANTS

Scenario = Literal["single", "crowd", "mixed", "prefix", "startup", "cuda", "all"]
CROWD = 32
MIXED = ("ours bf16", "ours int8", "transformers-continuous bf16", "transformers-static bf16")

# transformers' continuous batching at its best here. With torch's attention it takes one mask over the caches of the
# whole batch, so that its work grows with the square of the batch: 8, 16 and 24 requests gave 79, 88 and 84 tok/s,
# and 24 with fewer tokens a step (256, 128) gave 78 and 77.
CONTINUOUS = {
    "max_requests_per_batch": 16,
    "max_num_batched_tokens": 512,
    "num_blocks": 96,
    "allow_block_sharing": False,
}


def main(
    scenario: Scenario = "all",
    rounds: int = 5,
    directory: Path = Path("/tmp/llama_ray-benchmark"),
    preset: str = "llama-110m",
    contestants: list[str] | None = None,
    requests: int = 256,
    rate: float = 8.0,
    threads: int = 2,
    engine: dict[str, Any] | None = None,
    continuous: dict[str, Any] | None = None,
    static: dict[str, Any] | None = None,
) -> None:
    """Print the floor, each contestant's figures and how far it is from the floor, in tables for RESULTS.md.

    Args:
        scenario: What to measure; all is every one that runs on a CPU.
        rounds: How often each contestant takes its turn.
        directory: Where the weights are kept in every format (1.3 GB for llama-110m).
        preset: A preset of LlamaConfig.
        contestants: Who takes part; by default all that know the scenario.
        requests: Of the mixed scenario.
        rate: Of the mixed scenario: requests that arrive in a second, on average.
        threads: Of every contestant on a CPU.
        engine: Options of our engine, for instance {"kv_cache_memory_bytes": 4000000000}.
        continuous: Options of transformers' continuous batching, beside those found best here.
        static: Options of transformers' static batches in the mixed scenario: {"batch_size": 16}.
    """
    torch.set_num_threads(threads)
    os.environ["OMP_NUM_THREADS"] = str(threads)  # of the contestants' processes, read when they begin
    print(machine(threads), flush=True)
    if scenario == "cuda":
        from peers import cuda

        cuda.run(rounds)
        return
    options = {
        "ours": engine or {},
        "transformers-continuous": {**CONTINUOUS, **(continuous or {})},
        "transformers-static": static or {},
    }
    setting = scenarios.Setting(preset, directory, threads, rounds, options)
    chosen = contestants or list(CPU_CONTESTANTS)
    ours = [name for name in chosen if name.startswith("ours ")]
    if scenario in ("single", "all"):
        scenarios.batch(setting, "single", 1, chosen)
    if scenario in ("crowd", "all"):
        scenarios.batch(setting, "crowd", CROWD, chosen)
    if scenario in ("mixed", "all"):
        scenarios.mixed(setting, contestants or list(MIXED), requests, rate)
    if scenario in ("prefix", "all"):
        scenarios.prefix(setting, ours)
    if scenario in ("startup", "all"):
        cold_start.run(directory, preset, ours, rounds, threads)


def machine(threads: int) -> str:
    """The machine and the versions of whoever is installed."""
    packages = ("torch", "transformers", "ctranslate2", "llama-cpp-python")
    installed = {d.metadata["Name"].replace("_", "-").lower() for d in importlib.metadata.distributions()}
    versions = [f"{p} {importlib.metadata.version(p)}" for p in packages if p in installed]
    if torch.cuda.is_available():
        processor = torch.cuda.get_device_name()
    else:
        models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line]
        processor = models[0].split(": ")[1] if models else platform.processor()
    return f"{processor}, {threads} threads; Python {platform.python_version()}, {', '.join(versions)}"


if __name__ == "__main__":
    auto_cli(main)
