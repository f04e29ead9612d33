"""Milliseconds of sampling in one step, by batch size and sampling parameters, on random logits.

    python benchmarks/sampling.py [--vocab_size 32000] [--device cpu] [--threads 2]    # 1 minute on 2 cores

Needs only torch; `--device cuda` runs on a GPU. Every row has its own seed and a prompt of 256 tokens. Each figure is
the median of `--repeats` calls with an unchanged batch; `new` is the same with a new batch in each call.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from jsonargparse import auto_cli
from torch import Tensor

from llama_ray.generation.backends.prepare import sampler_ops
from llama_ray.generation.constraints.grammar import Constraint
from llama_ray.generation.sampling.bad_words import BadWords
from llama_ray.generation.sampling.params import SamplingParams
from llama_ray.generation.sampling.penalties import TokenCounts
from llama_ray.generation.sampling.sampler import Sampler

CASES: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0},
    "plain": {},
    "top-k 40, top-p 0.9": {"temperature": 0.8, "top_k": 40, "top_p": 0.9},
    "the same, penalties": {"temperature": 0.8, "top_k": 40, "top_p": 0.9, "repetition_penalty": 1.1},
    "top-p 0.9": {"temperature": 0.8, "top_p": 0.9},
    "greedy, 5 logprobs": {"temperature": 0, "logprobs": 5},
}


@dataclass
class Row:
    """A sequence as the sampler sees it."""

    params: SamplingParams
    seed: int
    prompt: list[int]
    index: int = 0
    output: list[int] = field(default_factory=list)
    draft: tuple[int, ...] = ()
    end_ids: tuple[int, ...] = ()
    constraint: Constraint | None = None
    bad_words: BadWords | None = None

    def __post_init__(self) -> None:
        self.counts = TokenCounts.of(self.params, self.prompt)


def milliseconds(call: Callable[[], object], repeats: int, synchronise: Callable[[], object]) -> float:
    """Return the median milliseconds of `repeats` calls."""
    times = []
    for _ in range(repeats):
        synchronise()
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times) * 1e3


def main(vocab_size: int = 32000, device: str = "cpu", threads: int = 2, repeats: int = 100) -> None:
    """Print one line for each set of sampling parameters.

    Args:
        vocab_size: Tokens of the vocabulary.
        device: cpu, cuda or cuda:N.
        threads: Threads on a CPU.
        repeats: Calls that each figure is the median of.
    """
    torch.set_num_threads(threads)
    synchronise = torch.cuda.synchronize if device.startswith("cuda") else (lambda: None)
    sizes = (1, 32, 256)
    print(f"{'ms a step':24}" + "".join(f"{n:>8} rows{'new':>8}" for n in sizes))
    for name, values in CASES.items():
        line = f"{name:24}"
        for n in sizes:
            generator = torch.Generator().manual_seed(n)
            logits = (torch.randn(n, vocab_size, generator=generator) * 3).to(device)
            params = SamplingParams(**values)
            prompts = torch.randint(vocab_size, (n, 256), generator=generator).tolist()
            rows = [Row(params, seed, prompt) for seed, prompt in enumerate(prompts)]
            kept = Sampler(sampler_ops(torch.device(device)))

            def unchanged(sampler: Sampler = kept, logits: Tensor = logits, rows: list[Row] = rows) -> None:
                sampler.sample(logits, rows)

            def new(logits: Tensor = logits, rows: list[Row] = rows) -> None:
                Sampler(sampler_ops(torch.device(device))).sample(logits, rows)

            unchanged()
            for call in (unchanged, new):
                line += f"{milliseconds(call, repeats, synchronise):{13 if call is unchanged else 8}.3f}"
        print(line, flush=True)


if __name__ == "__main__":
    auto_cli(main)
