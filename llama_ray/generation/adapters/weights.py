"""The weights of one adapter in host memory, held against the shape of the base model."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from llama_ray.model.adapter_files import open_adapter
from llama_ray.model.config import LlamaConfig
from llama_ray.model.lora_config import linear_sizes

Place = tuple[int, str]
"""A product of the model: the number of its block and one of `lora.TARGETS`."""


@dataclass(frozen=True)
class LowRank:
    """What an adapter adds to a product x @ W.T: scale * (x @ a.T) @ b.T (Hu et al. 2021, arXiv:2106.09685)."""

    a: Tensor
    """[rank, in]"""
    b: Tensor
    """[out, rank]"""
    scale: float

    @property
    def rank(self) -> int:
        """The rank of the addition."""
        return len(self.a)


@dataclass(frozen=True)
class AdapterWeights:
    """An adapter for a model of a given shape."""

    factors: Mapping[Place, LowRank]
    base_weights: str | None = None
    """The `weights_hash` of the base model; None if it is not known."""

    @classmethod
    def read(cls, directory: Path) -> Self:
        """Read an adapter in PEFT's layout. Raises CheckpointError for one that cannot be read."""
        with ExitStack() as stack:
            stored = open_adapter(directory, stack)
            factors = {
                _place(name): LowRank(a.read(_whole(a.shape)), b.read(_whole(b.shape)), stored.config.scale)
                for name, (a, b) in stored.factors.items()
            }
        return cls(factors, stored.base_weights)

    @property
    def rank(self) -> int:
        """The largest rank of any product."""
        return max((factor.rank for factor in self.factors.values()), default=0)

    @cached_property
    def digest(self) -> bytes:
        """Identifies what the adapter computes, 16 bytes: equal for equal weights, whatever their name or file."""
        digest = hashlib.blake2b(digest_size=16)
        for layer, target in sorted(self.factors):
            factor = self.factors[layer, target]
            digest.update(f"{layer} {target} {factor.scale!r}".encode())
            for tensor in (factor.a, factor.b):
                digest.update(f" {tensor.dtype} {list(tensor.shape)} ".encode())
                digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
        return digest.digest()

    def check(self, config: LlamaConfig, max_rank: int) -> None:
        """Raise ValueError unless the adapter fits a model of this shape, and its ranks are at most `max_rank`."""
        sizes = linear_sizes(config)
        for (layer, target), factor in self.factors.items():
            inputs, outputs = sizes[target]
            expected = ([factor.rank, inputs], [outputs, factor.rank])
            found = (list(factor.a.shape), list(factor.b.shape))
            if layer >= config.num_layers or found != expected:
                raise ValueError(
                    f"layer {layer}'s {target} has factors {found[0]} and {found[1]}; the base model has "
                    f"{config.num_layers} layers, and takes [rank, {inputs}] and [{outputs}, rank] there; give an "
                    "adapter of this base model"
                )
        if self.rank > max_rank:
            raise ValueError(
                f"its rank is {self.rank}; it must be at most max_lora_rank, {max_rank}; raise max_lora_rank"
            )


def _place(name: str) -> Place:
    """Return the place of a weight, which has a name such as `model.layers.3.self_attn.q_proj.weight`."""
    parts = name.split(".")
    return int(parts[-4]), parts[-2]


def _whole(shape: tuple[int, ...]) -> tuple[slice, ...]:
    return tuple(slice(0, size) for size in shape)
