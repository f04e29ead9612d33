"""An engine that many threads put requests into, run by a thread of its own and made anew when it crashes."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field

from llama_ray.generation.engine import Engine, Prompt
from llama_ray.generation.sampling.params import SamplingParams, TokenLogprob
from llama_ray.generation.scheduling.sequence import Delta, FinishReason


class EngineCrashed(RuntimeError):
    """The engine's step raised something: every request that it had is lost, whichever of them was the cause."""


class EngineLost(RuntimeError):
    """After a crash no new engine could be made in this process."""


@dataclass
class Candidate:
    """One completion as it grows. `error` is set, with `finish_reason` "error", where it could not be finished."""

    text: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprob] | None = None
    finish_reason: FinishReason | None = None
    error: str | None = None

    def add(self, delta: Delta) -> None:
        """Take what a step gave."""
        self.text.append(delta.text)
        self.token_ids += delta.token_ids
        self.logprobs += delta.logprobs or ()
        self.prompt_logprobs = self.prompt_logprobs or delta.prompt_logprobs
        self.finish_reason, self.error = delta.finish_reason, delta.error


@dataclass
class _Request:
    candidates: list[Candidate]
    future: Future[list[Candidate]]


class EngineLoop:
    """Steps an engine while it has work. A crash fails the requests in flight; the next one finds a new engine.

    `load` makes an engine; what it raises at first is raised here.
    """

    def __init__(self, load: Callable[[], Engine]) -> None:
        self._load = load
        self._engine: Engine | None = load()
        self._requests: dict[int, _Request] = {}
        self._wake = threading.Condition()  # guards the two above
        threading.Thread(target=self._run, name="engine", daemon=True).start()

    def submit(self, prompt: Prompt, params: SamplingParams) -> tuple[int, Future[list[Candidate]]]:
        """(tokens of the prompt, the future of its `n` candidates); the future may raise EngineCrashed.

        Raises ValueError for a request that cannot be served, and EngineLost.
        """
        with self._wake:
            if self._engine is None:
                try:
                    self._engine = self._load()
                except Exception as error:
                    raise EngineLost(f"{type(error).__name__}: {error}") from error
            ids = self._engine.encode(prompt)
            request_id = self._engine.submit(ids, params)
            request = _Request([Candidate() for _ in range(params.n)], Future())
            self._requests[request_id] = request
            self._wake.notify()
        return len(ids), request.future

    def _run(self) -> None:
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._requests)
                engine = self._engine
            assert engine is not None  # there are requests only where there is an engine
            try:
                deltas = engine.step()
            except Exception as error:
                del engine
                self._fail(EngineCrashed(f"the engine crashed: {type(error).__name__}: {error}"))
                continue
            with self._wake:
                done = [request for delta in deltas if (request := self._take(delta))]
            for request in done:
                request.future.set_result(request.candidates)

    def _take(self, delta: Delta) -> _Request | None:
        """The request, where this delta was its last."""
        request = self._requests[delta.request_id]
        request.candidates[delta.index].add(delta)
        if delta.finish_reason is None or any(c.finish_reason is None for c in request.candidates):
            return None
        return self._requests.pop(delta.request_id)

    def _fail(self, error: EngineCrashed) -> None:
        with self._wake:
            lost, self._requests, self._engine = self._requests, {}, None
        for request in lost.values():
            request.future.set_exception(error)
