"""GGUF, the file format of llama.cpp: metadata, and where the bytes of each tensor are.

https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from llama_ray.utils.errors import UserError, printable
from llama_ray.utils.integers import ceil_div

MAGIC = b"GGUF"

_VERSIONS = (2, 3)
STRING, ARRAY = 8, 9
"""The numbers of the types of values that are no numbers."""
NUMBERS = {
    number: np.dtype(name)
    for number, name in zip(
        (0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12),
        ("<u1", "<i1", "<u2", "<i2", "<u4", "<i4", "<f4", "?", "<u8", "<i8", "<f8"),
        strict=True,
    )
}
_MAX_DIMENSIONS = 4
_ALIGNMENT = "general.alignment"

Value = str | int | float | bool | list[str] | NDArray[np.generic]
T = TypeVar("T")


class GgufError(UserError):
    """A file that is no whole GGUF file of a version that can be read, or lacks what is asked for."""


@dataclass(frozen=True)
class Tensor:
    """Where a tensor is.

    `shape` has rows before columns; the file has it the other way round. `type` is the number of ggml's type, and
    `offset` is that of the first byte in the file.
    """

    shape: tuple[int, ...]
    type: int
    offset: int

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Gguf:
    """What stands before the tensors of a file: metadata, and the tensors' places by their names."""

    file: Path
    metadata: Mapping[str, Value]
    tensors: Mapping[str, Tensor]

    def get(self, key: str, kind: type[T], default: T | None = None) -> T:
        """Return metadata of a type; raises GgufError where it is of another, or missing without a `default`."""
        value = self.metadata.get(key, default)
        if value is None:
            raise GgufError(f"{printable(str(self.file))} has no {key}; convert the model again")
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise GgufError(
                f"{printable(str(self.file))}: {key} is a {type(value).__name__}; it must be a {kind.__name__}"
            )
        return value


def read_gguf(file: Path) -> Gguf:
    """Return the header of `file`, whose tensors are not read.

    Raises GgufError for another or a damaged file, and OSError where it cannot be opened.
    """
    with file.open("rb") as opened:
        if opened.read(4) != MAGIC:
            raise GgufError(f"{printable(str(file))} is no GGUF file; give one")
        with mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as content:
            try:
                return _header(file, _Reader(content))
            except (_EndOfFile, UnicodeDecodeError) as error:
                raise GgufError(f"{printable(str(file))} is damaged ({error}); copy it again") from error


class _EndOfFile(Exception):
    """A count or a length reaches beyond the end of the file."""

    def __init__(self) -> None:
        super().__init__("it ends too soon")


class _Reader:
    """Reads one value after the other."""

    def __init__(self, content: mmap.mmap) -> None:
        self._content, self.position = content, len(MAGIC)

    @property
    def size(self) -> int:
        return len(self._content)

    def take(self, size: int) -> bytes:
        """Return the next `size` bytes."""
        end = self.position + size
        if end > self.size:
            raise _EndOfFile
        start, self.position = self.position, end
        return self._content[start:end]

    def uint32(self) -> int:
        return int(struct.unpack("<I", self.take(4))[0])

    def uint64(self) -> int:
        return int(struct.unpack("<Q", self.take(8))[0])

    def text(self) -> str:
        return self.take(self.uint64()).decode()

    def value(self) -> Value:
        """Return a value of the type whose number stands before it."""
        kind = self.uint32()
        if kind != ARRAY:
            return self._scalar(kind)
        kind, count = self.uint32(), self.uint64()
        if kind == STRING:
            return [self.text() for _ in range(count)]
        dtype = self._number(kind)
        return np.frombuffer(self.take(count * dtype.itemsize), dtype)

    def _scalar(self, kind: int) -> Value:
        if kind == STRING:
            return self.text()
        dtype = self._number(kind)
        value: bool | int | float = np.frombuffer(self.take(dtype.itemsize), dtype)[0].item()
        return value

    def _number(self, kind: int) -> np.dtype[np.generic]:
        if kind not in NUMBERS:
            raise GgufError(f"it holds a value of the unknown type {kind}; copy it again")
        return NUMBERS[kind]


def _header(file: Path, reader: _Reader) -> Gguf:
    version = reader.uint32()
    if version not in _VERSIONS:
        # A file for machines with the other byte order has its version there, too.
        raise GgufError(
            f"{printable(str(file))} has version {version} of GGUF; it must be 2 or 3; convert the model again"
        )
    num_tensors, num_values = reader.uint64(), reader.uint64()
    metadata = {reader.text(): reader.value() for _ in range(num_values)}
    found = [_tensor(reader) for _ in range(num_tensors)]
    header = Gguf(file, metadata, {})
    alignment = header.get(_ALIGNMENT, int, 32)
    if alignment < 1 or alignment & (alignment - 1):
        raise GgufError(
            f"{printable(str(file))}: {_ALIGNMENT} is {alignment}; it must be a power of 2; copy it again"
        )
    start = ceil_div(reader.position, alignment) * alignment
    tensors = {name: Tensor(shape, type, start + offset) for name, shape, type, offset in found}
    if any(tensor.size and tensor.offset >= reader.size for tensor in tensors.values()):
        raise _EndOfFile
    return Gguf(file, metadata, tensors)


def _tensor(reader: _Reader) -> tuple[str, tuple[int, ...], int, int]:
    name, dimensions = reader.text(), reader.uint32()
    if dimensions > _MAX_DIMENSIONS:
        raise GgufError(f"its tensor {name!r:.60} has {dimensions} dimensions; copy the file again")
    shape = tuple(reader.uint64() for _ in range(dimensions))[::-1]
    return name, shape, reader.uint32(), reader.uint64()
