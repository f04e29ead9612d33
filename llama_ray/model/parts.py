"""Weights on their way from one file to another: a part at a time, so that no whole tensor is in memory."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from llama_ray.model.stored_model import UnreadTensor
from llama_ray.model.weight_files import CheckpointError

_VALUES = 2**18
"""Weights in a part."""


def parts(name: str, tensor: UnreadTensor, dtype: torch.dtype, multiple: int = 1) -> Iterator[Tensor]:
    """Yield `tensor`, called `name` in messages, in `dtype`: some of its rows at a time, in their order.

    Each part but the last has a multiple of `multiple` rows. Raises CheckpointError for a weight that is finite and
    beyond the range of `dtype`.
    """
    row = math.prod(tensor.shape[1:])
    step = max(1, _VALUES // (row * multiple)) * multiple
    for start in range(0, tensor.shape[0], step):
        stop = min(start + step, tensor.shape[0])
        yield cast(name, tensor.read((slice(start, stop), *(slice(None),) * (len(tensor.shape) - 1))), dtype)


def cast(name: str, values: Tensor, dtype: torch.dtype) -> Tensor:
    """Return `values` in `dtype`. Raises CheckpointError for one that is finite and beyond its range."""
    new = values.to(dtype)
    if dtype == torch.float16 and values.dtype != dtype and (beyond := new.isinf() & values.isfinite()).any():
        raise CheckpointError(
            f"{name} has the weight {values[beyond][0].item():.3g}; float16 ends at 65504; take bfloat16 or float32"
        )
    return new


def as_bytes(values: Tensor) -> memoryview:
    """Return the bytes of a tensor in host memory."""
    return values.contiguous().view(torch.uint8).numpy().data.cast("B")
