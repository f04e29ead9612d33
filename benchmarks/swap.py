"""What clients see while the champion moves, and while replicas die: streams under way, moves of the alias, signals.

    python -m benchmarks.swap                             # 50 moves under 16 streams; 10 minutes on 2 cores
    python -m benchmarks.swap --moves 0 --kills 20        # SIGKILLs of 2 replicas
    python -m benchmarks.swap --moves 0 --outages 3       # SIGKILLs of both at once
    python -m benchmarks.swap --moves 0 --stops 5         # SIGSTOPs: a replica that makes no progress

Two versions of a model with different weights are registered in an MLflow database, and served by the real application.
Each stream sends its next request when an answer is complete. Each answer is compared, token for token with the
log-probabilities, with what the engine alone gives for the version that the answer names. Blocks with disturbances
alternate with blocks of the same length without any, which gives the share of throughput that is lost.

Ends with exit code 1 if a request failed, or an answer was not that of the version that it names.
"""

from __future__ import annotations

import argparse
import logging
import random
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.serve import ENVIRONMENTS, machine
from benchmarks.serving.answers import Answers, Verdict
from benchmarks.serving.disturbances import Disturbed, Killing, Moving
from benchmarks.serving.load import Load
from benchmarks.serving.registered import Registered, register_versions
from benchmarks.serving.servers import OurApplication, Setting
from llama_ray.tracking.uri import sqlite_uri

_BLOCK = 10
"""Disturbances between two looks at the undisturbed throughput."""
PROMPTS = 24
FIELDS = {"temperature": 0.8, "top_k": 40, "top_p": 0.9, "seed": 7, "logprobs": 0}


def main(argv: Sequence[str] | None = None) -> bool:
    """Print each block and the verdicts; return whether nothing was lost."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--moves", type=int, default=50, help="of the alias between the versions (50)")
    parser.add_argument("--kills", type=int, default=0, help="SIGKILLs of one of two replicas")
    parser.add_argument("--outages", type=int, default=0, help="SIGKILLs of both replicas at once")
    parser.add_argument("--stops", type=int, default=0, help="SIGSTOPs of one of two replicas")
    parser.add_argument("--streams", type=int, default=16, help="of clients (16)")
    parser.add_argument("--new_tokens", type=int, default=160, help="of each answer (160)")
    parser.add_argument("--preset", default="llama-30m", help="of LlamaConfig (llama-30m)")
    parser.add_argument("--poll_s", type=float, default=1.0, help="registry_poll_s of the application (1)")
    parser.add_argument("--stuck_s", type=float, default=10.0, help="stuck_after_s of the application (10)")
    parser.add_argument("--seed", type=int, default=0, help="of the random victims and instants (0)")
    arguments = parser.parse_args(argv)
    print(machine(1), flush=True)
    rng, good = random.Random(arguments.seed), True
    with tempfile.TemporaryDirectory(prefix="swap_") as directory:
        root = Path(directory)
        model = register_versions(root, arguments.preset, sqlite_uri(root / "mlflow.db"))
        load = Load(
            streams=arguments.streams,
            requests=None,
            prompt_tokens=32,
            new_tokens=arguments.new_tokens,
            vocab_size=model.vocab_size,
            prompts=PROMPTS,
            fields=FIELDS,
            keep=True,
        )
        answers = Answers(model, load)
        kinds: list[tuple[str, int, int, Callable[[OurApplication], Disturbed]]] = [
            ("moves", arguments.moves, 1, lambda server: Moving(server, model, rng)),
            ("kills", arguments.kills, 2, lambda server: Killing(server, rng, signal.SIGKILL)),
            (
                "outages",
                arguments.outages,
                2,
                lambda server: Killing(server, rng, signal.SIGKILL, everyone=True),
            ),
            ("stops", arguments.stops, 2, lambda server: Killing(server, rng, signal.SIGSTOP)),
        ]
        for name, count, replicas, disturb in kinds:
            if count:
                server = application(model, replicas, arguments)
                try:
                    server.start()
                    good &= run(name, count, server, disturb(server), load, answers)
                finally:
                    server.stop()
    return good


def application(model: Registered, replicas: int, arguments: argparse.Namespace) -> OurApplication:
    """Return the application, which follows the alias."""
    setting = Setting.of(model.directories[0], sequences=arguments.streams, threads=1)
    return OurApplication(
        "ours",
        setting,
        Path(tempfile.mkdtemp(prefix="swap_logs_")) / "ours.log",
        model=model.name,
        environment=ENVIRONMENTS["ours"],
        arguments={
            "model": model.ref,
            "tracking_uri": model.uri,
            "registry_poll_s": arguments.poll_s,
            "stuck_after_s": arguments.stuck_s,
            "min_replicas": replicas,
            "max_replicas": replicas,
        },
    )


def run(
    name: str, count: int, server: OurApplication, disturbed: Disturbed, load: Load, answers: Answers
) -> bool:
    """Disturb the server `count` times under load, print what clients saw, and return whether nothing was lost."""
    total = Verdict()
    shares, took = [], []
    for begin in range(0, count, _BLOCK):
        client = server.client(load)
        started = time.monotonic()
        took += [disturbed.once() for _ in range(min(_BLOCK, count - begin))]
        lasted_s = time.monotonic() - started
        busy = client.stop()
        client = server.client(load)
        time.sleep(lasted_s)
        quiet = client.stop()
        verdict, undisturbed = answers.compare(busy), answers.compare(quiet)
        shares.append(1 - verdict.tokens_per_s / undisturbed.tokens_per_s)
        print(f"{name} {begin + 1} to {len(took)}: {verdict}\n  undisturbed: {undisturbed}", flush=True)
        total = total.joined(verdict).joined(undisturbed, disturbed=False)
    print(
        f"\n{len(took)} {name} under {load.streams} streams: {total.failed} of {total.requests} requests failed, "
        f"{total.wrong} answers were not those of one version; longest gap {total.gap_s:.2f} s "
        f"(undisturbed {total.quiet_gap_s:.2f} s), longest wait for a first token {total.first_s:.2f} s; "
        f"{statistics.median(shares):.0%} of the throughput lost; until it was over {statistics.median(took):.2f} s "
        f"(median), {max(took):.2f} s (longest)",
        flush=True,
    )
    return not (total.failed or total.wrong)


if __name__ == "__main__":
    # It says that it creates a database.
    logging.getLogger("mlflow").setLevel(logging.WARNING)
    # `finally` ends the servers also when this process is told to end.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    sys.exit(not main())
