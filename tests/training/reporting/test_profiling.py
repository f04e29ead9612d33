from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from llama_ray.model.config import LlamaConfig
from llama_ray.training.config import TrainConfig
from llama_ray.training.loop import train
from llama_ray.training.reporting.observer import Console
from llama_ray.training.reporting.profiling import profiled


@pytest.mark.parametrize(("run_steps", "expected"), [(8, 2), (4, 1)])
def test_a_trace_holds_the_profiled_steps_and_is_written_once(run_steps: int, expected: int) -> None:
    written: list[Path] = []
    matrix = torch.ones(8, 8)
    with profiled(2, written.append) as step_done:
        for _ in range(run_steps):
            matrix @ matrix
            step_done()
    [trace] = written
    events = json.loads(trace.read_text())["traceEvents"]
    shutil.rmtree(trace.parent)
    assert sum(event.get("name") == "aten::mm" for event in events) == expected


def test_nothing_is_written_for_zero_steps() -> None:
    with profiled(0, lambda path: pytest.fail("written")) as step_done:
        step_done()


def test_a_run_gives_its_trace_to_the_observer(tiny: LlamaConfig, dataset: Path) -> None:
    class Traces(Console):
        def profiled(self, trace: Path) -> None:
            traces.append(trace)

    traces: list[Path] = []
    config = TrainConfig(max_steps=8, profile_steps=2)
    train(tiny, config, dataset, device=torch.device("cpu"), observer=Traces())
    [trace] = traces
    names = {event.get("name") for event in json.loads(trace.read_text())["traceEvents"]}
    assert "aten::mm" in names
    shutil.rmtree(trace.parent)
