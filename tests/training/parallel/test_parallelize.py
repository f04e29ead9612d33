"""The same seed and data give the same run, however model and data are divided over the workers."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor

import llama_ray.training.parallel.parallelize as parallelize_module
from llama_ray.model.config import LlamaConfig
from llama_ray.model.llama import Llama
from llama_ray.training.config import TrainConfig
from llama_ray.training.optimizers.build import build_optimizer
from llama_ray.training.parallel.layout import choose_layout
from llama_ray.training.parallel.parallelize import gather_model, parallelize
from llama_ray.training.parallel.process_group import rank, world_size
from llama_ray.training.step import Stepper
from tests.training.helpers import in_processes

CPU = torch.device("cpu")
STEPS, SEQUENCES, MICRO_STEPS = 5, 8, 2
LOSS_TOLERANCE = 1e-4
"""Nats per token in fp32, after five steps at a high rate; what is seen is below 2e-5."""
BF16_TOLERANCE = 2e-3
"""The same where products, or Muon's iterations, are in bf16."""

Settings = dict[str, Any]
DDP, FSDP, HSDP = {"parallelism": "ddp"}, {"parallelism": "fsdp"}, {"parallelism": "hsdp", "fsdp_size": 2}
TP: Settings = {"tensor_parallel": 2}
MUON, TIED = {"optimizer": "muon"}, {"tie_embeddings": True}

BF16 = {"precision": "bf16"}

ON_ONE: list[Settings] = [{}, MUON, TIED, {"z_loss": 1e-2}, BF16]
ON_TWO: list[Settings] = [
    DDP,
    FSDP,
    TP,
    *({**FSDP, "activation_checkpointing": mode} for mode in ("selective", "full")),
    *({**layout, **MUON} for layout in (DDP, FSDP, TP)),
    *({**layout, **TIED} for layout in (FSDP, TP)),
    {**TP, "z_loss": 1e-2},
    *({**layout, **BF16} for layout in (FSDP, TP)),
    {**TP, "compile": True, "activation_checkpointing": "selective"},
]
ON_FOUR: list[Settings] = [FSDP, HSDP, {**FSDP, **TP}, {**FSDP, **TP, **MUON}]


def run_all(many: list[Settings]) -> list[dict[str, Any]]:
    """One process group is used for several runs, since starting one takes longer than a run."""
    return [run(settings) for settings in many]


