"""Tensors in safetensors files, whole or in pieces that several workers wrote.

The pieces are those of torch.distributed.checkpoint's safetensors storage: a file's metadata names the place of each
piece, so that `dcp.load` reshards them onto any mesh. Here they are put together one tensor at a time in one process,
without a process group.
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

PIECES = "DCP_SHARDING_INFO"


class StoredTensor:
    """One tensor, opened but not read."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._pieces: list[tuple[Any, tuple[int, ...]]] = []

    def add(self, file: Any, offsets: tuple[int, ...] | None) -> None:
        """A piece of it lies in the open `file`, at `offsets`; None where that is all of it."""
        shape = file.get_slice(self._name).get_shape()
        self._pieces.append((file, offsets or (0,) * len(shape)))

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the whole tensor, as far as its pieces reach."""
        ends = [
            [o + n for o, n in zip(offsets, file.get_slice(self._name).get_shape(), strict=True)]
            for file, offsets in self._pieces
        ]
        return tuple(map(max, zip(*ends, strict=True)))

    @property
    def dtype(self) -> torch.dtype:
        """As stored."""
        file, offsets = self._pieces[0]
        return file.get_slice(self._name)[tuple(slice(0, 1) for _ in offsets)].dtype  # type: ignore[no-any-return]

    @property
    def complete(self) -> bool:
        """Whether no piece is missing."""
        held = sum(math.prod(file.get_slice(self._name).get_shape()) for file, _ in self._pieces)
        return bool(held == math.prod(self.shape))

    def read(self, part: tuple[slice, ...] | None = None) -> Tensor:
        """The whole tensor, or a part of it; nothing else is copied from the files."""
        if len(self._pieces) == 1:
            file = self._pieces[0][0]
            return file.get_tensor(self._name) if part is None else file.get_slice(self._name)[part]  # type: ignore[no-any-return]
        shape = self.shape
        wanted = [s.indices(n)[:2] for s, n in zip(part or (slice(None),) * len(shape), shape, strict=True)]
        out = torch.empty([end - start for start, end in wanted], dtype=self.dtype)
        for file, offsets in self._pieces:
            piece = file.get_slice(self._name)
            held = [(o, o + n) for o, n in zip(offsets, piece.get_shape(), strict=True)]
            common = [(max(a, c), min(b, d)) for (a, b), (c, d) in zip(wanted, held, strict=True)]
            if all(start < end for start, end in common):
                out[_box(common, wanted)] = piece[_box(common, held)]
        return out


def _box(spans: list[tuple[int, int]], within: list[tuple[int, int]] | None = None) -> tuple[slice, ...]:
    """Spans of each dimension as slices, counted from where those of `within` start."""
    starts = [0] * len(spans) if within is None else [start for start, _ in within]
    return tuple(slice(a - start, b - start) for (a, b), start in zip(spans, starts, strict=True))


def open_tensors(path: Path, stack: ExitStack, stored: dict[str, StoredTensor]) -> None:
    """Add the tensors of a file, which stays open as long as `stack`. Raises SafetensorError or OSError."""
    file = stack.enter_context(safe_open(path, framework="pt"))
    places = json.loads((file.metadata() or {}).get(PIECES, "{}"))
    for name in file.keys():  # noqa: SIM118  (not a mapping)
        offsets = tuple(places[name]["saved_offsets"]) if name in places else None
        stored.setdefault(name, StoredTensor(name)).add(file, offsets)
