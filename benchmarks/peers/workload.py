"""The requests that all contestants get, and the latencies that their users see."""

from __future__ import annotations

import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from llama_ray.utils.integers import ceil_div


@dataclass(frozen=True)
class Sampling:
    """Sampling parameters; temperature 0 is greedy."""

    temperature: float = 0.8
    top_k: int = 40
    top_p: float = 0.9


GREEDY = Sampling(temperature=0.0, top_k=1, top_p=1.0)


@dataclass(frozen=True)
class Request:
    """A prompt that arrives `arrival_s` after the start and asks for exactly `new_tokens` tokens."""

    arrival_s: float
    prompt: list[int]
    new_tokens: int


@dataclass(frozen=True)
class Latencies:
    """Seconds to the first token (50th and 99th percentile), between tokens (99th), and of the whole run."""

    first_p50_s: float
    first_p99_s: float
    between_p99_s: float
    total_s: float


def prompts(count: int, length: int, vocab_size: int, seed: int) -> list[list[int]]:
    """Return random token ids, different for every seed, so that no round profits from another round's cache."""
    rng = random.Random(seed)
    return [[rng.randrange(3, vocab_size) for _ in range(length)] for _ in range(count)]


def poisson_arrivals(count: int, rate: float, vocab_size: int, max_seq_len: int, seed: int) -> list[Request]:
    """Return `count` requests, on average `rate` a second: prompts of 16 to 512 tokens, outputs of 16 to 256."""
    rng = random.Random(seed)
    now, requests = 0.0, []
    for _ in range(count):
        now += rng.expovariate(rate)
        length, new_tokens = rng.randint(16, 512), rng.randint(16, 256)
        new_tokens = min(new_tokens, max_seq_len - length)
        requests.append(Request(now, [rng.randrange(3, vocab_size) for _ in range(length)], new_tokens))
    return requests


def latencies(requests: Sequence[Request], times: Sequence[Sequence[float]]) -> Latencies:
    """Return the percentiles of one run; `times[i]` holds when request i got each token, in seconds since the start.

    Raises RuntimeError if a request did not get the number of tokens that it asked for.
    """
    for i, (request, got) in enumerate(zip(requests, times, strict=True)):
        if len(got) != request.new_tokens:
            raise RuntimeError(f"request {i} got {len(got)} tokens; it asked for {request.new_tokens}")
    first = [got[0] - request.arrival_s for request, got in zip(requests, times, strict=True)]
    between = [b - a for got in times for a, b in pairwise(got)]
    return Latencies(
        statistics.median(first),
        percentile(first, 99),
        percentile(between, 99),
        max(got[-1] for got in times),
    )


def percentile(values: Sequence[float], percent: int) -> float:
    """Return the smallest value that is at least as large as `percent` percent of the values."""
    ordered = sorted(values)
    return ordered[max(0, ceil_div(percent * len(ordered), 100) - 1)]
