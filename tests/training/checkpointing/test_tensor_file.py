"""Files that safetensors reads as if its own writer had made them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from llama_ray.model.sharded_safetensors import SHARDING_INFO
from llama_ray.training.checkpointing.tensor_file import TensorShard, in_file_order, write_tensors

TENSORS = {
    "odd": torch.arange(7, dtype=torch.uint8),
    "matrix": torch.randn(5, 3),
    "half": torch.randn(3, 3).bfloat16(),
    "long": torch.arange(4),
    "scalar": torch.ones(1),
}


def content(tensors: Iterator[Tensor]) -> Iterator[memoryview]:
    for tensor in tensors:
        yield tensor.view(-1).view(torch.uint8).numpy().data


def write(path: Path) -> tuple[dict[str, TensorShard], str]:
    shards = in_file_order({name: TensorShard(t, (3,) * t.dim(), False) for name, t in TENSORS.items()})
    return shards, write_tensors(path, shards, content(s.tensor for s in shards.values()))


def test_safetensors_reads_what_was_written(tmp_path: Path) -> None:
    _, digest = write(tmp_path / "file.safetensors")
    loaded = load_file(tmp_path / "file.safetensors")
    assert loaded.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor)
    assert digest == hashlib.sha256((tmp_path / "file.safetensors").read_bytes()).hexdigest()
    with safe_open(tmp_path / "file.safetensors", "pt") as file:
        assert file.metadata()["format"] == "pt"
        assert json.loads(file.metadata()[SHARDING_INFO])["matrix"] == {"saved_offsets": [3, 3]}


def test_each_tensor_is_aligned_to_its_type(tmp_path: Path) -> None:
    write(tmp_path / "file.safetensors")
    raw = (tmp_path / "file.safetensors").read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    for name, tensor in TENSORS.items():
        assert (8 + length + header[name]["data_offsets"][0]) % tensor.itemsize == 0


def test_content_of_another_length_is_no_file(tmp_path: Path) -> None:
    shards = {"a": TensorShard(torch.ones(4), (0,), True)}
    with pytest.raises(OSError, match=r"x.safetensors got 12 bytes of tensors instead of 16"):
        write_tensors(tmp_path / "x.safetensors", shards, content(iter([torch.ones(3)])))
