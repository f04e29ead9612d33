"""Write GGUF; `llama_ray.storage.gguf` reads it."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from llama_ray.storage.atomic import replacing
from llama_ray.storage.gguf import ARRAY, MAGIC, NUMBERS, STRING, Value
from llama_ray.utils.integers import ceil_div

_VERSION = 3
_ALIGNMENT = 32
"""What readers take where `general.alignment` is missing."""
_TYPES = {dtype: number for number, dtype in NUMBERS.items()}


@dataclass(frozen=True)
class NewTensor:
    """A tensor to be written: `content` gives its `size` bytes, part by part, once they are wanted.

    `shape` has rows before columns, and `type` is the number of ggml's type.
    """

    shape: tuple[int, ...]
    type: int
    size: int
    content: Callable[[], Iterable[bytes | memoryview]]


def write_gguf(file: Path, metadata: Mapping[str, Value], tensors: Mapping[str, NewTensor]) -> None:
    """Replace `file` by one with `metadata` and `tensors`, in their order, once it is complete.

    Whole numbers are written as uint32 or, where they are larger, as uint64, others as float32. Raises OSError.
    """
    head = b"".join([*_start(metadata, tensors), *_places(tensors)])
    with replacing(file) as stream:
        stream.write(head)
        _pad(stream, len(head))
        for name, tensor in tensors.items():
            written = sum(stream.write(part) for part in tensor.content())
            if written != tensor.size:
                raise AssertionError(f"{name} has {written} bytes; it must have {tensor.size}")
            _pad(stream, written)


def file_size(metadata: Mapping[str, Value], tensors: Mapping[str, NewTensor]) -> int:
    """Return how many bytes `write_gguf` will write."""
    head = sum(map(len, [*_start(metadata, tensors), *_places(tensors)]))
    return _padded(head) + sum(_padded(tensor.size) for tensor in tensors.values())


def _start(metadata: Mapping[str, Value], tensors: Mapping[str, NewTensor]) -> Iterable[bytes]:
    yield MAGIC + struct.pack("<IQQ", _VERSION, len(tensors), len(metadata))
    for key, value in metadata.items():
        yield _text(key) + _value(value)


def _places(tensors: Mapping[str, NewTensor]) -> Iterable[bytes]:
    offset = 0
    for name, tensor in tensors.items():
        shape = tensor.shape[::-1]
        yield _text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, tensor.type, offset)
        offset += _padded(tensor.size)


def _value(value: Value) -> bytes:
    """Return a value behind the number of its type."""
    if isinstance(value, str):
        return struct.pack("<I", STRING) + _text(value)
    if isinstance(value, list):
        return struct.pack("<IIQ", ARRAY, STRING, len(value)) + b"".join(map(_text, value))
    if isinstance(value, np.ndarray):
        return struct.pack("<IIQ", ARRAY, _TYPES[value.dtype], value.size) + value.tobytes()
    scalar = _scalar(value)
    return struct.pack("<I", _TYPES[scalar.dtype]) + scalar.tobytes()


def _scalar(value: int | float | bool) -> NDArray[np.generic]:
    if isinstance(value, bool):
        return np.asarray(value, "?")
    if isinstance(value, float):
        return np.asarray(value, "<f4")
    return np.asarray(value, "<u4" if value < 2**32 else "<u8")


def _text(text: str) -> bytes:
    content = text.encode()
    return struct.pack("<Q", len(content)) + content


def _padded(size: int) -> int:
    return ceil_div(size, _ALIGNMENT) * _ALIGNMENT


def _pad(stream: BinaryIO, size: int) -> None:
    stream.write(bytes(_padded(size) - size))
