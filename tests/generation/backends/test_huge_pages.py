from __future__ import annotations

import itertools
import mmap
from pathlib import Path

import psutil
import pytest
import torch

from llama_ray.generation.backends.huge_pages import Arena


def test_tensors_are_aligned_zeros_that_do_not_overlap() -> None:
    arena = Arena()
    shapes = [
        ((3, 5), torch.float32),
        ((7,), torch.bfloat16),
        ((0,), torch.float32),
        ((2, 2, 9), torch.uint8),
    ]
    tensors = [arena.zeros(shape, dtype) for shape, dtype in shapes]
    for i, (tensor, (shape, dtype)) in enumerate(zip(tensors, shapes, strict=True)):
        assert (tensor.shape, tensor.dtype, tensor.data_ptr() % 64) == (shape, dtype, 0)
        assert not tensor.any()
        tensor.fill_(i + 1)
    for i, tensor in enumerate(tensors):
        assert (tensor == i + 1).all()
    whole = torch.arange(12.0).view(3, 4).t()
    assert arena.copy(whole).equal(whole)


def test_a_tensor_may_be_larger_than_a_chunk() -> None:
    arena = Arena()
    small, large = arena.zeros((9,), torch.float32), arena.zeros((40 * 2**20,), torch.float32)
    assert large[-1] == small[0] == 0


def test_memory_is_taken_when_written_and_freed_with_the_last_tensor() -> None:
    process, size = psutil.Process(), 2**28
    before = process.memory_info().rss
    tensor = Arena().zeros((size,), torch.uint8)
    assert process.memory_info().rss - before < size // 8
    tensor[: size // 2].fill_(1)
    assert process.memory_info().rss - before > size // 4
    del tensor
    assert process.memory_info().rss - before < size // 8


@pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="this system has no huge pages")
def test_huge_pages_are_requested() -> None:
    tensor = Arena().zeros((2**23,), torch.uint8)
    tensor.fill_(1)
    start = tensor.data_ptr()
    assert start % 2**21 == 0
    text = Path("/proc/self/smaps").read_text()
    areas = text.split("VmFlags:")
    flags = None
    for area, following in itertools.pairwise(areas):
        for line in area.splitlines():
            bounds = line.split(" ")[0].split("-")
            if len(bounds) == 2 and int(bounds[0], 16) <= start < int(bounds[1], 16):
                flags = following.splitlines()[0].split()
    assert flags is not None
    assert "hg" in flags
