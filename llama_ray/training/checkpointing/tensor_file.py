"""Safetensors files written from a stream of bytes, for which nobody need hold the tensors.

A file is the length of the header (8 bytes, little-endian), the header as JSON, and the tensors' bytes without gaps
(https://github.com/huggingface/safetensors#format). Its metadata is that of torch.distributed.checkpoint's safetensors
storage, which reads pieces of tensors from it. safetensors' own writer takes all tensors of a file at once.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llama_ray.model.sharded_safetensors import SHARDING_INFO

_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_ALIGNMENT = 8  # of the first tensor; the others follow because wider types come first


@dataclass(frozen=True)
class Piece:
    """A worker's piece of a tensor, and where it lies in the whole one."""

    tensor: Tensor
    offsets: tuple[int, ...]
    whole: bool


def in_file_order(pieces: dict[str, Piece]) -> dict[str, Piece]:
    """The order in which a file holds them: wider types first, so that each is aligned; then by name."""
    return dict(sorted(pieces.items(), key=lambda item: (-item[1].tensor.itemsize, item[0])))


def write_tensors(path: Path, pieces: dict[str, Piece], content: Iterable[memoryview]) -> str:
    """Write a header for `pieces`, which are in file order, and `content`, their bytes; the tensors are not read.

    Returns the file's SHA-256. Raises OSError, also for content that is not as long as the pieces.
    """
    header, length = _header(pieces)
    digest = hashlib.sha256()
    with path.open("wb") as file:
        file.write(header)
        digest.update(header)
        for chunk in content:
            file.write(chunk)
            digest.update(chunk)
        if file.tell() != len(header) + length:
            raise OSError(f"{path.name} got {file.tell() - len(header)} bytes of tensors instead of {length}")
    return digest.hexdigest()


def _header(pieces: dict[str, Piece]) -> tuple[bytes, int]:
    """What precedes the tensors' bytes, and how many these are."""
    places = {name: {"saved_offsets": list(piece.offsets)} for name, piece in pieces.items()}
    header: dict[str, Any] = {
        "__metadata__": {"format": "pt", "DCP_VERSION": "1.0", SHARDING_INFO: json.dumps(places)}
    }
    end = 0
    for name, piece in pieces.items():
        start, end = end, end + piece.tensor.nbytes
        shape, dtype = list(piece.tensor.shape), _DTYPES[piece.tensor.dtype]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    content = json.dumps(header, separators=(",", ":")).encode()
    content += b" " * (-len(content) % _ALIGNMENT)
    return len(content).to_bytes(8, "little") + content, end
