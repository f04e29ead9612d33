"""Trace a training step: the real model and its real sharding, on fake tensors.

A step runs under a fake tensor mode in a fake process group of the planned size. Every operation, those of FSDP and of
the optimizer included, happens to tensors that have a shape but no memory. `MemoryTrace` counts these tensors, and
`TrafficTrace` counts what the workers send each other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn

from llama_ray.data.dataset.batch import Batch
from llama_ray.model.attention.causal import Attend, flash_attention
from llama_ray.model.attention.documents import DocumentAttention, causal_varlen, document_mask
from llama_ray.model.config import LlamaConfig
from llama_ray.model.llama import Llama
from llama_ray.training.config import TrainConfig
from llama_ray.training.optimizers.build import build_optimizer
from llama_ray.training.parallel.layout import SINGLE_WORKER, Layout
from llama_ray.training.parallel.parallelize import parallelize, unallocated_model
from llama_ray.training.planning.memory_trace import Memory, MemoryTrace
from llama_ray.training.planning.traffic import Collective, Traffic, TrafficTrace
from llama_ray.training.precision import DTYPES
from llama_ray.training.step import Stepper
from llama_ray.utils.torch_private import fake_process_group, fake_tensors

TRACED_DEPTHS = (4, 6)
"""Numbers of layers to trace of a deeper model; 4 are enough for FSDP to prefetch as it does in any deeper one."""


@dataclass(frozen=True)
class StepTrace:
    """What one worker does in a step: memory by part of the step, and traffic by micro-step and of the update."""

    peaks: dict[str, Memory]
    """Bytes by kind at the peak of each part."""
    micro_step: Traffic
    """Traffic of each micro-step except the last; these may defer gradient all-reduces to it."""
    last_micro_step: Traffic
    update: Traffic

    @property
    def memory(self) -> Memory:
        """Bytes by kind at the peak of the step."""
        return max(self.peaks.values(), key=lambda memory: sum(memory.values()))


def trace_step(
    model: LlamaConfig, config: TrainConfig, layout: Layout, *, depths: tuple[int, int] = TRACED_DEPTHS
) -> StepTrace:
    """Trace a step of the first worker of `layout`; the optimizer already has its state.

    A model deeper than `depths` is traced at these two depths and extrapolated: in each part of a step, every further
    layer adds the same memory and the same traffic.
    """
    if model.num_layers <= depths[1]:
        return _trace(model, config, layout)
    shallow, deep = (_trace(replace(model, num_layers=depth), config, layout) for depth in depths)
    times = (model.num_layers - depths[0]) / (depths[1] - depths[0])

    def extrapolate(shallow: Mapping[Any, float], deep: Mapping[Any, float]) -> dict[Any, int]:
        return {
            key: int(shallow.get(key, 0) + times * (size - shallow.get(key, 0))) for key, size in deep.items()
        }

    return StepTrace(
        {part: extrapolate(shallow.peaks[part], deep.peaks[part]) for part in shallow.peaks},
        extrapolate(shallow.micro_step, deep.micro_step),
        extrapolate(shallow.last_micro_step, deep.last_micro_step),
        extrapolate(shallow.update, deep.update),
    )


def watch_step(stepper: Stepper, model: Llama, micro_batches: Sequence[Batch]) -> StepTrace:
    """Take a step, real or fake, of one or two micro-steps, and trace it. `model` is inside `stepper.model`."""
    with TrafficTrace() as traffic, MemoryTrace() as memory, ExitStack() as hooks:
        memory.watch(stepper.model, stepper.optimizer)
        _mark_memory_parts(memory, model, stepper.optimizer, hooks)
        micro_steps = count(1)

        def begin_micro_step(*_: Any) -> None:
            traffic.begin("last" if next(micro_steps) == len(micro_batches) else "micro-step")

        # Prepended, so that it runs before the hook in which a sharded model gathers its first parameters.
        hooks.callback(stepper.model.register_forward_pre_hook(begin_micro_step, prepend=True).remove)
        hooks.callback(stepper.optimizer.register_step_pre_hook(lambda *_: traffic.begin("update")).remove)
        stepper.step(micro_batches)
    parts = traffic.parts
    return StepTrace(memory.peaks, parts["micro-step"], parts["last"], parts["update"])


def _trace(model_config: LlamaConfig, config: TrainConfig, layout: Layout) -> StepTrace:
    """Trace all layers of the model."""
    if config.precision == "fp8":
        # The CPU stands for the GPU, see below; memory and traffic are those of bf16.
        config = replace(config, precision="bf16")
    if config.task == "dpo":
        # Fake batches hold no pairs, whose loss takes the memory of that of tokens.
        config = replace(config, task="sft")
    # DDP's constructor communicates real bytes, so a replicated model is traced as that of a single worker.
    replicated = not layout.sharded and layout.world_size > 1
    # The CPU stands for the GPU, because FSDP would ask a CUDA device for streams.
    device = torch.device("cpu")
    model = unallocated_model(model_config, config)
    model.forward = partial(  # type: ignore[method-assign]
        _forward_as_on_gpu, DTYPES[config.precision], model.forward
    )
    with fake_process_group(layout.world_size) if layout.world_size > 1 else nullcontext():
        traced = SINGLE_WORKER if replicated else layout.with_mesh(device)
        # Before tensors are fake, because meshes look up ranks in tensors of their own.
        parallel = parallelize(
            model, config, traced, torch.device("meta"), compile_blocks=False, init_weights=False
        )
        with fake_tensors():
            model.materialize(device)
            stepper = Stepper(
                parallel, build_optimizer(parallel, config), config, device=device, layout=traced
            )
            trace = _trace_second_step(stepper, model)
    return _with_ddp(trace, model, layout) if replicated else trace


def _trace_second_step(stepper: Stepper, model: Llama) -> StepTrace:
    """Take one small step, which creates the optimizer's state, then trace a full one."""
    config = stepper.config
    tokens = torch.zeros(config.batch_size, config.seq_len or model.config.max_seq_len, dtype=torch.int64)
    starts = tokens.int() if config.document_mask else None
    first = Batch(tokens[:1], tokens[:1], None if starts is None else starts[:1])
    stepper.step([first])
    batch = Batch(tokens, tokens, starts)
    return watch_step(stepper, model, [batch] * min(config.gradient_accumulation_steps, 2))


