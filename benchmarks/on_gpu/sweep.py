"""Time the kernels of generation with other launch parameters, beside what the engine uses and the card's limits.

    python3 benchmarks/on_gpu/sweep.py --seconds 60
    python3 benchmarks/on_gpu/sweep.py --only decode,products
    python3 benchmarks/on_gpu/sweep.py --device cpu --seconds 60    # without a GPU: compile for Hopper, print resources

Processes compile the variants ahead, in the order in which they are timed. Each case has an equal part of the time that
is left; the current parameters come first. Launches are timed in a CUDA graph, one after the other as in decoding.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures import TimeoutError as NotYet
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
# The project is not installed on such a machine.
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import torch  # noqa: E402

from on_gpu import compiled  # noqa: E402
from on_gpu.compiled import Resources  # noqa: E402
from on_gpu.sweep_cases import CASES, Case, Variant  # noqa: E402

LAUNCHES = 24
"""Launches of a graph, at least."""


class Figure(NamedTuple):
    """A variant, as measured."""

    label: str
    seconds: float
    used: Resources | None
    current: bool


def main() -> None:
    """Run the cases that were asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default=",".join(CASES), help="a comma-separated list (all)")
    parser.add_argument("--seconds", type=float, default=60, help="time limit for all of it (60)")
    parser.add_argument("--device", default="cuda", help="cuda, or cpu to compile without a GPU")
    arguments = parser.parse_args()
    names = arguments.only.split(",")
    if unknown := set(names) - set(CASES):
        parser.error(f"--only names {', '.join(sorted(unknown))}; the cases are {', '.join(CASES)}")
    end = time.monotonic() + arguments.seconds
    cases = [case for name in names for case in CASES[name]()]
    device = torch.device(arguments.device)
    on_gpu = device.type == "cuda"
    major, minor = torch.cuda.get_device_capability(device) if on_gpu else divmod(compiled.HOPPER, 10)
    processors = torch.cuda.get_device_properties(device).multi_processor_count if on_gpu else 132
    pool = ProcessPoolExecutor(
        os.cpu_count(), multiprocessing.get_context("spawn"), compiled.only_compile, (10 * major + minor,)
    )
    futures = {case: _compile(pool, case, processors) for case in cases}
    rates = _rates(device) if on_gpu else {}
    try:
        for number, case in enumerate(cases):
            left = end - time.monotonic()
            if left <= 0:
                print(f"the time is up: {len(cases) - number} cases are left out")
                break
            part = time.monotonic() + left / (len(cases) - number)
            print(f"\n{case}", flush=True)
            if on_gpu:
                try:
                    _report(case, _measure(case, futures[case], part, device), rates)
                except Exception as error:
                    print(f"  {type(error).__name__}: {str(error)[:300]}", flush=True)
            else:
                _show_resources(futures[case], part)
            for future in futures[case].values():
                future.cancel()
    finally:
        # Those that still compile are of no use any more.
        for process in pool._processes.values():
            process.terminate()
        pool.shutdown(wait=False, cancel_futures=True)


def _compile(
    pool: ProcessPoolExecutor, case: Case, processors: int
) -> dict[Variant, Future[list[Resources]]]:
    current = case.current(processors)
    others = dict.fromkeys(v for v in case.others(processors) if v != current)
    return {variant: pool.submit(_resources, case, variant) for variant in [current, *others]}


def _resources(case: Case, variant: Variant) -> list[Resources]:
    launch = case.launches(torch.device("meta"), small=True)[0]
    return compiled.resources(lambda: launch(variant))


