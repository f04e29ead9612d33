"""The CPU scenarios: print the roofline, run rounds in which the contestants alternate, print tables."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama_ray.model.config import LlamaConfig
from peers import roofline, workload
from peers.contestant_process import ContestantProcess
from peers.workload import Sampling

# Tokens of a request in `batch`.
PROMPT, NEW = 64, 64
# Tokens of a prompt in `prefix`: a prefix that can be cached, and the rest.
PREFIX, REST = 512, 16

# Largest accepted difference from the reference, in standard deviations of the reference's log-probabilities. Queries
# and keys in the wrong order (a GGUF without llama.cpp's permutation) differ by 0.67.
TOLERANCE = {"fp32": 0.02, "bf16": 0.05, "q8_0": 0.1, "int8": 0.15, "int4": 0.55}


@dataclass(frozen=True)
class Setting:
    """What all scenarios share: the model, the directory of its files, threads of each contestant, and rounds.

    `options` maps a system ("ours", "transformers-continuous") to its constructor's options.
    """

    preset: str
    directory: Path
    threads: int
    rounds: int
    options: dict[str, dict[str, Any]]

    @property
    def config(self) -> LlamaConfig:
        """The model's shape."""
        return LlamaConfig.preset(self.preset)

    def start(self, names: list[str], **options: dict[str, Any]) -> list[ContestantProcess]:
        """Start the contestants; raise RuntimeError if the log-probabilities of one are not transformers' in fp32."""
        prompt = workload.prompts(1, 48, self.config.vocab_size, seed=0)[0]
        transformers = self._process("transformers fp32", {})
        reference, _ = transformers.call("logprobs", prompt)
        transformers.close()
        deviation = statistics.pstdev(reference.values())
        contestants = []
        for name in names:
            system, kind = name.split()
            contestant = self._process(name, {**self.options.get(system, {}), **options.get(system, {})})
            contestants.append(contestant)
            got, _ = contestant.call("logprobs", prompt)
            off = statistics.fmean((value - reference[i]) ** 2 for i, value in got.items()) ** 0.5 / deviation
            print(
                f"  {name}: log-probabilities differ from transformers fp32 by {off:.4f} deviations",
                flush=True,
            )
            if off > TOLERANCE[kind]:
                raise RuntimeError(f"{name} computes another model: {off:.3f} is above {TOLERANCE[kind]}")
        return contestants

    def _process(self, name: str, options: dict[str, Any]) -> ContestantProcess:
        return ContestantProcess(name, self.directory, self.preset, self.threads, options)

    def print_roofline(self, title: str, unit: str, bound: Callable[[roofline.Rates, str], float]) -> None:
        """Print the machine's rates now, and the best possible figure with weights of each format."""
        rates = roofline.measure()
        print(f"\n{title}; {self.rounds} rounds\n{rates}")
        bounds = ", ".join(f"{kind} {bound(rates, kind):,.0f}" for kind in roofline.WEIGHT_BYTES)
        print(f"roofline: {bounds} {unit}", flush=True)


def batch(setting: Setting, title: str, count: int, names: list[str]) -> None:
    """Run `count` requests at once, each of PROMPT and NEW tokens."""
    tokens = count * NEW

    def bound(rates: roofline.Rates, kind: str) -> float:
        return tokens / roofline.batch_s(setting.config, rates, kind, count, PROMPT, NEW)

    setting.print_roofline(f"{title}: {count} x ({PROMPT} + {NEW} tokens)", "tok/s", bound)
    contestants = setting.start(names, **_cache_options(setting, count))
    rates, figures = [], {name: list[float]() for name in names}
    warm_up = workload.prompts(count, PROMPT, setting.config.vocab_size, seed=-1)
    for contestant in contestants:
        contestant.call("generate", warm_up, 4, Sampling())
    for i in range(setting.rounds):
        prompts = workload.prompts(count, PROMPT, setting.config.vocab_size, seed=i)
        rates.append(roofline.measure())
        for contestant in _rotated(contestants, i):
            outputs, seconds = contestant.call("generate", prompts, NEW, Sampling())
            if [len(o) for o in outputs] != [NEW] * count:
                raise RuntimeError(
                    f"{contestant.name} gave {[len(o) for o in outputs]} tokens, not {NEW} each"
                )
            figures[contestant.name].append(tokens / seconds)
        print(f"  round {i}: {', '.join(f'{n} {v[-1]:,.0f}' for n, v in figures.items())}", flush=True)
    _close(contestants)
    median = _print_median(rates)
    print(f"| {title} | tok/s | spread | roofline | of roofline |\n|---|---|---|---|---|")
    for name, values in figures.items():
        rate, best = statistics.median(values), bound(median, name.split()[1])
        spread = (max(values) - min(values)) / rate
        print(f"| {name} | {rate:,.0f} | {spread:.0%} | {best:,.0f} | {rate / best:.0%} |")
    _print_ratios(figures)


