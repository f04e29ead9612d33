"""The same seed and data give the same run, however the model and the data are divided over the workers."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache, partial
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor

from llama_ray.data.dataset.batch import Batch
from llama_ray.model.config import LlamaConfig
from llama_ray.model.llama import Llama
from llama_ray.training.config import TrainConfig
from llama_ray.training.optimizers.build import build_optimizer
from llama_ray.training.parallel.layout import choose_layout
from llama_ray.training.parallel.parallelize import gather_model, parallelize
from llama_ray.training.parallel.process_group import rank, world_size
from llama_ray.training.step import Stepper, Validation
from tests.training.helpers import DDP, FSDP, HSDP, MUON, TP, Settings, in_processes

CPU = torch.device("cpu")
STEPS, SEQUENCES, MICRO_STEPS, LENGTH = 5, 8, 2, 32
SOURCES = 2
FP32_TOLERANCE = 1e-4
"""Nats per token after five steps at a high rate; differences that were seen are below 2e-5."""
BF16_TOLERANCE = 2e-3
"""The same where matrix products, or the iterations of Muon, are in bf16."""

TIED: Settings = {"tie_embeddings": True}
BF16: Settings = {"precision": "bf16"}
Z_LOSS: Settings = {"z_loss": 1e-2}
SELECTIVE: Settings = {"activation_checkpointing": "selective"}
FULL: Settings = {"activation_checkpointing": "full"}
MASK: Settings = {"document_mask": True}

# What changes the numbers, unlike a layout; each is run on one worker to compare with.
METHODS: dict[str, Settings] = {
    "adamw": {},
    "muon": MUON,
    "tied": TIED,
    "z-loss": Z_LOSS,
    "bf16": BF16,
    "mask": MASK,
}

LAYOUTS: dict[str, tuple[int, Settings]] = {
    "ddp": (2, DDP),
    "fsdp": (2, FSDP),
    "tp": (2, TP),
    "fsdp-selective": (2, {**FSDP, **SELECTIVE}),
    "fsdp-full": (2, {**FSDP, **FULL}),
    "ddp-muon": (2, {**DDP, **MUON}),
    "fsdp-muon": (2, {**FSDP, **MUON}),
    "tp-muon": (2, {**TP, **MUON}),
    "fsdp-tied": (2, {**FSDP, **TIED}),
    "tp-tied": (2, {**TP, **TIED}),
    "tp-z-loss": (2, {**TP, **Z_LOSS}),
    "fsdp-bf16": (2, {**FSDP, **BF16}),
    "tp-bf16": (2, {**TP, **BF16}),
    "tp-compiled-selective": (2, {**TP, **SELECTIVE, "compile": True}),
    "ddp-mask": (2, {**DDP, **MASK}),
    "fsdp-full-mask": (2, {**FSDP, **FULL, **MASK}),
    "tp-compiled-selective-mask": (2, {**TP, **SELECTIVE, **MASK, "compile": True}),
    "fsdp-on-4": (4, FSDP),
    "hsdp-on-4": (4, HSDP),
    "fsdp-tp-on-4": (4, {**FSDP, **TP}),
    "fsdp-tp-mask-on-4": (4, {**FSDP, **TP, **MASK}),
    "fsdp-tp-muon-on-4": (4, {**FSDP, **TP, **MUON}),
}
SHARDED = [name for name, (_, settings) in LAYOUTS.items() if settings.get("parallelism") != "ddp"]


@dataclass(frozen=True)
class Run:
    """What one worker saw of a run."""

    losses: list[float]
    source_losses: list[list[float]]
    norms: list[float]
    validation: Validation
    first_weights: dict[str, np.ndarray]
    """Of the gathered model; empty on a worker that gets none."""
    last_weights: dict[str, np.ndarray]
    held_elements: int
    """Number of parameters that this worker holds."""
    skips_a_nan: bool
    """Whether a step is skipped, and changes nothing, if the gradient of one worker alone is not finite."""
    restores_the_optimizer: bool
    """Whether the optimizer's state is the same after a round trip through torch's distributed state dicts."""
    gathers_above_the_limit: bool


def run(settings: Settings) -> Run:
    """Train with `settings` in this process group, or alone."""
    settings = dict(settings)
    tied = settings.pop("tie_embeddings", False)
    shape = LlamaConfig.preset("llama-tiny", max_seq_len=LENGTH, tie_embeddings=tied)
    defaults = {
        "precision": "fp32",
        "learning_rate": 3e-3,
        "max_grad_norm": 0.5,
        "seed": 1,
        "seq_len": LENGTH,
        "document_mask": False,
    }
    config = TrainConfig(**{**defaults, **settings})
    layout = choose_layout(shape, config, world_size()).with_mesh(CPU)
    # Else torch would count the graphs of all runs in this process, and stop compiling at eight.
    torch.compiler.reset()
    with compiling_without_cpp() if config.compile else nullcontext():
        model = parallelize(
            Llama(shape, device="meta"), config, layout, CPU, compile_blocks=bool(config.compile)
        )
    stepper = Stepper(
        model, build_optimizer(model, config), config, device=CPU, layout=layout, num_sources=SOURCES
    )
    first_weights = weights(gather_model(model))

    share = SEQUENCES // layout.data_world
    own = slice(layout.data_rank * share, (layout.data_rank + 1) * share)
    # Micro-batches are of one size, because torch would compile again for another.
    size = max(share // MICRO_STEPS, 1)
    batches = global_batches(shape.vocab_size, documents=config.document_mask)
    results = [stepper.step(split(rows(batch, own), size)) for batch in batches]
    last = split(rows(batches[-1], own), size)

    # Workers have unequal shares of these batches; all tensor-parallel peers have the same.
    validation = split(batches[0], size) + split(rows(batches[1], slice(2)), size)
    return Run(
        losses=[result.loss.item() for result in results],
        source_losses=[result.source_losses.tolist() for result in results],
        norms=[result.grad_norm.item() for result in results],
        validation=stepper.validate(validation[layout.data_rank :: layout.data_world]),
        first_weights=first_weights,
        last_weights=weights(gather_model(model)),
        held_elements=sum(local(p).numel() for p in model.parameters()),
        skips_a_nan=skips_a_nan(stepper, last),
        restores_the_optimizer=restores_the_optimizer(stepper),
        gathers_above_the_limit=gather_model(model, limit_bytes=1000) is not None,
    )


def compiling_without_cpp() -> AbstractContextManager[Any]:
    """Compile by tracing and autograd, where layouts differ, but without a minute of the C++ compiler."""
    return patch("torch.compile", partial(torch.compile, backend="aot_eager"))


def global_batches(vocab_size: int, *, documents: bool) -> list[Batch]:
    """Return batches that can be learned and of which workers have unequal numbers of targets."""
    generator = torch.Generator().manual_seed(0)
    batches = []
    for _ in range(STEPS):
        tokens = torch.randint(0, vocab_size, (SEQUENCES, LENGTH + 1), generator=generator)
        tokens[:, ::2] = 7
        inputs, targets = tokens[:, :-1], tokens[:, 1:].clone()
        targets[inputs % 5 == 0] = -100
        begins = torch.rand(inputs.shape, generator=generator) < 0.2
        starts = torch.where(begins, torch.arange(LENGTH), 0).cummax(1).values.int()
        batches.append(Batch(inputs, targets, starts if documents else None))
    return batches


def rows(batch: Batch, chosen: slice) -> Batch:
    """Return these rows of a batch, of several sources."""
    inputs, targets, starts = (
        x if x is None else x[chosen] for x in (batch.inputs, batch.targets, batch.starts)
    )
    return Batch(inputs, targets, starts, sources=inputs[:, 1] % SOURCES)


def split(batch: Batch, size: int) -> list[Batch]:
    return [rows(batch, slice(first, first + size)) for first in range(0, len(batch.inputs), size)]


def weights(model: Llama | None) -> dict[str, np.ndarray]:
    return {n: p.clone().numpy() for n, p in model.named_parameters()} if model else {}


def local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def held_state(stepper: Stepper) -> list[Tensor]:
    """Return this worker's shards of weights and optimizer state."""
    tensors: list[Tensor] = []
    for parameter in stepper.model.parameters():
        state = stepper.optimizer.state[parameter]
        tensors += [parameter, *(state[key] for key in sorted(state))]
    return [local(tensor) for tensor in tensors]