def run(settings: Settings) -> dict[str, Any]:
    told = dict(settings)
    shape = LlamaConfig.preset("llama-tiny", max_seq_len=32, tie_embeddings=told.pop("tie_embeddings", False))
    config = TrainConfig(
        **{"precision": "fp32", "learning_rate": 3e-3, "max_grad_norm": 0.5, "seed": 1, "seq_len": 32, **told}
    )
    layout = choose_layout(shape, config, world_size()).with_mesh(CPU)
    if config.compile:
        # Tracing and autograd, where layouts differ, without a minute of the C++ compiler.
        torch.compile = partial(torch.compile, backend="aot_eager")
    model = parallelize(Llama(shape, device="meta"), config, layout, CPU, compile_blocks=bool(config.compile))
    start = gather_model(model, config)
    start_weights = {n: p.clone().numpy() for n, p in start.named_parameters()} if start else {}
    local = [p.to_local() if isinstance(p, DTensor) else p for p in model.parameters()]
    optimizer = build_optimizer(model, config)
    stepper = Stepper(model, optimizer, config, device=CPU, layout=layout)

    generator = torch.Generator().manual_seed(0)
    losses, norms = [], []
    share = SEQUENCES // layout.data_world
    for _ in range(STEPS):
        tokens = torch.randint(0, shape.vocab_size, (SEQUENCES, 33), generator=generator)
        tokens[:, ::2] = 7  # something to learn
        inputs, targets = tokens[:, :-1], tokens[:, 1:].clone()
        targets[inputs % 5 == 0] = -100  # workers have unequal numbers of targets
        mine = slice(layout.data_rank * share, (layout.data_rank + 1) * share)
        size = max(share // MICRO_STEPS, 1)
        result = stepper.step(list(zip(inputs[mine].split(size), targets[mine].split(size), strict=True)))
        losses.append(result.loss.item())
        norms.append(result.grad_norm.item())

    # Workers have unequal shares of the validation batches; all tensor-parallel peers have the same.
    pieces = list(zip(inputs.split(3), targets.split(3), strict=True))
    validation = stepper.validate(pieces[layout.data_rank :: layout.data_world])
    end = gather_model(model, config)
    return {
        "losses": losses,
        "norms": norms,
        "validation": validation,
        "start": start_weights,
        "end": {n: p.clone().numpy() for n, p in end.named_parameters()} if end else {},
        "local_elements": sum(p.numel() for p in local),
        "skip": skip(stepper, inputs[mine], targets[mine]),
        "restored": restored(stepper),
        "gathers_too_much": gathers_too_much(stepper),
    }


def skip(stepper: Stepper, inputs: torch.Tensor, targets: torch.Tensor) -> tuple[bool, bool]:
    """(skipped, nothing changed) of a step in which the gradient of one worker alone is not finite."""
    before = [t.clone() for t in tensors_of(stepper)]
    hook = None
    if rank() == world_size() - 1:
        inner = stepper.model.module if hasattr(stepper.model, "module") else stepper.model
        hook = inner.layers[0].mlp.register_forward_hook(lambda module, args, out: out * float("nan"))
    skipped = bool(stepper.step([(inputs, targets)]).skipped)
    if hook:
        hook.remove()
    return skipped, all(torch.equal(a, b) for a, b in zip(tensors_of(stepper), before, strict=True))


def gathers_too_much(stepper: Stepper) -> bool:
    """Whether a sharded model above the limit is put together all the same."""
    limit, parallelize_module.GATHER_LIMIT_BYTES = parallelize_module.GATHER_LIMIT_BYTES, 1000
    try:
        return stepper.layout.sharded and gather_model(stepper.model, stepper.config) is not None
    finally:
        parallelize_module.GATHER_LIMIT_BYTES = limit


def tensors_of(stepper: Stepper) -> list[torch.Tensor]:
    """This worker's part of weights and optimizer state."""
    found: list[torch.Tensor] = []
    for parameter in stepper.model.parameters():
        state = stepper.optimizer.state[parameter]
        found += [parameter, *(state[key] for key in sorted(state))]
    return [t.to_local() if isinstance(t, DTensor) else t for t in found]


def restored(stepper: Stepper) -> bool:
    """Whether the optimizer's state goes through torch's distributed state dicts and back."""
    options = StateDictOptions()
    assert get_model_state_dict(stepper.model, options=options)
    state = get_optimizer_state_dict(stepper.model, stepper.optimizer, options=options)
    before = [t.clone() for t in tensors_of(stepper)]
    fresh = build_optimizer(stepper.model, stepper.config)
    set_optimizer_state_dict(stepper.model, fresh, state, options=options)
    stepper.optimizer = fresh
    return all(torch.equal(a, b) for a, b in zip(tensors_of(stepper), before, strict=True))


@pytest.fixture(scope="module")
def alone() -> list[dict[str, Any]]:
    return run_all(ON_ONE)


def counterpart(settings: Settings, alone: list[dict[str, Any]]) -> dict[str, Any]:
    """The run on one worker that has the same model and optimizer."""
    matters = {
        k: v for k, v in settings.items() if k in ("optimizer", "tie_embeddings", "z_loss", "precision")
    }
    return alone[ON_ONE.index(matters)]


@pytest.mark.parametrize(("workers", "many"), [(2, ON_TWO), (4, ON_FOUR)], ids=["two", "four"])
def test_every_layout_takes_the_same_steps(
    workers: int, many: list[Settings], alone: list[dict[str, Any]]
) -> None:
    by_rank = in_processes(workers, run_all, many)
    for i, settings in enumerate(many):
        one = counterpart(settings, alone)
        tolerance = BF16_TOLERANCE if settings.keys() & {"optimizer", "precision"} else LOSS_TOLERANCE
        for results in by_rank:
            ours = results[i]
            assert ours["losses"] == pytest.approx(one["losses"], abs=tolerance), settings
            assert ours["norms"] == pytest.approx(one["norms"], rel=10 * tolerance), settings
            assert ours["validation"] == pytest.approx(one["validation"], abs=tolerance), settings
            assert ours["skip"] == (True, True), settings
            assert ours["restored"], settings
            assert not ours["gathers_too_much"], settings
            assert ours["losses"] == by_rank[0][i]["losses"], settings
            assert ours["norms"] == by_rank[0][i]["norms"], settings
            # No worker holds more than its share; the norms are too small to be split evenly.
            whole = one["local_elements"]
            share = workers if settings.get("parallelism", "fsdp") == "fsdp" else 2
            if settings.get("parallelism") != "ddp":
                assert ours["local_elements"] < 1.01 * whole / share, settings
        gathered = by_rank[0][i]
        assert gathered["start"].keys() == one["start"].keys()
        for name, weight in one["start"].items():
            assert (gathered["start"][name] == weight).all(), (settings, name)
        if tolerance == LOSS_TOLERANCE:
            for name, weight in one["end"].items():
                assert abs(gathered["end"][name] - weight).max() < 2e-4, (settings, name)


def test_one_worker_learns_skips_and_restores(alone: list[dict[str, Any]]) -> None:
    for result in alone:
        assert result["losses"][-1] < result["losses"][0] - 0.2
        assert result["skip"] == (True, True)
        assert result["restored"]