def _cache_options(setting: Setting, count: int) -> dict[str, dict[str, Any]]:
    """Give llama.cpp and our engine a cache of the size that `count` requests need.

    After the first round all of its memory has been used before, as in a server that has run for a while. Getting new
    memory from the system takes a tenth of a round. Our engine gets one sequence more, as it reserves a block.
    """
    length = 2 * (PROMPT + NEW)
    cache = (count + 1) * length * roofline.cache_bytes(setting.config)
    return {
        "llama.cpp": {"max_requests": count, "tokens": length},
        "ours": {"max_seq_len": length, "kv_cache_memory_bytes": cache},
    }


def mixed(setting: Setting, names: list[str], requests: int, rate: float) -> None:
    """Run `requests` of mixed lengths that arrive over time, `rate` a second."""
    config = setting.config
    loads = [
        workload.poisson_arrivals(requests, rate, config.vocab_size, config.max_seq_len, seed)
        for seed in range(setting.rounds)
    ]
    tokens = [sum(r.new_tokens for r in load) for load in loads]

    def bound(rates: roofline.Rates, kind: str) -> float:
        lengths = [(len(r.prompt), r.new_tokens) for r in loads[0]]
        return tokens[0] / roofline.served_s(config, rates, kind, lengths)

    setting.print_roofline(f"mixed: {requests} requests, {rate} a second", "tok/s", bound)
    contestants = setting.start(names)
    warm_up = workload.poisson_arrivals(4, 100.0, config.vocab_size, config.max_seq_len, seed=-1)
    for contestant in contestants:
        contestant.call("serve", warm_up, Sampling())
    rates, runs = [], {name: list[workload.Latencies]() for name in names}
    for i, load in enumerate(loads):
        rates.append(roofline.measure())
        for contestant in _rotated(contestants, i):
            times, _ = contestant.call("serve", load, Sampling())
            runs[contestant.name].append(workload.latencies(load, times))
            print(f"  round {i}, {contestant.name}: {runs[contestant.name][-1]}", flush=True)
    _close(contestants)
    median = _print_median(rates)
    head = "tok/s | roofline | of roofline | first token p50, s | p99, s | between tokens p99, ms"
    print(f"| mixed | {head} |\n|---|---|---|---|---|---|---|")
    figures = {}
    for name, got in runs.items():
        figures[name] = [n / w.total_s for n, w in zip(tokens, got, strict=True)]
        value, best = statistics.median(figures[name]), bound(median, name.split()[1])
        first_p50 = statistics.median(w.first_p50_s for w in got)
        first_p99 = statistics.median(w.first_p99_s for w in got)
        between = 1000 * statistics.median(w.between_p99_s for w in got)
        print(f"| {name} | {value:,.0f} | {best:,.0f} | {value / best:.0%} |", end=" ")
        print(f"{first_p50:.1f} | {first_p99:.1f} | {between:,.0f} |")
    _print_ratios(figures)


def prefix(setting: Setting, names: list[str]) -> None:
    """Time the first token, with nothing cached and with the first PREFIX tokens of the prompt cached."""

    def bound(rates: roofline.Rates, kind: str, length: int = PREFIX + REST) -> float:
        return 1000 * roofline.prompts_s(setting.config, rates, kind, [length])

    setting.print_roofline(f"prefix: {PREFIX} shared tokens and {REST} more, nothing cached", "ms", bound)
    contestants = setting.start(names, ours={"enable_prefix_caching": True})
    rates, seconds = [], {name: list[tuple[float, float]]() for name in names}
    for i in range(-1, setting.rounds):
        shared, *rests = workload.prompts(3, PREFIX, setting.config.vocab_size, seed=i)
        rates.append(roofline.measure())
        for contestant in _rotated(contestants, i):
            cold, cached = (contestant.call("first_token_s", shared + rest[:REST])[0] for rest in rests)
            if i >= 0:
                seconds[contestant.name].append((cold, cached))
    _close(contestants)
    median = _print_median(rates)
    print("| prefix | cold, ms | roofline | cached, ms | roofline | ratio |\n|---|---|---|---|---|---|")
    for name, pairs in seconds.items():
        cold, cached = (1000 * statistics.median(values) for values in zip(*pairs, strict=True))
        best_cold, best_cached = (bound(median, name.split()[1], n) for n in (PREFIX + REST, REST))
        ratio = statistics.median(a / b for a, b in pairs)
        print(
            f"| {name} | {cold:,.0f} | {best_cold:,.0f} | {cached:,.1f} | {best_cached:,.1f} | {ratio:.1f} |"
        )


def _rotated(contestants: list[ContestantProcess], start: int) -> list[ContestantProcess]:
    """Begin with a different contestant in each round, so that none is always first or last."""
    start %= len(contestants)
    return contestants[start:] + contestants[:start]


def _close(contestants: list[ContestantProcess]) -> None:
    for contestant in contestants:
        contestant.close()


def _print_median(rates: list[roofline.Rates]) -> roofline.Rates:
    median = roofline.median(rates)
    print(f"medians: {median}\n")
    return median


def _print_ratios(figures: dict[str, list[float]]) -> None:
    """Print each of ours over each peer, as the median of the ratios within a round."""
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
