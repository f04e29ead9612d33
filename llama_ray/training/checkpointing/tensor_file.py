"""Safetensors files written from a stream of bytes, so that the tensors need not be in memory together.

A file is the length of the header (8 bytes, little-endian), the header as JSON, and the tensors' bytes without gaps
(https://github.com/huggingface/safetensors#format). Its metadata is that of torch.distributed.checkpoint's safetensors
storage, which reads shards of tensors from it. safetensors' own writer needs all tensors of a file at once.
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
# Of the first tensor, in bytes; the others are aligned because wider types come first.
_ALIGNMENT = 8


@dataclass(frozen=True)
class TensorShard:
    """The rectangular part of a tensor that one worker holds; all of it where the tensor is not sharded."""

    tensor: Tensor
    offsets: tuple[int, ...]
    """Where it starts in each dimension of the full tensor."""
    is_whole: bool


def in_file_order(shards: dict[str, TensorShard]) -> dict[str, TensorShard]:
    """Sort `shards` as a file holds them: wider types first, so that each is aligned; then by name."""
    return dict(sorted(shards.items(), key=lambda item: (-item[1].tensor.itemsize, item[0])))


def write_tensors(path: Path, shards: dict[str, TensorShard], content: Iterable[memoryview]) -> str:
    """Write a header for `shards`, which are in file order, then `content`, their bytes; the tensors are not read.

    Returns the file's SHA-256. Raises OSError, also if `content` is not as long as the shards.
    """
    header, length = _header(shards)
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


def _header(shards: dict[str, TensorShard]) -> tuple[bytes, int]:
    """Return (the bytes that precede the tensors, the number of bytes of the tensors)."""
    offsets = {name: {"saved_offsets": list(shard.offsets)} for name, shard in shards.items()}
    header: dict[str, Any] = {
        "__metadata__": {"format": "pt", "DCP_VERSION": "1.0", SHARDING_INFO: json.dumps(offsets)}
    }
    end = 0
    for name, shard in shards.items():
        start, end = end, end + shard.tensor.nbytes
        shape, dtype = list(shard.tensor.shape), _DTYPES[shard.tensor.dtype]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    content = json.dumps(header, separators=(",", ":")).encode()
    content += b" " * (-len(content) % _ALIGNMENT)
    return len(content).to_bytes(8, "little") + content, end
