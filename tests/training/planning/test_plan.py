from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from llama_ray.model.config import LlamaConfig
from llama_ray.model.llama import Llama
from llama_ray.training.config import TrainConfig
from llama_ray.training.optimizers.build import build_optimizer
from llama_ray.training.parallel.layout import GIB, SINGLE_WORKER, choose_layout
from llama_ray.training.parallel.parallelize import parallelize
from llama_ray.training.parallel.process_group import world_size
from llama_ray.training.planning.plan import (
    Cluster,
    Trace,
    make_plan,
    nearest_that_fits,
    trace_step,
    watch_step,
)
from llama_ray.training.step import Stepper
from tests.training.helpers import in_processes

# fp32, since short sequences in bf16 attend on a CPU as no GPU does; deep enough to be extrapolated.
SHAPE = LlamaConfig.preset(
    "llama-tiny", num_layers=9, hidden_size=128, intermediate_size=352, max_seq_len=128
)
RUN = TrainConfig(precision="fp32", batch_size=4)


def make_stepper(shape: LlamaConfig, run: TrainConfig, layout: Any = SINGLE_WORKER) -> Stepper:
    device = torch.device("cpu")
    model = parallelize(Llama(shape, device="meta"), run, layout, device, compile_blocks=False)
    return Stepper(model, build_optimizer(model, run), run, device=device, layout=layout)


def step(stepper: Stepper, shape: LlamaConfig, run: TrainConfig) -> None:
    tokens = torch.zeros(run.batch_size, shape.max_seq_len, dtype=torch.int64)
    stepper.step([(tokens, tokens)])


@pytest.mark.parametrize("checkpointing", ["none", "full"])
def test_a_plan_is_what_the_allocator_hands_out(checkpointing: Any, tmp_path: Path) -> None:
    run = replace(RUN, activation_checkpointing=checkpointing)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        stepper = make_stepper(SHAPE, run)
        for _ in range(2):
            step(stepper, SHAPE, run)
    profiler.export_chrome_trace(str(tmp_path / "trace.json"))
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    memory = sorted((e for e in events if e["name"] == "[memory]"), key=lambda e: e["ts"])
    totals = [e["args"]["Total Allocated"] for e in memory]
    measured = max(totals) - (totals[0] - memory[0]["args"]["Bytes"])

    planned = sum(trace_step(SHAPE, run, SINGLE_WORKER).memory.values())

    assert planned == pytest.approx(measured, rel=0.05)


FSDP, HSDP = {"parallelism": "fsdp"}, {"parallelism": "hsdp", "fsdp_size": 2}
TP, MUON = {"tensor_parallel": 2}, {"optimizer": "muon"}
ON_TWO = [FSDP, TP, {**FSDP, **MUON}, {**TP, "activation_checkpointing": "selective"}]
ON_FOUR = [HSDP, {**FSDP, **TP}, {**FSDP, **TP, **MUON}]


@pytest.mark.parametrize(("workers", "many"), [(2, ON_TWO), (4, ON_FOUR)], ids=["two", "four"])
def test_a_plan_is_what_real_workers_hold_and_send(workers: int, many: list[Any]) -> None:
    runs = [replace(RUN, gradient_accumulation_steps=2, **settings) for settings in many]
    measured = in_processes(workers, traced_workers, SHAPE, runs)[0]
    for run, real in zip(runs, measured, strict=True):
        planned = trace_step(SHAPE, run, choose_layout(SHAPE, run, workers))
        assert planned.memory.keys() == real.memory.keys()
        for kind, size in planned.memory.items():
            assert size == pytest.approx(real.memory[kind], rel=0.05, abs=64 * 1024), (run, kind)
        for part in ("micro_step", "last_micro_step", "update"):
            assert getattr(planned, part) == getattr(real, part), (run, part)
        assert real.micro_step
        assert bool(real.update) == (run.optimizer == "muon")


def traced_workers(shape: LlamaConfig, runs: list[TrainConfig]) -> list[Trace]:
    traces = []
    for run in runs:
        layout = choose_layout(shape, run, world_size()).with_mesh(torch.device("cpu"))
        stepper = make_stepper(shape, run, layout)
        step(stepper, shape, run)
        tokens = torch.zeros(run.batch_size, shape.max_seq_len, dtype=torch.int64)
        assert isinstance(stepper.model, Llama)
        traces.append(watch_step(stepper, stepper.model, [(tokens, tokens)] * 2))
    return traces


