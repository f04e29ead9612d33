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
import platform
import statistics
from pathlib import Path
from typing import Any, Literal

import torch
from jsonargparse import auto_cli
from peers import cold_start, floor, workload
from peers.turns import CPU_CONTESTANTS, Turn
from peers.workload import Sampling

from llama_ray.model.config import LlamaConfig

Scenario = Literal["single", "crowd", "mixed", "prefix", "startup", "cuda", "all"]
PROMPT, NEW = 64, 64
CROWD = 32
MIXED = ("ours bf16", "ours int8", "transformers-continuous bf16", "transformers-static bf16")

# transformers' continuous batching at its best here. With torch's attention it takes one mask over the caches of the
# whole batch, so that its work grows with the square of the batch: 8, 16 and 24 requests gave 79, 88 and 84 tok/s,
# and 24 with fewer tokens a step (256, 128) gave 78 and 77.
CONTINUOUS = {
    "max_requests_per_batch": 16,
    "max_batch_tokens": 512,
    "num_blocks": 96,
    "allow_block_sharing": False,
}

# Largest difference to the reference, in standard deviations of its log-probabilities; another model has about 1.
TOLERANCE = {"fp32": 0.02, "bf16": 0.05, "q8_0": 0.1, "int8": 0.15, "int4": 0.4}


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
) -> None:
    """Print the floor, each contestant's figures and how far it is from the floor, and a table for RESULTS.md.

    Args:
        scenario: What to measure; all is every one that runs on a CPU.
        rounds: How often each contestant takes its turn.
        directory: Where the weights are kept in every format (2 GB for llama-110m).
        preset: A preset of LlamaConfig.
        contestants: Who takes part; by default all that know the scenario.
        requests: Of the mixed scenario.
        rate: Of the mixed scenario: requests that arrive in a second, on average.
        threads: Of every contestant on a CPU.
        engine: Options of our engine, for instance {"kv_cache_memory_bytes": 4000000000}.
        continuous: Options of transformers' continuous batching.
    """
    torch.set_num_threads(threads)
    print(machine(threads), flush=True)
    if scenario == "cuda":
        from peers import cuda

        cuda.run(rounds)
        return
    config = LlamaConfig.preset(preset)
    bench = Bench(config, directory, preset, threads, rounds, engine or {})
    chosen = contestants or list(CPU_CONTESTANTS)
    ours = [name for name in chosen if name.startswith("ours ")]
    if scenario in ("single", "all"):
        bench.batch("single", 1, chosen)
    if scenario in ("crowd", "all"):
        bench.batch("crowd", CROWD, chosen)
    if scenario in ("mixed", "all"):
        bench.mixed(contestants or list(MIXED), requests, rate, {**CONTINUOUS, **(continuous or {})})
    if scenario in ("prefix", "all"):
        bench.prefix(ours)
    if scenario in ("startup", "all"):
        cold_start.run(directory, preset, ours, rounds, threads)


