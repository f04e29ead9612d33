from __future__ import annotations

import pytest
import torch

from llama_ray.training.planning.memory_trace import MemoryTrace

KIB = 1024


def kib(count: int) -> torch.Tensor:
    return torch.zeros(count * KIB, dtype=torch.uint8)


def test_tensors_count_until_they_are_freed() -> None:
    with MemoryTrace() as trace:
        first, second = kib(1), kib(2)
        del first, second
        third = kib(2)
    assert third.numel() == 2 * KIB
    assert trace.peak["activations"] == 3 * KIB
    assert sum(trace.peak.values()) == 3 * KIB


def test_each_part_has_its_own_peak() -> None:
    with MemoryTrace() as trace:
        kept = kib(1)
        trace.begin("large")
        kib(5)
        trace.begin("small")
        kib(2)
    assert kept.numel() == KIB
    assert {part: peak["activations"] for part, peak in trace.peaks.items()} == {
        "": KIB,
        "large": 6 * KIB,
        "small": 3 * KIB,
    }


def test_parameters_gradients_and_optimizer_state_are_told_apart() -> None:
    layer = torch.nn.Linear(16, 16, bias=False)
    optimizer = torch.optim.AdamW(layer.parameters(), fused=True)
    with MemoryTrace() as trace:
        trace.watch(layer, optimizer)
        layer(torch.ones(1, 16)).sum().backward()
        optimizer.step()
        trace.begin("after the step")
    matrix = 4 * 16 * 16
    held = trace.peaks["after the step"]
    # The optimizer keeps two averages and the count of steps.
    assert (held["parameters"], held["gradients"], held["optimizer"]) == (matrix, matrix, 2 * matrix + 4)


def test_a_storage_that_is_resized_counts_with_its_new_size() -> None:
    with MemoryTrace() as trace:
        tensor = kib(1)
        trace.begin("refilled")
        tensor.untyped_storage().resize_(4 * KIB)
        tensor.untyped_storage().resize_(0)
        trace.begin("freed")
    assert {part: peak["activations"] for part, peak in trace.peaks.items()} == {
        "": KIB,
        "refilled": 4 * KIB,
        "freed": 0,
    }


def test_after_a_trace_storages_are_resized_by_torch_again_even_after_an_error() -> None:
    resize = torch.UntypedStorage.resize_
    with pytest.raises(ZeroDivisionError), MemoryTrace():
        1 / 0  # noqa: B018
    assert torch.UntypedStorage.resize_ is resize
