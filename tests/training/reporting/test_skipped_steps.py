import torch

from llama_ray.training.reporting.skipped_steps import SkippedSteps


def test_skipped_steps_are_counted_in_total_and_in_a_row() -> None:
    steps = SkippedSteps(5, 0, torch.device("cpu"))
    for skipped in (True, True, True, False, True):
        steps.count(torch.tensor(skipped))
    assert steps.read() == (9, 1, 3)


def test_a_row_that_had_not_ended_at_the_last_reading_counts_on() -> None:
    steps = SkippedSteps(0, 0, torch.device("cpu"))
    for skipped in (True, False, True):
        steps.count(torch.tensor(skipped))
    assert steps.read() == (2, 1, 1)
    steps.count(torch.tensor(True))
    assert steps.read() == (3, 2, 2)
    steps.count(torch.tensor(False))
    assert steps.read() == (3, 0, 2)
    assert steps.read() == (3, 0, 0)


def test_a_row_goes_on_after_a_restart() -> None:
    steps = SkippedSteps(7, 4, torch.device("cpu"))
    steps.count(torch.tensor(True))
    assert steps.read() == (8, 5, 5)
