"""The average of models, weight by weight (Izmailov et al. 2018, arXiv:1803.05407; Wortsman et al. 2022, 2203.05482).

Nothing is computed before it is read, so that an average is saved a part of a tensor at a time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llama_ray.model.stored_model import StoredModel, UnreadTensor
from llama_ray.model.weight_files import CheckpointError
from llama_ray.utils.errors import printable


def average(models: Sequence[StoredModel], names: Sequence[str], shares: Sequence[float]) -> StoredModel:
    """Return the sum of `models`, each times its share, computed in float32, in the dtype of the first.

    `names` are what they are called in messages. Raises CheckpointError for models of different shapes.
    """
    first = models[0]
    for model, name in zip(models[1:], names[1:], strict=True):
        ours, theirs = first.config.to_dict(), model.config.to_dict()
        for field, value in theirs.items():
            if value != ours[field]:
                raise CheckpointError(
                    f"{field} of {printable(name)} is {value}; it must be {ours[field]}, that of "
                    f"{printable(names[0])}; give models of one shape"
                )
    return StoredModel(
        first.config,
        {name: _Sum([model.tensors[name] for model in models], shares) for name in first.tensors},
    )


def shares_of(weights: Sequence[float] | None, count: int) -> list[float]:
    """Return the share of each of `count` models, with a sum of 1; by default all have the same.

    Raises ValueError unless `weights` are as many finite numbers, of which the sum is above 0.
    """
    if weights is None:
        return [1 / count] * count
    if len(weights) != count:
        raise ValueError(f"weights has {len(weights)} numbers; it must have {count}, one for each model")
    total = math.fsum(weights)
    if not all(map(math.isfinite, weights)) or total <= 0:
        raise ValueError(f"weights has the sum {total}; it must be above 0; give positive numbers")
    return [weight / total for weight in weights]


@dataclass(frozen=True)
class _Sum:
    """A tensor that is the weighted sum of others."""

    tensors: Sequence[UnreadTensor]
    shares: Sequence[float]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.tensors[0].shape

    @property
    def dtype(self) -> torch.dtype:
        return self.tensors[0].dtype

    def read(self, region: tuple[slice, ...] | None = None) -> Tensor:
        total = torch.zeros(())
        for tensor, share in zip(self.tensors, self.shares, strict=True):
            total = total + tensor.read(region).float() * share
        return total.to(self.dtype)
