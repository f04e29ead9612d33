"""Random requests against engines with few blocks, for as long as one likes: does each get what it gets alone?

    python -m benchmarks.fuzz [--minutes 10] [--seed 0]    # needs the packages of the dev extra

Sampling parameters, schemas, expressions, prompts, lengths, stop strings, log-probabilities, several candidates and
aborts are random, and the engines run short of blocks and seats all the time: sequences are preempted and cached
prefixes evicted. On the CPU kernels a request's tokens and log-probabilities do not depend on its neighbours, so they
must equal those of the same request alone, to the bit. A request that fails is made smaller before it is printed.

Ends with exit code 1 if a request got anything else, a step took longer than `--max_step_cpu_s` of processor time, no
token came for two minutes, or sequences, blocks or memory were left behind.
"""

from __future__ import annotations

import gc
import itertools
import logging
import sys
import time
from collections.abc import Sequence

import psutil
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import seed as seeded
from hypothesis import strategies as st
from jsonargparse import auto_cli

from tests.fuzzing import Asked, Fuzzer, Report, requests

ROUNDS = 50
"""Groups of requests between two looks at the clock."""
MAX_GROWTH_BYTES = 64 * 2**20
"""What the process may grow by after the first tenth of the time."""


def fuzz(minutes: float = 10.0, seed: int = 0, max_step_cpu_s: float = 1.0) -> None:
    """Run random requests and print what happened.

    Args:
        minutes: How long to go on.
        seed: Other seeds give other requests.
        max_step_cpu_s: Processor time of one step, at most.
    """
    torch.set_num_threads(1)
    # A constrained output that cannot go on is expected here.
    logging.getLogger("llama_ray").setLevel(logging.ERROR)
    fuzzer = Fuzzer(max_step_cpu_s)
    start, verdict, before, after = time.monotonic(), "every request got what it gets alone", 0, 0
    try:
        for number in itertools.count(seed * 1_000_000):
            _round(fuzzer, number)
            elapsed_min = (time.monotonic() - start) / 60
            if not before and elapsed_min >= minutes / 10:
                before = _memory()
            if elapsed_min >= minutes:
                break
        after = _memory()
        report = fuzzer.finish()
        assert after - before < MAX_GROWTH_BYTES, f"the process grew by {(after - before) / 2**20:.0f} MiB"
    except Exception as error:
        report, verdict = fuzzer.report, f"FAILED: {type(error).__name__}: {error}"
    _print(report, time.monotonic() - start, after - before, verdict)
    sys.exit(verdict.startswith("FAILED"))


def _round(fuzzer: Fuzzer, number: int) -> None:
    @seeded(number)
    @settings(max_examples=ROUNDS, deadline=None, database=None, suppress_health_check=[*HealthCheck])
    @given(requests(fuzzer.tokenizer), st.integers(0, 3))
    def run(asked: Sequence[Asked], which: int) -> None:
        fuzzer.check(asked, which)

    run()


def _memory() -> int:
    gc.collect()
    return int(psutil.Process().memory_info().rss)


def _print(report: Report, seconds: float, growth: int, verdict: str) -> None:
    for name, count in sorted(report.counts.items()):
        print(f"{name:>20} {count:>12,}")
    print(
        f"{'slowest step':>20} {report.slowest_step_s:12.3f} s, {report.slowest_step_cpu_s:.3f} s of processor time"
    )
    print(f"{'memory':>20} {growth / 2**20:+12.1f} MiB after the first tenth of the time")
    print(f"{'time':>20} {seconds:12.1f} s")
    print(f"{'verdict':>20} {verdict}")


if __name__ == "__main__":
    auto_cli(fuzz, as_positional=False)
