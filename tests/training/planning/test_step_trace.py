"""A traced step uses the memory and sends the bytes of a real one."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import get_args

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from llama_ray.data.dataset.batch import Batch
from llama_ray.model.llama import Llama
from llama_ray.training.config import Precision, TrainConfig
from llama_ray.training.optimizers.build import build_optimizer
from llama_ray.training.parallel.layout import SINGLE_WORKER, Layout, choose_layout
from llama_ray.training.parallel.parallelize import parallelize, unallocated_model
from llama_ray.training.parallel.process_group import world_size
from llama_ray.training.planning.memory_trace import Kind
from llama_ray.training.planning.step_trace import StepTrace, trace_step, watch_step
from llama_ray.training.step import Stepper
from tests.training.helpers import ADAPTERS, FSDP, HSDP, MUON, TP, Settings, in_processes
from tests.training.planning.helpers import MODEL, RUN

CPU = torch.device("cpu")
LAYOUTS: dict[str, tuple[int, Settings]] = {
    "fsdp": (2, FSDP),
    "tensor-parallel": (2, TP),
    "fsdp-muon": (2, {**FSDP, **MUON}),
    "fsdp-adapters": (2, {**FSDP, **ADAPTERS}),
    "tensor-parallel-selective": (2, {**TP, "activation_checkpointing": "selective"}),
    "hsdp": (4, HSDP),
    "fsdp-tensor-parallel": (4, {**FSDP, **TP}),
    "fsdp-tensor-parallel-muon": (4, {**FSDP, **TP, **MUON}),
}
TOKENS = torch.zeros(RUN.batch_size, MODEL.max_seq_len, dtype=torch.int64)


def make_stepper(run: TrainConfig, layout: Layout = SINGLE_WORKER) -> Stepper:
    model = parallelize(unallocated_model(MODEL, run), run, layout, CPU, compile_blocks=False)
    return Stepper(model, build_optimizer(model, run), run, device=CPU, layout=layout)


def run_of(layout: str) -> TrainConfig:
    return replace(RUN, gradient_accumulation_steps=2, **LAYOUTS[layout][1])


def traces_of_workers(runs: list[TrainConfig]) -> list[StepTrace]:
    """Train in a real process group: a step without a trace, then one with it, for each of `runs`."""
    traces = []
    for run in runs:
        stepper = make_stepper(run, choose_layout(MODEL, run, world_size()).with_mesh(CPU))
        stepper.step([Batch(TOKENS, TOKENS)])
        assert isinstance(stepper.model, Llama)
        traces.append(watch_step(stepper, stepper.model, [Batch(TOKENS, TOKENS)] * 2))
    return traces


@cache
def real_traces(workers: int) -> dict[str, StepTrace]:
    """Return the traces of the first real worker; one process group serves all layouts of its size."""
    names = [name for name, (size, _) in LAYOUTS.items() if size == workers]
    by_rank = in_processes(workers, traces_of_workers, [run_of(name) for name in names])
    return dict(zip(names, by_rank[0], strict=True))


@cache
def planned_trace(layout: str) -> StepTrace:
    run = run_of(layout)
    return trace_step(MODEL, run, choose_layout(MODEL, run, LAYOUTS[layout][0]))


@pytest.mark.parametrize("kind", get_args(Kind))
@pytest.mark.parametrize("layout", LAYOUTS)
def test_planned_memory_is_what_a_real_worker_holds(layout: str, kind: Kind) -> None:
    planned, real = planned_trace(layout), real_traces(LAYOUTS[layout][0])[layout]
    assert planned.memory.keys() == real.memory.keys()
    assert planned.memory[kind] == pytest.approx(real.memory[kind], rel=0.05, abs=64 * 1024)


@pytest.mark.parametrize("part", ["micro_step", "last_micro_step", "update"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_planned_traffic_is_what_a_real_worker_sends_to_the_byte(layout: str, part: str) -> None:
    real = real_traces(LAYOUTS[layout][0])[layout]
    assert getattr(planned_trace(layout), part) == getattr(real, part)
    # Only Muon's update communicates.
    assert bool(getattr(real, part)) == (part != "update" or "muon" in layout)


@pytest.mark.parametrize("settings", [{}, {"activation_checkpointing": "full"}, ADAPTERS])
def test_planned_memory_is_what_the_allocator_hands_out(settings: Settings, tmp_path: Path) -> None:
    run = replace(RUN, **settings)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        stepper = make_stepper(run)
        for _ in range(2):
            stepper.step([Batch(TOKENS, TOKENS)])
    profiler.export_chrome_trace(str(tmp_path / "trace.json"))
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    memory = sorted((e for e in events if e["name"] == "[memory]"), key=lambda e: e["ts"])
    totals = [e["args"]["Total Allocated"] for e in memory]
    measured = max(totals) - (totals[0] - memory[0]["args"]["Bytes"])

    planned = sum(trace_step(MODEL, run, SINGLE_WORKER).memory.values())

    assert planned == pytest.approx(measured, rel=0.05)


def test_extrapolated_layers_are_like_traced_ones() -> None:
    run = replace(RUN, parallelism="fsdp", precision="bf16")
    layout = choose_layout(MODEL, run, 4)
    extrapolated = trace_step(MODEL, run, layout, depths=(4, 6))
    whole = trace_step(MODEL, run, layout, depths=(4, MODEL.num_layers))
    assert sum(extrapolated.memory.values()) == pytest.approx(sum(whole.memory.values()), rel=0.01)
    assert extrapolated.last_micro_step == whole.last_micro_step


def memory(precision: Precision, document_mask: bool) -> int:
    run = replace(RUN, precision=precision, document_mask=document_mask)
    return sum(trace_step(MODEL, run, SINGLE_WORKER).memory.values())


def test_a_document_mask_takes_no_memory_in_bf16() -> None:
    assert 0.95 * memory("bf16", False) < memory("bf16", True) < 1.001 * memory("bf16", False)


def test_a_document_mask_takes_memory_for_one_mask_and_repeated_heads_in_fp32() -> None:
    mask = 4 * RUN.batch_size * MODEL.max_seq_len**2
    repeated = MODEL.num_heads - MODEL.num_kv_heads
    heads = 2 * 4 * RUN.batch_size * MODEL.max_seq_len * MODEL.head_dim * repeated * MODEL.num_layers
    assert memory("fp32", True) - memory("fp32", False) == pytest.approx(mask + heads, rel=0.02)