def _forward_as_on_gpu(
    dtype: torch.dtype,
    forward: Callable[..., Tensor],
    tokens: Tensor,
    positions: Tensor | None = None,
    attend: DocumentAttention | None = None,
    **options: Any,
) -> Tensor:
    """Attend with the kernels of a GPU, which keep no scores; those of a CPU might."""
    on_gpu: Attend = _flash_attend
    if attend is not None and attend.starts is not None:
        if dtype is torch.float32:
            on_gpu = DocumentAttention(mask=document_mask(attend.starts, dtype))
        else:
            # One document a row; each further one takes four bytes.
            borders = torch.zeros(len(tokens) + 1, dtype=torch.int32)
            on_gpu = DocumentAttention(borders=borders, varlen=causal_varlen())
    # Positions on a CPU are read, to check them, which fake ones cannot be. Those of one row serve for all.
    return forward(tokens, None, on_gpu, **options)


def _flash_attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return flash_attention(query, key, value)


def _with_ddp(trace: StepTrace, model: Llama, layout: Layout) -> StepTrace:
    """Add to the trace of a single worker what DDP adds: buckets that hold all gradients, and their all-reduce."""
    gradients = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    return replace(
        trace,
        peaks={part: {**memory, "gradients": gradients} for part, memory in trace.peaks.items()},
        last_micro_step={Collective("all_reduce", tuple(range(layout.world_size))): gradients},
    )


def _mark_memory_parts(
    trace: MemoryTrace, model: Llama, optimizer: torch.optim.Optimizer, hooks: ExitStack
) -> None:
    """Begin a part wherever the peak of a step may be, so that each part grows linearly with the number of layers."""

    def begin_in_backward(part: str) -> Any:
        def register(module: nn.Module, args: Any, output: Tensor) -> None:
            output.register_hook(lambda grad: trace.begin(part))  # type: ignore[no-untyped-call]

        return register

    last = len(model.layers) - 1
    parts = {last - 1: "middle blocks", last: "top block", 0: "bottom block"}
    for i, block in enumerate(model.layers):
        if i in parts:
            hooks.callback(block.register_forward_hook(begin_in_backward(parts[i])).remove)
    begin_forward = model.embed_tokens.register_forward_pre_hook(lambda *_: trace.begin("forward and head"))
    hooks.callback(begin_forward.remove)
    hooks.callback(optimizer.register_step_pre_hook(lambda *_: trace.begin("update")).remove)
