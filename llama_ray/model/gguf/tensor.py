"""A weight in an open GGUF file, of which any part can be read."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llama_ray.model.gguf.blocks import FORMATS
from llama_ray.model.gguf.names import in_halves
from llama_ray.storage import gguf
from llama_ray.utils.integers import ceil_div

_VALUES_AT_ONCE = 2**18
"""Weights decoded together: what they need of memory while they are is several times their size."""


class MappedFile:
    """The bytes of a file, mapped until `stack` closes it."""

    def __init__(self, file: Path, stack: ExitStack) -> None:
        self._content: NDArray[np.uint8] | None = np.memmap(file, np.uint8, mode="r")
        stack.callback(self._close)

    @property
    def content(self) -> NDArray[np.uint8]:
        """All bytes, not read yet."""
        if self._content is None:
            raise ValueError("the file is closed; read tensors before")
        return self._content

    def _close(self) -> None:
        # The mapping goes with the last array on it.
        self._content = None


class GgufTensor:
    """A weight, not read yet. `heads` is given for queries and keys, whose rows get the order of Hugging Face."""

    def __init__(self, file: MappedFile, place: gguf.Tensor, heads: int | None = None) -> None:
        self._file, self._place = file, place
        self._format = FORMATS[place.type]
        self._rows = None if heads is None else in_halves(torch.arange(place.shape[0]), heads).numpy()

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the whole tensor."""
        return self._place.shape

    @property
    def dtype(self) -> torch.dtype:
        """Dtype that `read` returns: that of the file or, for quantized weights, float32."""
        return self._format.dtype

    def read(self, region: tuple[slice, ...] | None = None) -> Tensor:
        """Return `region` of the tensor, by default all of it; of a row, whole blocks are read."""
        region = region or tuple(slice(None) for _ in self.shape)
        spans = [range(*part.indices(size)) for part, size in zip(region, self.shape, strict=True)]
        out = torch.empty([len(span) for span in spans], dtype=self.dtype)
        if out.numel() == 0:
            return out
        columns = spans[-1]
        rows = np.arange(1) if len(spans) == 1 else np.asarray(spans[0])
        if self._rows is not None:
            rows = self._rows[rows]
        table = out.view(len(rows), len(columns))
        step = max(1, _VALUES_AT_ONCE // len(columns))
        for start in range(0, len(rows), step):
            table[start : start + step] = self._read(rows[start : start + step], columns)
        return out

    def _read(self, rows: NDArray[np.int64], columns: range) -> Tensor:
        """Return the weights [rows, columns] of rows as the file has them."""
        kind = self._format
        row_bytes = self.shape[-1] // kind.values * kind.size
        end = self._place.offset + self._place.size // kind.values * kind.size
        table = self._file.content[self._place.offset : end].reshape(-1, row_bytes)
        first, last = columns.start // kind.values, ceil_div(columns.stop, kind.values)
        blocks = np.ascontiguousarray(table[rows, first * kind.size : last * kind.size])
        weights = kind.decode(torch.from_numpy(blocks).view(-1, kind.size)).view(len(rows), -1)
        start = columns.start - first * kind.values
        return weights[:, start : start + len(columns)]
