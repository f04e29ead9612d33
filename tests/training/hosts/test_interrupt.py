from __future__ import annotations

import torch.distributed as dist

from llama_ray.training.hosts.interrupt import Interrupt, InterruptAgreement
from tests.training.helpers import in_processes

NONE, CHECKPOINT, STOP, SUPERSEDED = Interrupt


def answers(requests: list[Interrupt]) -> list[Interrupt]:
    """What a worker is told at each step, if it is asked for `requests` one after the other."""
    remaining = iter(requests)
    agreement = InterruptAgreement(lambda: next(remaining), timeout_s=60)
    return [agreement.next_interrupt() for _ in requests]


def test_an_interrupt_is_answered_once_a_step_later() -> None:
    assert answers([NONE, CHECKPOINT, CHECKPOINT, CHECKPOINT]) == [NONE, NONE, CHECKPOINT, NONE]


def test_a_more_urgent_interrupt_is_answered_after_a_less_urgent_one() -> None:
    assert answers([CHECKPOINT, STOP, STOP]) == [NONE, CHECKPOINT, STOP]


def test_an_interrupt_that_was_withdrawn_may_come_again() -> None:
    assert answers([CHECKPOINT, NONE, CHECKPOINT, NONE]) == [NONE, CHECKPOINT, NONE, CHECKPOINT]


def _answers_of_rank(requests: list[list[Interrupt]]) -> list[Interrupt]:
    return answers(requests[dist.get_rank()])


def test_all_workers_answer_the_most_urgent_interrupt_at_the_same_step() -> None:
    requests = [[NONE, CHECKPOINT, NONE, NONE], [NONE, STOP, NONE, NONE]]
    assert in_processes(2, _answers_of_rank, requests) == [[NONE, NONE, STOP, NONE]] * 2
