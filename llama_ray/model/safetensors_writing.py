"""Write safetensors a part of a tensor at a time: https://github.com/huggingface/safetensors#format"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from pathlib import Path

import torch

from llama_ray.model.parts import as_bytes, parts
from llama_ray.model.stored_model import UnreadTensor

_NAMES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
_ALIGNMENT = 8


def write_safetensors(file: Path, tensors: Mapping[str, UnreadTensor], dtype: torch.dtype) -> None:
    """Write `tensors` in `dtype` to `file`, in their order. Raises CheckpointError as `parts` does, and OSError."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor_bytes(tensor, dtype)
        header[name] = {"dtype": _NAMES[dtype], "shape": tensor.shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    with file.open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        for name, tensor in tensors.items():
            for part in parts(name, tensor, dtype):
                stream.write(as_bytes(part))


def tensor_bytes(tensor: UnreadTensor, dtype: torch.dtype) -> int:
    """Return the bytes of `tensor` in `dtype`."""
    return math.prod(tensor.shape) * dtype.itemsize
