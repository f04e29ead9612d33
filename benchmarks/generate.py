"""Our generation engine beside its peers: the same weights, prompts and sampling parameters, in alternating rounds.

    python benchmarks/generate.py --scenario single    # 1 request of 64 + 64 tokens; 2 minutes on 2 cores
    python benchmarks/generate.py --scenario crowd     # 32 of them at once; 5 minutes
    python benchmarks/generate.py --scenario mixed --rounds 1    # 256 mixed ones that arrive over time; 20 minutes
    python benchmarks/generate.py --scenario prefix    # first token with and without a cached prefix of 512; 1 minute
    python benchmarks/generate.py --scenario startup   # a fresh process, to the first token; 1 minute

Needs `pip install -e ".[dev,bench]"`, which compiles llama.cpp. With `--contestants '["ours bf16"]'` it
needs no peer but transformers. The first run writes the weights in every format, 1.3 GB, in a minute. For GPUs there is
`make gpu`.

Each contestant has its own process, and they alternate. Figures are medians of the rounds, ratios are medians of the
ratios within a round. Before anything is timed, every contestant's log-probabilities for a prompt are compared with
transformers' in fp32; a contestant that computes another model stops the run. The roofline is the least time that the
bytes and operations of the task need at the memory bandwidth and the rate of a large matrix product, both measured in
the same rounds.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any, Literal

import torch
from jsonargparse import auto_cli
from peers import scenarios, startup
from peers.contestant_process import CPU_CONTESTANTS

Scenario = Literal["single", "crowd", "mixed", "prefix", "startup", "all"]
CROWD = 32
MIXED = ("ours bf16", "ours int8", "transformers-continuous bf16", "transformers-static bf16")

# The best settings found for transformers' continuous batching. With torch's attention it uses one mask over the caches
# of the whole batch, so its work grows with the square of the batch: 8, 16 and 24 requests gave 79, 88 and 84 tok/s,
# and 24 requests with fewer tokens a step (256, 128) gave 78 and 77.
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
    """Print the roofline, and each contestant's figures and share of the roofline, as tables for RESULTS.md.

    Args:
        scenario: What to measure; all means every scenario.
        rounds: Measurements of each contestant.
        directory: Where the weights are kept in every format (1.3 GB for llama-110m).
        preset: A preset of LlamaConfig.
        contestants: A JSON list such as ["ours int8", "llama.cpp q8_0"]; by default all that support the scenario.
        requests: Requests of the mixed scenario.
        rate: Requests that arrive in a second, on average, in the mixed scenario.
        threads: Threads of each contestant on a CPU.
        engine: Options of our engine, for instance {"kv_cache_memory_bytes": 4000000000}.
        continuous: Options of transformers' continuous batching, in addition to the best ones found.
        static: Options of transformers' static batches in the mixed scenario: {"batch_size": 16}.
    """
    torch.set_num_threads(threads)
    # The contestants' processes read it when they start.
    os.environ["OMP_NUM_THREADS"] = str(threads)
    print(machine(threads), flush=True)
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
        startup.run(directory, preset, ours, rounds, threads)


def machine(threads: int) -> str:
    """Return the machine and the versions of the installed contestants."""
    packages = ("torch", "transformers", "ctranslate2", "llama-cpp-python")
    installed = {d.metadata["Name"].replace("_", "-").lower() for d in importlib.metadata.distributions()}
    versions = [f"{p} {importlib.metadata.version(p)}" for p in packages if p in installed]
    models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line]
    processor = models[0].split(": ")[1] if models else platform.processor()
    return f"{processor}, {threads} threads; Python {platform.python_version()}, {', '.join(versions)}"


if __name__ == "__main__":
    auto_cli(main)
