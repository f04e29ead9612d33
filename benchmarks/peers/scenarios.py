"""The scenarios that run on a CPU: the floor first, then rounds in which contestants take turns, then the tables."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llama_ray.model.config import LlamaConfig
from peers import floor, workload
from peers.turns import Turn
from peers.workload import Sampling

PROMPT, NEW = 64, 64  # tokens of a request in `batch`
PREFIX, END = 512, 16  # tokens of a prompt in `prefix`
CPU = torch.device("cpu")

# Largest difference to the reference, in standard deviations of its log-probabilities. Queries and keys in the wrong
# order (a GGUF without llama.cpp's permutation) give 0.67.
TOLERANCE = {"fp32": 0.02, "bf16": 0.05, "q8_0": 0.1, "int8": 0.15, "int4": 0.55}


@dataclass(frozen=True)
class Setting:
    """What all scenarios share: the model, where its files are, threads of each contestant, and rounds.

    `options` are those of the contestants' constructors, by who they are ("ours", "transformers-continuous").
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

    def start(self, contestants: list[str], **options: dict[str, Any]) -> list[Turn]:
        """All contestants, each checked against transformers in fp32. Raises RuntimeError for another model."""
        prompt = workload.prompts(1, 48, self.config.vocab_size, seed=0)[0]
        judge = Turn("transformers fp32", self.directory, self.preset, self.threads, {})
        reference, _ = judge.call("logprobs", prompt)
        judge.close()
        scale = statistics.pstdev(reference.values())
        turns = []
        for name in contestants:
            who, kind = name.split()
            given = {**self.options.get(who, {}), **options.get(who, {})}
            turns.append(Turn(name, self.directory, self.preset, self.threads, given))
            got, _ = turns[-1].call("logprobs", prompt)
            off = statistics.fmean((value - reference[i]) ** 2 for i, value in got.items()) ** 0.5 / scale
            print(
                f"  {name}: its log-probabilities are {off:.4f} of their deviation from transformers fp32",
                flush=True,
            )
            if off > TOLERANCE[kind]:
                raise RuntimeError(f"{name} computes another model: {off:.3f} is above {TOLERANCE[kind]}")
        return turns

    def print_floor(self, title: str, unit: str, at_best: Callable[[floor.Rates, str], float]) -> None:
        """Print the rates now, and the best that any system could do with weights of each format."""
        rates = floor.measure(CPU)
        print(f"\n{title}; {self.rounds} rounds\n{rates}")
        bounds = ", ".join(f"{kind} {at_best(rates, kind):,.0f}" for kind in floor.WEIGHT_BYTES)
        print(f"at best: {bounds} {unit}", flush=True)


def batch(setting: Setting, title: str, count: int, contestants: list[str]) -> None:
    """`count` requests at once, each of PROMPT and NEW tokens."""
    tokens = count * NEW

    def at_best(rates: floor.Rates, kind: str) -> float:
        return tokens / floor.batch_s(setting.config, rates, kind, count, PROMPT, NEW)

    setting.print_floor(f"{title}: {count} x ({PROMPT} + {NEW} tokens)", "tok/s", at_best)
    length = 2 * (PROMPT + NEW)
    # A cache of the size that the task needs for both: after the first round all of its memory has been used before,
    # as in a server that runs for a while. The system takes as long to hand out new memory as a tenth of a round.
    # One sequence more, because our engine keeps a block for itself.
    cache = (count + 1) * length * floor.cache_bytes(setting.config)
    options: dict[str, dict[str, Any]] = {
        "llama.cpp": {"max_requests": count, "tokens": length},
        "ours": {"max_seq_len": length, "kv_cache_memory_bytes": cache},
    }
    turns = setting.start(contestants, **options)
    rates, figures = [], {name: list[float]() for name in contestants}
    warm_up = workload.prompts(count, PROMPT, setting.config.vocab_size, seed=-1)
    for turn in turns:
        turn.call("generate", warm_up, 4, Sampling())
    for i in range(setting.rounds):
        prompts = workload.prompts(count, PROMPT, setting.config.vocab_size, seed=i)
        rates.append(floor.measure(CPU))
        for turn in _rotated(turns, i):
            outputs, took = turn.call("generate", prompts, NEW, Sampling())
            if [len(o) for o in outputs] != [NEW] * count:
                raise RuntimeError(f"{turn.name} gave {[len(o) for o in outputs]} tokens, not {NEW} each")
            figures[turn.name].append(tokens / took)
        print(f"  round {i}: {', '.join(f'{n} {v[-1]:,.0f}' for n, v in figures.items())}", flush=True)
    _close(turns)
    middle = floor.median(rates)
    print(f"in the median {middle}\n")
    print(f"| {title} | tok/s | spread | at best | of that |\n|---|---|---|---|---|")
    for name, values in figures.items():
        rate, bound = statistics.median(values), at_best(middle, name.split()[1])
        spread = (max(values) - min(values)) / rate
        print(f"| {name} | {rate:,.0f} | {spread:.0%} | {bound:,.0f} | {rate / bound:.0%} |")
    _print_ratios(figures)


