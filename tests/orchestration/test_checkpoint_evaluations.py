"""What is evaluated and when, with checkpoints that are directories with a marker and evaluations that tests answer."""

from __future__ import annotations

import json
import queue
import threading
from concurrent.futures import Future
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama_ray.evaluation.results import Evaluation, Score
from llama_ray.orchestration.checkpoint_evaluations import (
    CheckpointEvaluations,
    Measured,
    Running,
    due,
    saved_steps,
)
from llama_ray.storage import run_directory

steps = st.sets(st.integers(1, 60))


@pytest.mark.parametrize(
    ("saved", "before", "ended", "expected"),
    [
        ([10, 20, 30], [], False, 20),
        ([10], [], False, None),
        ([10], [], True, 10),
        ([15, 30, 45], [], False, 45),
        ([15, 30], [], False, 30),
        ([40, 50], [], False, 40),
        ([20, 30, 40, 60], [20], False, 60),
        ([20, 30], [20], False, None),
        ([20, 30], [20], True, 30),
        ([20], [20], True, None),
    ],
)
def test_the_first_checkpoint_from_the_last_multiple_on_is_due(
    saved: list[int], before: list[int], ended: bool, expected: int | None
) -> None:
    assert due(saved, 20, before, ended) == expected


@given(steps, steps, st.integers(1, 20))
def test_nothing_is_evaluated_twice_and_the_end_leaves_nothing(
    saved: set[int], before: set[int], every: int
) -> None:
    taken = []
    while (step := due(saved, every, before | set(taken), ended=True)) is not None:
        taken.append(step)
    assert len(set(taken)) == len(taken) <= 2
    assert not set(taken) & before
    last = max(saved, default=0)
    assert last in taken or last <= max(before, default=0)


def save(run: Path, *steps: int) -> None:
    for step in steps:
        directory = run / run_directory.checkpoint_name(step)
        directory.mkdir(parents=True)
        (directory / run_directory.MARKER).write_text(json.dumps({"step": step, "files": {}}))


def evaluation(value: float) -> Evaluation:
    return Evaluation("a checkpoint", (Score("poem", "bits_per_byte", value, None, 3, False, "a"),), 0.1)


class Evaluations:
    """Starts evaluations of a run, which the test then answers, and collects what is logged."""

    def __init__(self, run: Path, every: int = 20, **options: bool) -> None:
        self.run, self.every = run, every
        self.started: queue.Queue[tuple[int | None, Future[Measured]]] = queue.Queue()
        self.logged: list[tuple[int, float]] = []
        self.cancelled = 0
        self.subject = CheckpointEvaluations(
            str(run),
            every,
            self.start,
            lambda step, found: self.logged.append((step, found.scores[0].value)),
            poll_s=0.01,
            **options,
        )

    def start(self, before: frozenset[int], ended: bool) -> Running:
        future: Future[Measured] = Future()
        self.started.put((due(saved_steps(str(self.run)), self.every, before, ended), future))
        return Running(future, self.cancel)

    def cancel(self) -> None:
        self.cancelled += 1

    def answer(self, value: float | None) -> int | None:
        step, future = self.started.get(timeout=10)
        assert step is not None
        found = None if value is None else evaluation(value)
        future.set_result(Measured(step, found, "" if found else "its node was lost"))
        return step

    def finish(self, *answers: float) -> None:
        ending = threading.Thread(target=self.subject.finish)
        ending.start()
        for value in answers:
            self.answer(value)
        ending.join(10)
        assert not ending.is_alive()


def test_checkpoints_are_evaluated_one_at_a_time_and_those_that_wait_become_one(tmp_path: Path) -> None:
    save(tmp_path, 10)
    evaluations = Evaluations(tmp_path)
    save(tmp_path, 20)
    _, slow = evaluations.started.get(timeout=10)
    save(tmp_path, 40, 60, 70, 80, 90)
    slow.set_result(Measured(20, evaluation(2.0)))
    assert evaluations.answer(1.5) == 80
    evaluations.finish(1.0)
    assert evaluations.logged == [(20, 2.0), (80, 1.5), (90, 1.0)]
    assert evaluations.started.empty()


def test_a_resumed_run_evaluates_no_step_twice_and_logs_what_may_be_lacking(tmp_path: Path) -> None:
    save(tmp_path, 20)
    first = Evaluations(tmp_path)
    first.answer(2.0)
    first.finish()
    save(tmp_path, 30, 40)
    second = Evaluations(tmp_path)
    assert second.answer(1.5) == 40
    second.finish()
    assert second.logged == [(20, 2.0), (40, 1.5)]


def test_a_failed_evaluation_is_one_line_and_the_next_one_is_made(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save(tmp_path, 20)
    evaluations = Evaluations(tmp_path)
    evaluations.answer(None)
    save(tmp_path, 40)
    _, lost = evaluations.started.get(timeout=10)
    lost.set_exception(OSError("the connection\nto the node"))
    save(tmp_path, 60)
    evaluations.finish(1.5)
    assert evaluations.logged == [(60, 1.5)]
    assert set(capsys.readouterr().out.splitlines()) == {
        "step 20  NOT EVALUATED, nothing else is affected: its node was lost",
        "step 40  NOT EVALUATED, nothing else is affected: the connection to the node",
        "training has ended; its last checkpoint is evaluated",
        "step 60  evaluated in 0.1 s  poem/bits_per_byte 1.5000",
    }


def test_without_room_beside_the_workers_evaluations_wait_for_the_end(tmp_path: Path) -> None:
    save(tmp_path, 20, 40)
    evaluations = Evaluations(tmp_path, has_room=False)
    with pytest.raises(queue.Empty):
        evaluations.started.get(timeout=0.1)
    evaluations.finish(1.5)
    assert evaluations.logged == [(40, 1.5)]


def test_a_stopped_run_waits_for_no_evaluation(tmp_path: Path) -> None:
    save(tmp_path, 20)
    evaluations = Evaluations(tmp_path)
    evaluations.started.get(timeout=10)
    evaluations.subject.abandon()
    assert evaluations.cancelled == 1
    assert evaluations.logged == []