def is_unchanged(stepper: Stepper, before: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(held_state(stepper), before, strict=True))


def skips_a_nan(stepper: Stepper, micro_batches: list[Batch]) -> bool:
    before = [tensor.clone() for tensor in held_state(stepper)]
    hook = None
    if rank() == world_size() - 1:
        model = stepper.model.module if hasattr(stepper.model, "module") else stepper.model
        # Not in a block, which would be compiled again.
        hook = model.norm.register_forward_hook(lambda module, args, output: output * float("nan"))
    skipped = bool(stepper.step(micro_batches).skipped)
    if hook:
        hook.remove()
    return skipped and is_unchanged(stepper, before)


def restores_the_optimizer(stepper: Stepper) -> bool:
    options = StateDictOptions()
    assert get_model_state_dict(stepper.model, options=options)
    state = get_optimizer_state_dict(stepper.model, stepper.optimizer, options=options)
    before = [tensor.clone() for tensor in held_state(stepper)]
    stepper.optimizer = build_optimizer(stepper.model, stepper.config)
    set_optimizer_state_dict(stepper.model, stepper.optimizer, state, options=options)
    return is_unchanged(stepper, before)


def run_all(settings: list[Settings]) -> list[Run]:
    return [run(each) for each in settings]


@cache
def runs_by_rank(workers: int) -> dict[str, list[Run]]:
    """Train in all layouts of `workers` workers; starting a process group takes longer than a run, so one is enough."""
    names = [name for name, (size, _) in LAYOUTS.items() if size == workers]
    by_rank = in_processes(workers, run_all, [LAYOUTS[name][1] for name in names])
    return {name: [runs[i] for runs in by_rank] for i, name in enumerate(names)}


