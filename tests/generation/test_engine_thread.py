from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from llama_ray.data.tokenizing.tokenizer import Tokenizer
from llama_ray.generation.completion import GenerationError
from llama_ray.generation.engine import Engine
from llama_ray.generation.engine_thread import EngineThread, Item
from llama_ray.generation.sampling.params import SamplingParams
from llama_ray.generation.scheduling.sequence import Delta
from llama_ray.model.llama import Llama
from tests.generation.constraints.helpers import Processes

PARAMS = SamplingParams(max_tokens=5, seed=3, ignore_eos=True)
LONG = SamplingParams(max_tokens=140, ignore_eos=True)
LONG_GREEDY = replace(LONG, temperature=0)


class Delivered(queue.Queue[tuple[str, Item]]):
    """Deltas and errors in the order of their delivery; each receiver is a name."""

    def __call__(self, items: list[tuple[str, Item]]) -> None:
        for item in items:
            self.put(item)

    def until_finished(self, receiver: str) -> list[Delta]:
        """Return the deltas of one receiver up to its last one; no other receiver may get any."""
        deltas: list[Delta] = []
        while not any(delta.finish_reason for delta in deltas):
            name, item = self.get(timeout=30)
            assert name == receiver
            assert isinstance(item, list)
            deltas += item
        return deltas

    def drain(self) -> list[tuple[str, Item]]:
        """Return what has been delivered by now."""
        return [self.get_nowait() for _ in range(self.qsize())]


@pytest.fixture
def delivered() -> Delivered:
    return Delivered()


@pytest.fixture
def thread(model: Llama, tokenizer: Tokenizer, delivered: Delivered) -> Iterator[EngineThread[str]]:
    thread = EngineThread(Engine(model, tokenizer, max_num_seqs=2), delivered)
    yield thread
    thread.stop()


def test_each_receiver_gets_the_deltas_of_its_request(
    thread: EngineThread[str], delivered: Delivered, engine: Engine
) -> None:
    expected = engine.generate(["a", "The dog"], PARAMS)
    thread.submit("a", PARAMS, "first")
    assert [t for d in delivered.until_finished("first") for t in d.token_ids] == expected[0].token_ids
    thread.submit("The dog", PARAMS, "second")
    assert [t for d in delivered.until_finished("second") for t in d.token_ids] == expected[1].token_ids
    assert thread.ended is None


def test_an_aborted_request_delivers_nothing_more(thread: EngineThread[str], delivered: Delivered) -> None:
    request_id = thread.submit("a", LONG, "aborted")
    delivered.get(timeout=30)
    thread.abort(request_id)
    delivered.drain()
    thread.submit("b", PARAMS, "kept")
    delivered.until_finished("kept")
    thread.abort(request_id)
    assert not thread.engine.has_work


def test_stop_gives_open_requests_the_reason_and_refuses_new_ones(
    thread: EngineThread[str], delivered: Delivered
) -> None:
    thread.submit("a", LONG, "open")
    delivered.get(timeout=30)
    thread.stop()
    name, error = delivered.drain()[-1]
    assert (name, str(error)) == ("open", "the engine was stopped")
    assert thread.ended == "the engine was stopped"
    with pytest.raises(GenerationError, match="the engine was stopped"):
        thread.submit("b", PARAMS, "late")