def test_extrapolated_layers_weigh_what_traced_ones_do(monkeypatch: pytest.MonkeyPatch) -> None:
    run = replace(RUN, parallelism="fsdp", precision="bf16")
    layout = choose_layout(SHAPE, run, 4)
    extrapolated = trace_step(SHAPE, run, layout)
    monkeypatch.setattr("llama_ray.training.planning.plan._DEPTHS", (4, SHAPE.num_layers))
    whole = trace_step(SHAPE, run, layout)
    assert sum(extrapolated.memory.values()) == pytest.approx(sum(whole.memory.values()), rel=0.01)
    assert extrapolated.last_micro_step == whole.last_micro_step


def test_65b_fits_on_64_gpus_when_it_is_sharded_and_a_plan_that_does_not_fit_names_one_that_does() -> None:
    model = LlamaConfig.preset("llama-65b")
    cluster = Cluster(gpus=64, gpu_memory_bytes=80 * GIB)
    copies = make_plan(model, TrainConfig(batch_size=1, parallelism="ddp"), cluster)
    assert not copies.fits
    assert copies.memory["optimizer"] == pytest.approx(8 * model.num_parameters(), rel=0.01)

    sharded = nearest_that_fits(copies)

    assert sharded is not None
    assert sharded.fits
    assert sharded.cluster == cluster
    assert sharded.config.parallelism == "fsdp"
    assert sharded.memory["parameters"] == pytest.approx(4 * model.num_parameters() / 64, rel=0.01)
    assert sharded.tokens_per_step == copies.tokens_per_step


def test_too_few_gpus_are_doubled_until_it_fits() -> None:
    model = LlamaConfig.preset("llama-7b")
    plan = make_plan(model, TrainConfig(batch_size=1), Cluster(gpus=1, gpu_memory_bytes=40 * GIB))
    assert not plan.fits
    other = nearest_that_fits(plan)
    assert other is not None
    assert other.fits
    assert other.cluster.gpus in (4, 8)


def test_time_is_operations_over_the_assumed_rate() -> None:
    cluster = Cluster(gpus=1, gpu_memory_bytes=80 * GIB, gpu_flops=1e12)
    plan = make_plan(SHAPE, RUN, cluster, mfu=0.5)
    seconds = 4 * 128 * SHAPE.flops_per_token(128) / (1e12 * 0.5)
    assert plan.step_s == pytest.approx(seconds)
    assert plan.days(plan.tokens_per_step * 86400) == pytest.approx(seconds)
    with pytest.raises(ValueError, match="mfu is 40"):
        make_plan(SHAPE, RUN, cluster, mfu=40)


def test_time_covers_what_travels_where_computing_does_not_and_what_is_waited_for() -> None:
    slow = Cluster(
        gpus=4, gpu_memory_bytes=80 * GIB, gpus_per_node=2, node_bandwidth=1e9, network_bandwidth=1e6
    )
    ddp = make_plan(SHAPE, replace(RUN, parallelism="ddp", gradient_accumulation_steps=3), slow)
    # Gradients once a step, in a ring over two nodes with two adapters each; each half of a ring's two passes.
    exchange = 2 * 4 * SHAPE.num_parameters() * (1 / 2) / (2 * 1e6) / slow.reached
    assert ddp.compute_s < 0.01 * exchange
    assert ddp.step_s == pytest.approx(exchange)

    fast = replace(slow, node_bandwidth=1e15, network_bandwidth=1e15)
    assert replace(ddp, cluster=fast).step_s == pytest.approx(ddp.compute_s)

    # What tensor-parallel peers send is waited for, and stays within their node.
    pairs = make_plan(SHAPE, replace(RUN, parallelism="fsdp", tensor_parallel=2), slow)
    assert pairs.waited_s > 0
    assert pairs.step_s == pytest.approx(pairs.overlapped_s + pairs.waited_s)
    assert replace(pairs, cluster=replace(slow, network_bandwidth=1e7)).waited_s == pytest.approx(
        pairs.waited_s, rel=1e-2
    )


def test_gradients_that_accumulate_travel_as_often_as_the_layout_says() -> None:
    cluster = Cluster(gpus=4, gpu_memory_bytes=80 * GIB, gpus_per_node=2)

    def overlapped(layout: Any, micro_steps: int) -> float:
        run = replace(RUN, gradient_accumulation_steps=micro_steps, **layout)
        return make_plan(SHAPE, run, cluster).overlapped_s

    assert overlapped(FSDP, 6) == pytest.approx(6 * overlapped(FSDP, 1), rel=0.01)
    ddp = {"parallelism": "ddp"}
    assert overlapped(ddp, 6) == pytest.approx(overlapped(ddp, 1))
    # HSDP gathers and scatters within the node each time; its copies meet once.
    assert overlapped(HSDP, 1) < overlapped(HSDP, 6) < 6 * overlapped(HSDP, 1)
