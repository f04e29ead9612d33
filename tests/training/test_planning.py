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
from llama_ray.training.layout import ALONE, GIB, choose_layout
from llama_ray.training.memory_trace import MemoryTrace
from llama_ray.training.optimizer import build_optimizer
from llama_ray.training.parallel import parallelize
from llama_ray.training.planning import Cluster, make_plan, nearest_that_fits, peak_memory
from llama_ray.training.step import Stepper
from tests.training.processes import in_processes

# fp32, since short sequences in bf16 attend on a CPU as no GPU does; deep enough to be extrapolated.
SHAPE = LlamaConfig.preset(
    "llama-tiny", num_layers=9, hidden_size=128, intermediate_size=352, max_seq_len=128
)
RUN = TrainConfig(precision="fp32", batch_size=4)


def make_stepper(shape: LlamaConfig, run: TrainConfig, layout: Any = ALONE) -> Stepper:
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

    planned = sum(peak_memory(SHAPE, run, ALONE).values())

    assert planned == pytest.approx(measured, rel=0.05)


def test_a_plan_of_fsdp_is_what_two_real_workers_hold() -> None:
    run = replace(RUN, parallelism="fsdp")
    measured = in_processes(2, traced_worker, SHAPE, run)

    planned = peak_memory(SHAPE, run, choose_layout(SHAPE, run, 2))

    for kind, size in planned.items():
        assert size == pytest.approx(measured[0][kind], rel=0.05, abs=64 * 1024), kind


def traced_worker(shape: LlamaConfig, run: TrainConfig) -> dict[str, int]:
    layout = choose_layout(shape, run, 2).on(torch.device("cpu"))
    stepper = make_stepper(shape, run, layout)
    step(stepper, shape, run)
    with MemoryTrace() as trace:
        trace.watch(stepper.model, stepper.optimizer)
        step(stepper, shape, run)
    return dict(trace.peak)


def test_extrapolated_layers_weigh_what_traced_ones_do(monkeypatch: pytest.MonkeyPatch) -> None:
    run = replace(RUN, parallelism="fsdp", precision="bf16")
    layout = choose_layout(SHAPE, run, 4)
    extrapolated = peak_memory(SHAPE, run, layout)
    monkeypatch.setattr("llama_ray.training.planning._DEPTHS", (4, SHAPE.num_layers))
    assert sum(extrapolated.values()) == pytest.approx(
        sum(peak_memory(SHAPE, run, layout).values()), rel=0.01
    )


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
    cluster = Cluster(gpus=2, gpu_memory_bytes=80 * GIB, gpu_flops=1e12)
    plan = make_plan(SHAPE, replace(RUN, parallelism="ddp"), cluster, mfu=0.5)
    seconds = 2 * 4 * 128 * SHAPE.flops_per_token(128) / (2 * 1e12 * 0.5)
    assert plan.step_s == pytest.approx(seconds)
    assert plan.days(plan.tokens_per_step * 86400) == pytest.approx(seconds)
    with pytest.raises(ValueError, match="mfu is 40"):
        make_plan(SHAPE, RUN, cluster, mfu=40)