@pytest.fixture
def parallel(layout: str) -> list[Run]:
    """The run in `layout`, as each worker saw it."""
    return runs_by_rank(LAYOUTS[layout][0])[layout]


@cache
def run_alone(method: str) -> Run:
    return run(METHODS[method])


@pytest.fixture
def alone(layout: str) -> Run:
    """The run on one worker with the same model and optimizer."""
    return run_alone(method_of(layout))


def method_of(layout: str) -> str:
    settings = LAYOUTS[layout][1]
    [method] = [
        name for name, method in METHODS.items() if method and method.items() <= settings.items()
    ] or ["adamw"]
    return method


def tolerance(layout: str) -> float:
    return BF16_TOLERANCE if method_of(layout) in ("muon", "bf16") else FP32_TOLERANCE


every_layout = pytest.mark.parametrize("layout", LAYOUTS)


@every_layout
def test_losses_of_sources_are_those_of_one_worker(layout: str, parallel: list[Run], alone: Run) -> None:
    for seen in parallel:
        for ours, theirs in zip(seen.source_losses, alone.source_losses, strict=True):
            assert ours == pytest.approx(theirs, abs=tolerance(layout))


@every_layout
def test_losses_are_those_of_one_worker(layout: str, parallel: list[Run], alone: Run) -> None:
    for seen in parallel:
        assert seen.losses == pytest.approx(alone.losses, abs=tolerance(layout))


@every_layout
def test_gradient_norms_are_those_of_one_worker(layout: str, parallel: list[Run], alone: Run) -> None:
    for seen in parallel:
        assert seen.norms == pytest.approx(alone.norms, rel=10 * tolerance(layout))


@every_layout
def test_the_validation_loss_is_that_of_one_worker(layout: str, parallel: list[Run], alone: Run) -> None:
    for seen in parallel:
        ours, theirs = ([run.validation.loss, *run.validation.source_losses] for run in (seen, alone))
        assert len(ours) == 1 + SOURCES
        assert ours == pytest.approx(theirs, abs=tolerance(layout))


@every_layout
def test_workers_agree_on_losses_and_norms_to_the_bit(parallel: list[Run]) -> None:
    for seen in parallel:
        assert (seen.losses, seen.norms) == (parallel[0].losses, parallel[0].norms)


@every_layout
def test_a_gradient_that_is_not_finite_on_one_worker_is_skipped_by_all(parallel: list[Run]) -> None:
    assert all(seen.skips_a_nan for seen in parallel)


@every_layout
def test_the_optimizer_state_survives_a_checkpoint_of_torch(parallel: list[Run]) -> None:
    assert all(seen.restores_the_optimizer for seen in parallel)


@every_layout
def test_initial_weights_are_those_of_one_worker_to_the_bit(parallel: list[Run], alone: Run) -> None:
    gathered = parallel[0].first_weights
    assert gathered.keys() == alone.first_weights.keys()
    for name, weight in alone.first_weights.items():
        assert (gathered[name] == weight).all(), name


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if tolerance(name) == FP32_TOLERANCE])
def test_final_weights_are_those_of_one_worker(parallel: list[Run], alone: Run) -> None:
    gathered = parallel[0].last_weights
    assert gathered.keys() == alone.last_weights.keys()
    for name, weight in alone.last_weights.items():
        assert abs(gathered[name] - weight).max() < 2e-4, name


@pytest.mark.parametrize("layout", SHARDED)
def test_no_worker_holds_more_than_its_share(layout: str, parallel: list[Run], alone: Run) -> None:
    workers, settings = LAYOUTS[layout]
    shares = workers if settings.get("parallelism", "fsdp") == "fsdp" else 2
    # Norms are too small to be divided evenly.
    for seen in parallel:
        assert seen.held_elements < 1.01 * alone.held_elements / shares


@pytest.mark.parametrize("layout", SHARDED)
def test_a_sharded_model_above_the_limit_is_not_gathered(parallel: list[Run]) -> None:
    assert not any(seen.gathers_above_the_limit for seen in parallel)


@pytest.mark.parametrize("method", METHODS)
def test_one_worker_learns_skips_and_restores(method: str) -> None:
    seen = run_alone(method)
    assert seen.losses[-1] < seen.losses[0] - 0.2
    assert seen.skips_a_nan
    assert seen.restores_the_optimizer
