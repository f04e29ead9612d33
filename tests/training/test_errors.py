import pytest
import torch

from llama_ray.training.errors import OutOfMemory, Skips, out_of_memory_at


def test_memory_that_is_not_there_is_named_with_its_step() -> None:
    expected = pytest.raises(OutOfMemory, match="out of memory at step 7: ")
    with expected as caught, out_of_memory_at(7):
        torch.empty(2**60, dtype=torch.uint8)
    assert caught.value.step == 7


def test_other_errors_stay_what_they_are() -> None:
    with pytest.raises(RuntimeError, match="shape") as caught, out_of_memory_at(7):
        torch.zeros(2, 3) @ torch.zeros(2, 3)
    assert not isinstance(caught.value, OutOfMemory)


def test_skipped_steps_are_counted_in_all_and_in_a_row() -> None:
    skips = Skips(5, torch.device("cpu"))
    for skipped in (True, True, True, False, True):
        skips.count(torch.tensor(skipped))
    assert skips.read() == (9, 3)
    skips.count(torch.tensor(True))
    assert skips.read() == (10, 2)
    skips.count(torch.tensor(False))
    assert skips.read() == (10, 2)  # the row had not ended when it was last looked at
    assert skips.read() == (10, 0)