def _rates(device: torch.device) -> dict[str, float]:
    """Return the copy bandwidth in GB/s, and TFLOP/s of a large product in bf16."""
    x = torch.empty(2**30, device=device).normal_()
    y = torch.empty_like(x)
    a, b = (torch.randn(8192, 8192, device=device, dtype=torch.bfloat16) for _ in range(2))
    rates = {
        "GB/s": 2 * x.nbytes / _seconds([lambda: y.copy_(x)], device, 4) / 1e9,
        "TFLOP/s": 2 * 8192**3 / _seconds([lambda: a @ b], device, 4) / 1e12,
    }
    print(f"{torch.cuda.get_device_name(device)}: copy {rates['GB/s']:,.0f} GB/s read and written, ", end="")
    print(f"bf16 product {rates['TFLOP/s']:,.0f} TFLOP/s", flush=True)
    return rates


def _seconds(launches: Sequence[Callable[[], object]], device: torch.device, number: int = LAUNCHES) -> float:
    """Return the seconds of a launch, among `number` or more in a CUDA graph."""
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        launches[0]()
    torch.cuda.current_stream(device).wait_stream(stream)
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    rounds = -(-number // len(launches))
    # torch.cuda.graph would collect garbage each time, which takes longer than the measurement.
    with torch.cuda.stream(stream):
        graph.capture_begin()
        try:
            for _ in range(rounds):
                for launch in launches:
                    launch()
        finally:
            graph.capture_end()
    times = []
    for _ in range(4):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1000)
    return statistics.median(times[1:]) / (rounds * len(launches))


def _measure(
    case: Case, futures: dict[Variant, Future[list[Resources]]], end: float, device: torch.device
) -> list[Figure]:
    figures: list[Figure] = []
    launches = case.launches(device)
    for variant, future in futures.items():
        current = not figures
        label = str(variant)
        try:
            # The current parameters are always measured, even if they must be waited for.
            used = max(future.result(60 if current else max(0.0, end - time.monotonic())))
            if problem := used.problem():
                print(f"  {label}: {problem}")
                if used.shared > compiled.SHARED_BYTES:
                    continue
            run = [lambda launch=launch, variant=variant: launch(variant) for launch in launches]
            figures.append(Figure(label, _seconds(run, device), used, current))
        except NotYet:
            break
        except Exception as error:
            print(f"  {label}: {type(error).__name__}: {str(error)[:200]}", flush=True)
            if current:
                figures.append(Figure(label, float("inf"), None, True))
    del launches
    for name, reference in case.references(device).items():
        figures.append(Figure(name, _seconds([reference], device), None, False))
    torch.cuda.empty_cache()
    return figures


def _report(case: Case, figures: list[Figure], rates: dict[str, float]) -> None:
    """Print the best three, the current parameters and other ways, fastest first."""
    figures = sorted(figures, key=lambda f: f.seconds)
    best = [f for f in figures if f.used][:3]
    # Of other ways with parameters of their own, such as "one row: ...", the fastest.
    others = {f.label.split(":")[0]: f for f in reversed(figures) if not f.used}
    shown = [*best, *others.values(), *(f for f in figures if f.current)]
    scale = 1e9 if case.unit == "GB/s" else 1e12
    for figure in figures:
        if figure not in shown:
            continue
        rate = case.amount() / figure.seconds / scale
        used = figure.used
        resources = f"{used.registers:4} registers {used.shared / 1024:4.0f} KiB" if used else " " * 23
        mark = " <- now" if figure.current else ""
        print(f"  {figure.seconds * 1e6:9.1f} us {rate:8,.1f} {case.unit}", end="")
        print(f" {rate / rates[case.unit]:5.0%} {resources}  {figure.label}{mark}")
    print(f"  {len(figures)} measured", flush=True)


def _show_resources(futures: dict[Variant, Future[list[Resources]]], end: float) -> None:
    for number, (variant, future) in enumerate(futures.items()):
        try:
            for used in future.result(None if number == 0 else max(0.0, end - time.monotonic())):
                problem = used.problem()
                print(f"  {used.registers:4} registers {used.shared / 1024:4.0f} KiB  {variant}", end="")
                print(f"  !! {problem}" if problem else "", flush=True)
        except NotYet:
            return


if __name__ == "__main__":
    main()
