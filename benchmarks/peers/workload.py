"""What the contestants are asked to do, and the figures that describe how long a user waited."""

from __future__ import annotations

import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from llama_ray.utils.integers import ceil_div


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen; temperature 0 is greedy."""

    temperature: float = 0.8
    top_k: int = 40
    top_p: float = 0.9


GREEDY = Sampling(temperature=0.0, top_k=1, top_p=1.0)


@dataclass(frozen=True)
class Request:
    """A prompt that arrives `arrival_s` after the start and wants exactly `new_tokens`."""

    arrival_s: float
    prompt: list[int]
    new_tokens: int


@dataclass(frozen=True)
class Waits:
    """Seconds: to the first token at the 50th and 99th percentile, between tokens at the 99th, and of the whole."""

    first_p50_s: float
    first_p99_s: float
    between_p99_s: float
    whole_s: float


def prompts(count: int, length: int, vocab_size: int, seed: int) -> list[list[int]]:
    """Random token ids, other ones for every seed: nothing that was computed for one round serves the next."""
    rng = random.Random(seed)
    return [[rng.randrange(3, vocab_size) for _ in range(length)] for _ in range(count)]


def poisson_arrivals(count: int, rate: float, vocab_size: int, max_seq_len: int, seed: int) -> list[Request]:
    """`count` requests at `rate` a second on average: prompts of 16 to 512 tokens, outputs of 16 to 256."""
    rng = random.Random(seed)
    now, requests = 0.0, []
    for _ in range(count):
        now += rng.expovariate(rate)
        length, new_tokens = rng.randint(16, 512), rng.randint(16, 256)
        new_tokens = min(new_tokens, max_seq_len - length)
        requests.append(Request(now, [rng.randrange(3, vocab_size) for _ in range(length)], new_tokens))
    return requests


def waits(requests: Sequence[Request], times: Sequence[Sequence[float]]) -> Waits:
    """The percentiles of one run; `times[i]` are the seconds since the start at which request i got its tokens.

    Raises RuntimeError where a request got another number of tokens than it asked for.
    """
    for i, (request, got) in enumerate(zip(requests, times, strict=True)):
        if len(got) != request.new_tokens:
            raise RuntimeError(f"request {i} got {len(got)} tokens and asked for {request.new_tokens}")
    first = [got[0] - request.arrival_s for request, got in zip(requests, times, strict=True)]
    between = [b - a for got in times for a, b in pairwise(got)]
    return Waits(
        statistics.median(first),
        percentile(first, 99),
        percentile(between, 99),
        max(got[-1] for got in times),
    )


def percentile(values: Sequence[float], percent: int) -> float:
    """The smallest value that at least `percent` of all values do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, ceil_div(percent * len(ordered), 100) - 1)]
