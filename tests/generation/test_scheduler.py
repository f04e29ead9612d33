from __future__ import annotations

from llama_ray.generation.sampling import SamplingParams
from llama_ray.generation.scheduler import Scheduler
from llama_ray.generation.sequence import Sequence
from llama_ray.generation.text import TextOutput


def sequence(request_id: int, length: int = 1) -> Sequence:
    return Sequence(request_id, 0, [0] * length, SamplingParams(), 0, TextOutput(None, ()), ())


def admitted(scheduler: Scheduler) -> list[tuple[int, int | None]]:
    return [(s.request_id, s.slot) for s in scheduler.admit()]


def test_first_come_first_served_into_the_lowest_free_slot() -> None:
    scheduler = Scheduler(slots=2, prefill_tokens=100)
    for i in range(4):
        scheduler.add(sequence(i))
    assert admitted(scheduler) == [(0, 0), (1, 1)]
    assert admitted(scheduler) == []
    scheduler.release(scheduler.running[1])
    scheduler.release(scheduler.running[0])
    assert admitted(scheduler) == [(2, 0), (3, 1)]
    assert not scheduler.waiting


def test_prompts_are_taken_in_up_to_a_budget_and_a_longer_one_alone() -> None:
    scheduler = Scheduler(slots=8, prefill_tokens=10)
    for i, length in enumerate((4, 6, 1, 50, 3)):
        scheduler.add(sequence(i, length))
    assert [i for i, _ in admitted(scheduler)] == [0, 1]
    assert [i for i, _ in admitted(scheduler)] == [2]  # 50 does not fit beside it, and nobody overtakes
    assert [i for i, _ in admitted(scheduler)] == [3]
    assert [i for i, _ in admitted(scheduler)] == [4]


def test_abort_takes_a_request_out_of_both_places() -> None:
    scheduler = Scheduler(slots=2, prefill_tokens=100)
    running = [sequence(0), sequence(1)]
    for s in (*running, sequence(0), sequence(2)):
        scheduler.add(s)
    scheduler.admit()
    scheduler.abort(0)
    assert [s.request_id for s in scheduler.running.values()] == [1]
    assert [s.request_id for s in scheduler.waiting] == [2]
    assert running[0].slot is None
    assert admitted(scheduler) == [(2, 0)]
    scheduler.abort(99)