class Bench:
    """The scenarios; they share the machine's rates, the weights and the table that is printed at the end of each."""

    def __init__(
        self,
        config: LlamaConfig,
        directory: Path,
        preset: str,
        threads: int,
        rounds: int,
        engine: dict[str, Any],
    ) -> None:
        self.config, self.directory, self.preset = config, directory, preset
        self.threads, self.rounds, self.engine = threads, rounds, engine

    def batch(self, title: str, batch: int, contestants: list[str]) -> None:
        """`batch` requests at once, each of PROMPT and NEW tokens."""
        options = {"llama.cpp": {"max_requests": batch, "tokens": 2 * (PROMPT + NEW)}, "ours": self.engine}
        turns = self._start(contestants, options)
        rates, seconds = [], {name: list[float]() for name in contestants}
        for i in range(-1, self.rounds):  # the first is to warm up
            prompts = workload.prompts(batch, PROMPT, self.config.vocab_size, seed=i)
            rates.append(floor.measure(torch.device("cpu")))
            for turn in _rotated(turns, i):
                outputs, took = turn.call("generate", prompts, NEW, Sampling())
                if [len(o) for o in outputs] != [NEW] * batch:
                    raise RuntimeError(f"{turn.name} gave {[len(o) for o in outputs]} tokens, not {NEW} each")
                if i >= 0:
                    seconds[turn.name].append(took)
        for turn in turns:
            turn.close()
        middle = self._print_rates(f"{title}: {batch} x ({PROMPT} + {NEW} tokens)", rates)
        tokens = batch * NEW
        figures = {name: [tokens / s for s in took] for name, took in seconds.items()}
        bounds = {
            name: tokens / floor.batch_s(self.config, middle, name.split()[1], batch, PROMPT, NEW)
            for name in contestants
        }
        print(f"| {title} | tok/s | spread | at best | of that |\n|---|---|---|---|---|")
        for name, values in figures.items():
            rate = statistics.median(values)
            spread = (max(values) - min(values)) / rate
            print(
                f"| {name} | {rate:,.0f} | {spread:.0%} | {bounds[name]:,.0f} | {rate / bounds[name]:.0%} |"
            )
        _print_ratios(figures)

    def mixed(self, contestants: list[str], requests: int, rate: float, continuous: dict[str, Any]) -> None:
        """`requests` of mixed lengths that arrive over time."""
        options = {
            "ours": self.engine,
            "transformers-continuous": continuous,
            "transformers-static": {"batch_size": 16},
        }
        turns = self._start(contestants, options)
        rates, runs = [], {name: list[workload.Waits]() for name in contestants}
        warm_up = workload.poisson_arrivals(
            4, 100.0, self.config.vocab_size, self.config.max_seq_len, seed=-1
        )
        for turn in turns:
            turn.call("serve", warm_up, Sampling())
        for i in range(self.rounds):
            load = workload.poisson_arrivals(
                requests, rate, self.config.vocab_size, self.config.max_seq_len, i
            )
            rates.append(floor.measure(torch.device("cpu")))
            for turn in _rotated(turns, i):
                times, _ = turn.call("serve", load, Sampling())
                runs[turn.name].append(workload.waits(load, times))
                print(f"  round {i}, {turn.name}: {runs[turn.name][-1]}", flush=True)
        for turn in turns:
            turn.close()
        lengths = [(len(r.prompt), r.new_tokens) for r in load]
        tokens = sum(new for _, new in lengths)
        title = f"mixed: {requests} requests, {rate} a second, {tokens:,} new tokens in the last round"
        middle = self._print_rates(title, rates)
        head = "tok/s | at best | of that | first token p50, s | p99, s | between tokens p99, ms"
        print(f"| mixed | {head} |\n|---|---|---|---|---|---|---|")
        figures = {name: [tokens / w.whole_s for w in got] for name, got in runs.items()}
        for name, got in runs.items():
            value = statistics.median(figures[name])
            bound = tokens / floor.served_s(self.config, middle, name.split()[1], lengths)
            waited = [
                statistics.median(w.first_p50_s for w in got),
                statistics.median(w.first_p99_s for w in got),
            ]
            between = 1000 * statistics.median(w.between_p99_s for w in got)
            print(f"| {name} | {value:,.0f} | {bound:,.0f} | {value / bound:.0%} |", end=" ")
            print(f"{waited[0]:.1f} | {waited[1]:.1f} | {between:,.0f} |")
        _print_ratios(figures)

    def prefix(self, contestants: list[str]) -> None:
        """Seconds to the first token of 512 + 16 tokens, with nothing cached and with the 512 cached."""
        turns = self._start(contestants, {"ours": {**self.engine, "enable_prefix_caching": True}})
        rates, cold, cached = (
            [],
            {t.name: list[float]() for t in turns},
            {t.name: list[float]() for t in turns},
        )
        for i in range(-1, self.rounds):
            (prefix, *ends) = workload.prompts(3, 512, self.config.vocab_size, seed=i)
            rates.append(floor.measure(torch.device("cpu")))
            for turn in _rotated(turns, i):
                first, _ = turn.call("first_token_s", prefix + ends[0][:16])
                second, _ = turn.call("first_token_s", prefix + ends[1][:16])
                if i >= 0:
                    cold[turn.name].append(first)
                    cached[turn.name].append(second)
        for turn in turns:
            turn.close()
        middle = self._print_rates("prefix: 512 shared tokens and 16 others", rates)
        print("| prefix | cold, ms | at best | cached, ms | at best | ratio |\n|---|---|---|---|---|---|")
        for name in cold:
            kind = name.split()[1]
            least = [1000 * floor.prompts_s(self.config, middle, kind, [n]) for n in (528, 16)]
            ratio = statistics.median(a / b for a, b in zip(cold[name], cached[name], strict=True))
            took = [1000 * statistics.median(cold[name]), 1000 * statistics.median(cached[name])]
            print(
                f"| {name} | {took[0]:,.0f} | {least[0]:,.0f} | {took[1]:,.1f} | {least[1]:,.1f} | {ratio:.1f} |"
            )

    def _start(self, contestants: list[str], options: dict[str, dict[str, Any]]) -> list[Turn]:
        """All contestants, checked against transformers in fp32."""
        prompt = workload.prompts(1, 48, self.config.vocab_size, seed=0)[0]
        judge = Turn("transformers fp32", self.directory, self.preset, self.threads, {})
        reference, _ = judge.call("logprobs", prompt)
        judge.close()
        scale = statistics.pstdev(reference.values())
        turns = []
        for name in contestants:
            who, kind = name.split()
            turns.append(Turn(name, self.directory, self.preset, self.threads, options.get(who, {})))
            got, _ = turns[-1].call("logprobs", prompt)
            off = statistics.fmean((value - reference[i]) ** 2 for i, value in got.items()) ** 0.5 / scale
            print(
                f"  {name}: log-probabilities differ from transformers fp32 by {off:.4f} of their deviation"
            )
            if off > TOLERANCE[kind]:
                raise RuntimeError(f"{name} computes another model: {off:.3f} is above {TOLERANCE[kind]}")
        return turns

    def _print_rates(self, title: str, measured: list[floor.Rates]) -> floor.Rates:
        rates = floor.median(measured)
        products = ", ".join(f"{kind} {value / 1e9:,.0f}" for kind, value in rates.product.items())
        print(f"\n{title}; {self.rounds} rounds")
        print(f"memory {rates.bandwidth / 1e9:.1f} GB/s; matrix products {products} GOP/s\n")
        return rates


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


def _rotated(turns: list[Turn], start: int) -> list[Turn]:
    """None is always first or last."""
    start %= len(turns)
    return turns[start:] + turns[:start]


def _print_ratios(figures: dict[str, list[float]]) -> None:
    """Each of ours over each peer, the median of the ratios within a round."""
    ours = [name for name in figures if name.startswith("ours ")]
    peers = [name for name in figures if name not in ours]
    if not ours or not peers:
        return
    print(f"\n| ratio | {' | '.join(peers)} |\n|---|{'---|' * len(peers)}")
    for name in ours:
        ratios = [
            statistics.median(a / b for a, b in zip(figures[name], figures[p], strict=True)) for p in peers
        ]
        print(f"| {name} | {' | '.join(f'{r:.2f}' for r in ratios)} |")


if __name__ == "__main__":
    auto_cli(main)
