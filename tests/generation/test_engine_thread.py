from __future__ import annotations

import queue
import threading
from collections.abc import Iterator

import pytest

from llama_ray.data.tokenizer import Tokenizer
from llama_ray.generation.completion import GenerationError
from llama_ray.generation.engine import Engine
from llama_ray.generation.engine_thread import EngineThread, Item
from llama_ray.generation.sampling.params import SamplingParams
from llama_ray.generation.scheduling.sequence import Delta
from llama_ray.model.llama import Llama

PARAMS = SamplingParams(max_tokens=5, seed=3, ignore_eos=True)
LONG = SamplingParams(max_tokens=150, ignore_eos=True)


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
