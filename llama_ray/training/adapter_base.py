"""The frozen weights beneath adapters: how a run reads them, and how it knows them again."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch

from llama_ray.model.adapter_files import base_of, is_adapter, load_lora_config, stored_base_weights
from llama_ray.model.config import LlamaConfig
from llama_ray.model.llama import Llama
from llama_ray.model.parameter_names import hf_name
from llama_ray.model.weights_hash import combined_digest, tensor_digests
from llama_ray.pretrained import load_shape, open_pretrained, resolve
from llama_ray.training.checkpointing.state import plain_parameters
from llama_ray.training.config import TrainConfig
from llama_ray.training.hosts.group import HostGroup
from llama_ray.training.initial_weights import POSITIONS, fill
from llama_ray.training.parallel.process_group import rank, world_size
from llama_ray.utils.errors import printable


@dataclass(frozen=True)
class AdapterBase:
    """The model that adapters are trained for: its reference, and what identifies its weights."""

    reference: str
    weights_hash: str


def check_base(model: LlamaConfig, config: TrainConfig) -> None:
    """Raise ValueError unless adapters of `model` can be trained for `config.init_from`."""
    ref = printable(str(config.init_from))
    if is_adapter(resolve(str(config.init_from), weights=False)):
        raise ValueError(
            f"init_from is {ref}, an adapter; with lora_rank it must be a whole model; merge the adapter with "
            "export_checkpoint.py --merge, or name its base"
        )
    stored = load_shape(str(config.init_from))
    for name in POSITIONS:
        ours, theirs = getattr(model, name), getattr(stored, name)
        if ours != theirs:
            raise ValueError(
                f"{name} is {ours}; with lora_rank it must be {theirs} as in {ref}, because adapters do not change it; "
                "leave it out (--seq_len sets the length of sequences)"
            )


def check_same_adapters(config: TrainConfig, resume_from: Path) -> None:
    """Raise ValueError unless the checkpoint `resume_from` holds adapters like those of `config`, or none either."""
    before = load_lora_config(resume_from) if is_adapter(resume_from) else None
    for name in ("rank", "alpha", "targets", "rslora"):
        there, here = (getattr(lora, name, "none") for lora in (before, config.lora))
        if there != here:
            raise ValueError(
                f"lora_{name} is {here}; it was {there} in {resume_from}; resume with the same adapters, or begin a "
                "new run with --init_from"
            )


@torch.no_grad()
def read_base(model: Llama, config: TrainConfig, resume_from: Path | None) -> AdapterBase:
    """Fill the frozen weights of `model`, which may be sharded, with those of the model that it adapts.

    Every worker must call it; each reads its own share, and a share of what is hashed. Raises ValueError if the weights
    are not those that the adapters in the checkpoint `resume_from` were trained on.
    """
    reference = _reference(config, resume_from)
    if resume_from is None:
        return AdapterBase(reference, _fill_if_same(model, reference, config, None))
    expected = str(stored_base_weights(resume_from))
    digest = _fill_if_same(model, reference, config, expected)
    # What the run found at first has changed; this may be a copy of what it was. All workers come to the same decision.
    if digest != expected and config.init_from is not None:
        reference = config.init_from
        digest = _fill_if_same(model, reference, config, expected)
    if digest != expected:
        raise ValueError(
            f"the weights of {printable(reference)} (hash {digest[:12]}) are not those that the run began with "
            f"({expected[:12]}); give those back, or name a copy of them with --init_from"
        )
    return AdapterBase(reference, digest)


def _fill_if_same(model: Llama, reference: str, config: TrainConfig, expected: str | None) -> str:
    """Return the hash of the weights of `reference`; fill `model` if that is the `expected` one, or none is."""
    with ExitStack() as stack:
        stored = open_pretrained(reference, stack)
        own = tensor_digests(stored, list(stored.tensors)[rank() :: world_size()])
        shares = HostGroup(config.collective_timeout_s).gather(own)
        digest = combined_digest({name: value for share in shares for name, value in share.items()})
        if expected in (None, digest):
            frozen = ((hf_name(name), p) for name, p in plain_parameters(model) if not p.requires_grad)
            fill(frozen, stored)
    return digest


def _reference(config: TrainConfig, resume_from: Path | None) -> str:
    """Return where to read the frozen weights: where the run found them at first, whatever an alias means now.

    Where there is nothing any more, `init_from` counts.
    """
    if resume_from is None:
        return str(config.init_from)
    recorded = base_of(resume_from)
    try:
        resolve(recorded, weights=False)
    except ValueError:
        if config.init_from is None:
            raise
        return config.init_from
    return recorded