class Gate:
    """Holds back each step of an engine, before it computes, until the test lets it go on."""

    def __init__(self, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
        self._step = engine.step
        self._reached, self._open = threading.Semaphore(0), threading.Semaphore(0)
        monkeypatch.setattr(engine, "step", self._wait)

    def reach(self) -> None:
        """Wait until the engine's thread is at its next step."""
        assert self._reached.acquire(timeout=30)

    def open(self, steps: int = 1) -> None:
        """Let the next steps go on."""
        self._open.release(steps)

    def _wait(self) -> list[Delta]:
        self._reached.release()
        self._open.acquire()
        return self._step()


@pytest.fixture
def gate(thread: EngineThread[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    gate = Gate(thread.engine, monkeypatch)
    yield gate
    gate.open(10_000)


def test_all_that_a_step_gives_is_delivered_at_once(model: Llama, tokenizer: Tokenizer) -> None:
    deliveries: queue.Queue[list[str]] = queue.Queue()
    thread = EngineThread[str](
        Engine(model, tokenizer), lambda items: deliveries.put([name for name, _ in items])
    )
    for name in "abc":
        thread.submit(name, LONG, name)
    while deliveries.get(timeout=30) != ["a", "b", "c"]:
        pass
    thread.stop()


def test_the_rest_of_a_request_is_submitted_with_what_is_done(
    thread: EngineThread[str], delivered: Delivered, engine: Engine
) -> None:
    [expected] = engine.generate("The dog", PARAMS)
    thread.submit("The dog", PARAMS, "rest", {0: expected.token_ids[:2]})
    rest = delivered.until_finished("rest")
    assert [token for delta in rest for token in delta.token_ids] == expected.token_ids[2:]
    assert expected.text.endswith("".join(delta.text for delta in rest))


def test_a_stall_is_seen_while_a_step_hangs_and_hinders_nobody(
    thread: EngineThread[str], delivered: Delivered, gate: Gate
) -> None:
    assert thread.stalled_s == 0
    thread.submit("a", PARAMS, "first")
    gate.reach()
    while thread.stalled_s < 0.05:
        # Neither waits for the step.
        thread.abort(thread.submit("b", PARAMS, "second"))
    opened = time.monotonic()
    gate.open()
    gate.reach()
    assert thread.stalled_s <= time.monotonic() - opened
    gate.open(10_000)
    delivered.until_finished("first")
    while thread.stalled_s:
        assert time.monotonic() - opened < 30


FORKS = replace(LONG, n=3, prompt_logprobs=0)


@pytest.mark.parametrize("steps", [0, 1, 5])
def test_a_client_that_leaves_frees_its_blocks_whatever_its_request_is_doing(
    thread: EngineThread[str], delivered: Delivered, gate: Gate, steps: int
) -> None:
    """Two sequences run; the third candidate and the other requests wait. Nothing waits for the step under way."""
    running = thread.submit("a", FORKS, "gone")
    others = [thread.submit("b", LONG, "gone"), thread.submit("a" * 9, FORKS, "gone")]
    for _ in range(steps):
        gate.reach()
        gate.open()
    gate.reach()
    assert thread.engine.stats.running == (2 if steps else 0)
    assert thread.engine.stats.waiting > 0
    for request_id in (*others, running):
        thread.abort(request_id)
    stats = thread.engine.stats
    assert (stats.running, stats.waiting, stats.blocks_in_use) == (0, 0, 0)
    delivered.drain()
    gate.open()
    kept = thread.submit("c", PARAMS, "kept")
    gate.open(100)
    delivered.until_finished("kept")
    thread.abort(kept)


def test_a_client_that_leaves_does_not_wait_for_a_mask(
    thread: EngineThread[str], delivered: Delivered
) -> None:
    processes = Processes()
    constrained = SamplingParams(regex="[a-z]{150}", max_tokens=150)
    request_id = thread.submit("a", constrained, "late")
    delivered.get(timeout=30)
    processes.forks()[0].suspend()
    other = thread.submit("b", LONG, "other")
    while delivered.get(timeout=30)[0] != "other":
        pass
    thread.abort(request_id)
    # A call comes after the step in progress, with which the request ends.
    assert thread.call(lambda: thread.engine.stats.running).result(timeout=30) <= 1
    delivered.drain()
    assert delivered.get(timeout=30)[0] == "other"
    processes.forks()[0].resume()
    thread.abort(other)
    assert thread.call(lambda: thread.engine.stats.blocks_in_use).result(timeout=30) == 0


def test_a_delivery_may_abort_what_it_delivers(model: Llama, tokenizer: Tokenizer) -> None:
    ids: queue.Queue[int] = queue.Queue()
    aborted = threading.Event()

    def deliver(items: list[tuple[str, Item]]) -> None:
        for _ in items:
            thread.abort(ids.get(timeout=30))
            aborted.set()

    thread = EngineThread[str](Engine(model, tokenizer), deliver)
    ids.put(thread.submit("a", LONG, "a"))
    assert aborted.wait(30)
    assert thread.engine.stats.blocks_in_use == 0
    assert thread.ended is None
    thread.stop()


def test_a_failing_model_ends_open_requests_and_not_later_ones(model: Llama, delivered: Delivered) -> None:
    doomed = Llama(model.config)
    thread = EngineThread(Engine(doomed, None, max_num_seqs=2), delivered)
    whole = doomed.lm_head.weight
    # The last one waits.
    for name in "abc":
        thread.submit([1], LONG, name)
    delivered.get(timeout=30)
    doomed.lm_head.weight = torch.nn.Parameter(torch.zeros(1, 1))
    errors: dict[str, str | None] = {}
    while len(errors) < 3:
        name, item = delivered.get(timeout=30)
        assert isinstance(item, list)
        if item[-1].finish_reason == "error":
            errors[name] = item[-1].error
    assert all(error and error.startswith("RuntimeError: mat1 and mat2") for error in errors.values())
    doomed.lm_head.weight = whole
    thread.submit([1], PARAMS, "later")
    assert delivered.until_finished("later")[-1].finish_reason == "length"
    thread.stop()


class Panicked(BaseException):
    """As pyo3's PanicException, which is no Exception either."""


@pytest.mark.parametrize("cause", [MemoryError("gone"), Panicked("gone"), SystemExit("gone")], ids=repr)
def test_a_crash_of_the_engine_reaches_all_receivers(
    thread: EngineThread[str], delivered: Delivered, monkeypatch: pytest.MonkeyPatch, cause: BaseException
) -> None:
    both_submitted = threading.Event()

    def crash() -> None:
        both_submitted.wait(30)
        raise cause

    monkeypatch.setattr(thread.engine, "step", crash)
    thread.submit("a", LONG, "running")
    thread.submit("b", LONG, "waiting")
    both_submitted.set()
    got = dict(delivered.get(timeout=30) for _ in range(2))
    reason = f"the engine crashed: {type(cause).__name__}: gone"
    assert {name: str(error) for name, error in got.items()} == {"running": reason, "waiting": reason}
    assert thread.ended == reason
    with pytest.raises(GenerationError, match=reason):
        thread.submit("c", LONG, "late")


def test_a_call_runs_between_the_steps_of_others_and_gives_its_result(
    thread: EngineThread[str], delivered: Delivered, engine: Engine
) -> None:
    [want] = engine.generate([[1, 2, 3]], LONG_GREEDY)
    thread.submit([1, 2, 3], LONG_GREEDY, "stream")
    calls = [thread.call(lambda: threading.current_thread().name) for _ in range(5)]
    failing = thread.call(lambda: 1 // 0)
    assert {call.result(30) for call in calls} == {"engine"}
    with pytest.raises(ZeroDivisionError):
        failing.result(30)
    deltas = delivered.until_finished("stream")
    assert [token for delta in deltas for token in delta.token_ids] == want.token_ids
    # An idle engine is woken for it.
    assert thread.call(lambda: 7).result(30) == 7
    thread.stop()
    with pytest.raises(GenerationError):
        thread.call(lambda: 7)
