"""Tensors in safetensors files, each stored whole or as slices that several workers wrote.

The files are those of torch.distributed.checkpoint's safetensors storage: their metadata records the offsets of each
slice, so `dcp.load` can reshard them onto any mesh. Here one process assembles them, one tensor at a time, without a
process group.
"""

from __future__ import annotations

import json
import math
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

SHARDING_INFO = "DCP_SHARDING_INFO"
"""Key of a file's metadata: JSON, the name of each tensor -> {"saved_offsets": offsets of the file's slice of it}."""


class StoredTensor:
    """A tensor in open files, not read yet."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._slices: list[tuple[Any, tuple[int, ...]]] = []
        self.is_slice = False

    def add(self, file: Any, offsets: tuple[int, ...] | None) -> None:
        """Add the slice that the open `file` holds; `offsets` is its first index, None where it is the whole tensor."""
        shape = file.get_slice(self._name).get_shape()
        self._slices.append((file, offsets or (0,) * len(shape)))
        self.is_slice = offsets is not None

    def extend(self, other: StoredTensor) -> None:
        """Add the slices of `other`, which is of the same name."""
        self._slices += other._slices

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the whole tensor, as far as the slices added so far reach."""
        ends = [
            [offset + size for offset, size in zip(offsets, self._shape_in(file), strict=True)]
            for file, offsets in self._slices
        ]
        return tuple(map(max, zip(*ends, strict=True)))

    @property
    def dtype(self) -> torch.dtype:
        """Dtype in the file."""
        file, offsets = self._slices[0]
        return file.get_slice(self._name)[tuple(slice(0, 1) for _ in offsets)].dtype  # type: ignore[no-any-return]

    @property
    def kind(self) -> str:
        """Dtype in the first of its files, as safetensors names it, such as "BF16"."""
        return str(self._slices[0][0].get_slice(self._name).get_dtype())

    @property
    def complete(self) -> bool:
        """Whether the slices cover the whole tensor."""
        return sum(math.prod(self._shape_in(file)) for file, _ in self._slices) == math.prod(self.shape)

    def read(self, region: tuple[slice, ...] | None = None) -> Tensor:
        """Return `region` of the tensor, by default all of it; nothing else is read from the files."""
        if len(self._slices) == 1:
            file = self._slices[0][0]
            return file.get_tensor(self._name) if region is None else file.get_slice(self._name)[region]  # type: ignore[no-any-return]
        shape = self.shape
        wanted = [s.indices(n)[:2] for s, n in zip(region or (slice(None),) * len(shape), shape, strict=True)]
        out = torch.empty([end - start for start, end in wanted], dtype=self.dtype)
        for file, offsets in self._slices:
            held = [(o, o + n) for o, n in zip(offsets, self._shape_in(file), strict=True)]
            common = [(max(a, c), min(b, d)) for (a, b), (c, d) in zip(wanted, held, strict=True)]
            if all(start < end for start, end in common):
                out[_relative(common, wanted)] = file.get_slice(self._name)[_relative(common, held)]
        return out

    def _shape_in(self, file: Any) -> tuple[int, ...]:
        return tuple(file.get_slice(self._name).get_shape())


def _relative(spans: list[tuple[int, int]], base: list[tuple[int, int]]) -> tuple[slice, ...]:
    """The (start, end) of each dimension as slices relative to the starts of `base`."""
    return tuple(slice(a - start, b - start) for (a, b), (start, _) in zip(spans, base, strict=True))


def open_tensors(path: Path, stack: ExitStack) -> dict[str, StoredTensor]:
    """Return the tensors of the file `path` by name; `stack` closes it. Raises SafetensorError or OSError."""
    file = stack.enter_context(safe_open(path, framework="pt"))
    sharding = json.loads((file.metadata() or {}).get(SHARDING_INFO, "{}"))
    stored: dict[str, StoredTensor] = {}
    for name in file.keys():  # noqa: SIM118  (not a mapping)
        stored[name] = StoredTensor(name)
        stored[name].add(file, tuple(sharding[name]["saved_offsets"]) if name in sharding else None)
    return stored