def mixed(setting: Setting, contestants: list[str], requests: int, rate: float) -> None:
    """`requests` of mixed lengths that arrive over time, `rate` a second."""
    config = setting.config
    loads = [
        workload.poisson_arrivals(requests, rate, config.vocab_size, config.max_seq_len, seed)
        for seed in range(setting.rounds)
    ]
    tokens = [sum(r.new_tokens for r in load) for load in loads]

    def at_best(rates: floor.Rates, kind: str) -> float:
        lengths = [(len(r.prompt), r.new_tokens) for r in loads[0]]
        return tokens[0] / floor.served_s(config, rates, kind, lengths)

    setting.print_floor(f"mixed: {requests} requests, {rate} a second", "tok/s", at_best)
    turns = setting.start(contestants)
    warm_up = workload.poisson_arrivals(4, 100.0, config.vocab_size, config.max_seq_len, seed=-1)
    for turn in turns:
        turn.call("serve", warm_up, Sampling())
    rates, runs = [], {name: list[workload.Waits]() for name in contestants}
    for i, load in enumerate(loads):
        rates.append(floor.measure(CPU))
        for turn in _rotated(turns, i):
            times, _ = turn.call("serve", load, Sampling())
            runs[turn.name].append(workload.waits(load, times))
            print(f"  round {i}, {turn.name}: {runs[turn.name][-1]}", flush=True)
    _close(turns)
    middle = floor.median(rates)
    print(f"in the median {middle}\n")
    head = "tok/s | at best | of that | first token p50, s | p99, s | between tokens p99, ms"
    print(f"| mixed | {head} |\n|---|---|---|---|---|---|---|")
    figures = {}
    for name, got in runs.items():
        figures[name] = [n / w.whole_s for n, w in zip(tokens, got, strict=True)]
        value, bound = statistics.median(figures[name]), at_best(middle, name.split()[1])
        first_p50 = statistics.median(w.first_p50_s for w in got)
        first_p99 = statistics.median(w.first_p99_s for w in got)
        between = 1000 * statistics.median(w.between_p99_s for w in got)
        print(f"| {name} | {value:,.0f} | {bound:,.0f} | {value / bound:.0%} |", end=" ")
        print(f"{first_p50:.1f} | {first_p99:.1f} | {between:,.0f} |")
    _print_ratios(figures)


def prefix(setting: Setting, contestants: list[str]) -> None:
    """The time to the first token, with nothing cached and with the first PREFIX tokens of the prompt cached."""

    def at_best(rates: floor.Rates, kind: str, length: int = PREFIX + END) -> float:
        return 1000 * floor.prompts_s(setting.config, rates, kind, [length])

    setting.print_floor(f"prefix: {PREFIX} shared tokens and {END} others, nothing cached", "ms", at_best)
    turns = setting.start(contestants, ours={"enable_prefix_caching": True})
    rates, took = [], {name: list[tuple[float, float]]() for name in contestants}
    for i in range(-1, setting.rounds):
        shared, *ends = workload.prompts(3, PREFIX, setting.config.vocab_size, seed=i)
        rates.append(floor.measure(CPU))
        for turn in _rotated(turns, i):
            cold, cached = (turn.call("first_token_s", shared + end[:END])[0] for end in ends)
            if i >= 0:
                took[turn.name].append((cold, cached))
    _close(turns)
    middle = floor.median(rates)
    print(f"in the median {middle}\n")
    print("| prefix | cold, ms | at best | cached, ms | at best | ratio |\n|---|---|---|---|---|---|")
    for name, pairs in took.items():
        cold, cached = (1000 * statistics.median(values) for values in zip(*pairs, strict=True))
        least, less = (at_best(middle, name.split()[1], length) for length in (PREFIX + END, END))
        ratio = statistics.median(a / b for a, b in pairs)
        print(f"| {name} | {cold:,.0f} | {least:,.0f} | {cached:,.1f} | {less:,.1f} | {ratio:.1f} |")


def _rotated(turns: list[Turn], start: int) -> list[Turn]:
    """A different one starts each round: none is always first or last."""
    start %= len(turns)
    return turns[start:] + turns[:start]


def _close(turns: list[Turn]) -> None:
    for turn in turns:
        turn.close()


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
