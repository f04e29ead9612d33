import pytest
import torch

from llama_ray.training.errors import OutOfMemory, out_of_memory_at


def test_exhausted_memory_is_reported_with_the_step() -> None:
    expected = pytest.raises(OutOfMemory, match="out of memory at step 7: ")
    with expected as caught, out_of_memory_at(7):
        torch.empty(2**60, dtype=torch.uint8)
    assert caught.value.step == 7


def test_other_errors_are_not_changed() -> None:
    with pytest.raises(RuntimeError, match="shape") as caught, out_of_memory_at(7):
        torch.zeros(2, 3) @ torch.zeros(2, 3)
    assert not isinstance(caught.value, OutOfMemory)
