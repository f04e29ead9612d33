"""Our engine without a server, a process of its own that takes loads on standard input: what HTTP can at best reach."""

from __future__ import annotations

import json
import sys
import time
from collections import deque
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.serving.load import Load, Measured, Outcome
from llama_ray import Engine, SamplingParams


@dataclass(frozen=True)
class _Due:
    """A request that is sent at `at`, or at once; the next one of its stream follows."""

    number: int
    at: float


def measure(engine: Engine, load: Load) -> Measured:
    """Send the requests of `load` to the engine in this thread, which is also its only one."""
    params = SamplingParams(max_tokens=load.new_tokens, ignore_eos=True, **load.fields)
    begin = time.monotonic()
    if load.arrivals is None:
        waiting = deque(_Due(i, begin) for i in range(load.streams))
    else:
        waiting = deque(_Due(i, begin + after) for i, after in enumerate(load.arrivals))
    running: dict[int, Outcome] = {}
    outcomes = []
    while waiting or engine.has_work:
        while waiting and waiting[0].at <= time.monotonic():
            due = waiting.popleft()
            running[engine.submit(load.prompt(due.number), params)] = Outcome(due.number, due.at)
        if not engine.has_work:
            time.sleep(max(0.0, waiting[0].at - time.monotonic()))
            continue
        deltas = engine.step()
        now = time.monotonic()
        for delta in deltas:
            outcome = running[delta.request_id]
            outcome.arrivals.append(now)
            outcome.tokens += len(delta.token_ids)
            if delta.finish_reason is not None:
                outcomes.append(running.pop(delta.request_id))
                number = outcome.number + load.streams
                if load.arrivals is None and load.requests and number < load.streams * load.requests:
                    waiting.append(_Due(number, now))
    return Measured(outcomes, time.monotonic() - begin, client_cpu_s=0.0)


def main(task: dict[str, Any]) -> None:
    """Load the engine, and answer each load with what was measured."""
    torch.set_num_threads(task["threads"])
    engine = Engine.from_pretrained(task["directory"], dtype=torch.bfloat16, **task["engine"])
    print("ready", flush=True)
    for line in sys.stdin:
        print(json.dumps(measure(engine, Load(**json.loads(line))).to_json()), flush=True)


if __name__ == "__main__":
    main(json.loads(sys.stdin.readline()))
