"""Answers requests with the engine of one version: its events go to the processes of the API, a frame a step."""

from __future__ import annotations

import asyncio
import logging
import re
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, fields, replace
from functools import partial
from pathlib import Path
from typing import TypeVar

from llama_ray.data.chat.encoding import ChatText
from llama_ray.data.chat.template import PLAIN_STOP, ChatPrompt
from llama_ray.data.tokenizing.tokenizer import Tokenizer
from llama_ray.generation.adapters.store import LoadedAdapter
from llama_ray.generation.completion import Completion, GenerationError
from llama_ray.generation.engine import Engine
from llama_ray.generation.engine_thread import EngineThread, Item
from llama_ray.generation.request import Done, Request
from llama_ray.generation.sampling.params import SamplingParams
from llama_ray.pretrained import resolve
from llama_ray.utils.panics import panics_as_errors
from serve_app.errors import INTERNAL_ERROR
from serve_app.registry.messages import AdapterVersion, ModelVersion
from serve_app.replica.adapters import AdapterError, ServedAdapters
from serve_app.replica.answers import Answer, Collector, Part, check_report
from serve_app.streams.frames import Wire
from serve_app.streams.messages import (
    Answered,
    Encoding,
    Failure,
    Prompt,
    Started,
    Submission,
)
from serve_app.streams.sender import Connection

_log = logging.getLogger(__name__)

Result = TypeVar("Result")

LONG_PROMPT = 50_000
"""Characters, or token ids; some ten milliseconds of tokenising."""
_FIELDS = ("prompt", *(field.name for field in fields(SamplingParams)))
_ENCODING = Encoding()
_MAX_COMPILING_REQUESTS = 256
"""Requests that wait for their grammar at once; others wait for one of them."""


class ServedEngine:
    """An engine that answers requests. From now on it belongs to this object.

    `answer` and what it sends run in the event loop in which the first request arrives, the engine in a thread. `fetch`
    returns where the files of an adapter are on this machine.
    """

    def __init__(self, engine: Engine, version: ModelVersion, fetch: Callable[[str], Path] = resolve) -> None:
        assert engine.tokenizer is not None
        self.engine, self.version = engine, version
        self._adapters = ServedAdapters(engine, fetch, engine.max_loras)
        self.tokenizer: Tokenizer = engine.tokenizer
        self.open_requests = 0
        # What the engine's thread has delivered and the event loop has not sent.
        self._items: deque[list[tuple[Part | Collector, Item]]] = deque()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = EngineThread(engine, self._deliver)
        # Long prompts wait for each other, short ones never for long ones, and the model keeps the other cores.
        self._lanes = ThreadPoolExecutor(1, "tokenizer"), ThreadPoolExecutor(1, "tokenizer_long")
        # A template of strangers that takes long lets no other prompt wait.
        self._rendering = ThreadPoolExecutor(1, "chat_template")
        # Not the event loop's own threads, which a few costly grammars would occupy.
        self._compiling = ThreadPoolExecutor(_MAX_COMPILING_REQUESTS, "grammar")

    @property
    def ended(self) -> str | None:
        """Why the engine has ended, by a crash or by `stop`; None while it runs."""
        return self._thread.ended

    @property
    def stalled_s(self) -> float:
        """Seconds for which work has waited without a step that ended; 0 while there is no work."""
        return self._thread.stalled_s

    def stop(self) -> None:
        """End the engine after its current step; requests in progress fail."""
        self._thread.stop()
        for pool in (*self._lanes, self._rendering, self._compiling):
            pool.shutdown(wait=False, cancel_futures=True)

    async def answer(self, submission: Submission, connection: Connection) -> Answered:
        """Send the events of a request, and return after the last one or when nobody wants the rest.

        Cancelling frees what the request holds in the engine.
        """
        self._loop = asyncio.get_running_loop()
        answer = Answer(submission, connection)
        self.open_requests += 1
        connection.add(submission.stream, answer.end)
        try:
            with panics_as_errors():
                await self._begin(answer)
            return await answer.ended
        except Exception as error:
            if self.ended is not None:
                return "engine_ended"
            answer.send(_failure(error, submission))
            connection.flush()
            return "done"
        finally:
            self.open_requests -= 1
            connection.remove(submission.stream)
            for request_id in answer.request_ids:
                self._thread.abort(request_id)

    async def adapter(self, wanted: AdapterVersion | None) -> LoadedAdapter | None:
        """Return the adapter of a request, if it has one, loaded in a thread. Raises AdapterError."""
        return None if wanted is None else await self._adapters.get(wanted)

    def tokenizer_of(self, adapter: LoadedAdapter | None) -> Tokenizer:
        """Return the tokenizer of requests with an adapter, or without one."""
        return self.tokenizer if adapter is None or adapter.tokenizer is None else adapter.tokenizer

    async def encode(
        self, prompt: Prompt, encoding: Encoding = _ENCODING, adapter: LoadedAdapter | None = None
    ) -> list[int]:
        """Return a prompt's token ids, in a thread: streams go on. Raises ValueError for a prompt that has none."""
        loop = asyncio.get_running_loop()
        text: str | list[int] | ChatText
        if isinstance(prompt, ChatPrompt):
            render = self.tokenizer_of(adapter).render_chat
            text = await loop.run_in_executor(self._rendering, render, prompt)
        else:
            text = prompt
        encode = partial(self.engine.encode, text, adapter=adapter, **asdict(encoding))
        return await loop.run_in_executor(self._lanes[len(text) > LONG_PROMPT], encode)

    async def aside(self, function: Callable[[], Result]) -> Result:
        """Return what `function` does, in the thread of long prompts: streams go on."""
        return await asyncio.get_running_loop().run_in_executor(self._lanes[True], function)

    async def complete(
        self, ids: list[int], params: SamplingParams, adapter: LoadedAdapter | None = None
    ) -> Completion:
        """Return the completion of one prompt. Raises ValueError and GenerationError as `Engine.generate` does."""
        self._loop = loop = asyncio.get_running_loop()
        collector = Collector(loop.create_future())
        self.open_requests += 1
        try:
            request = self.engine.prepare(ids, params, adapter=adapter)
            request_id = self._thread.add(request, collector)
            try:
                return Completion.of(await collector.deltas, ids)
            finally:
                self._thread.abort(request_id)
        finally:
            self.open_requests -= 1

    async def call(self, function: Callable[[], Result]) -> Result:
        """Return what `function` does between two steps, in the engine's thread."""
        self.open_requests += 1
        try:
            return await asyncio.wrap_future(self._thread.call(function))
        except asyncio.CancelledError:
            if self.ended is None:
                raise
            raise GenerationError(self.ended) from None
        finally:
            self.open_requests -= 1

    async def _begin(self, answer: Answer) -> None:
        """Queue a request for each prompt that has choices to go on with."""
        submission = answer.submission
        adapter = await self.adapter(submission.adapter)
        prompts = await self._encode(answer, adapter)
        if answer.ended.done():
            return
        check_report(submission, sum(map(len, prompts)))
        done = [submission.done_of(number) for number in range(len(prompts))]
        requests = await self._prepare(submission, prompts, done, adapter)
        if answer.ended.done():
            return
        echo = self._echo(submission, prompts) if submission.reporting.echo else None
        answer.send(_started(submission, prompts, echo))
        # Before the first token, which the engine's thread may send as soon as it has a request. And a client that
        # waits for its status sees that it was accepted.
        answer.connection.flush()
        answer.unfinished = sum(len(request.sequences) for request in requests)
        for number, request in enumerate(requests):
            text = echo[number] if echo else ""
            part = Part(
                answer, number, prompts[number], done[number], text, self.tokenizer, self._lanes[True]
            )
            answer.request_ids.append(self._thread.add(request, part))

    async def _encode(self, answer: Answer, adapter: LoadedAdapter | None) -> list[list[int]]:
        """Encode prompts one by one, so that a client that leaves ends it."""
        submission, prompts = answer.submission, list[list[int]]()
        for prompt in submission.prompts:
            if answer.ended.done():
                break
            try:
                prompts.append(await self.encode(prompt, submission.encoding, adapter))
            except ValueError as error:
                param = "messages" if isinstance(prompt, ChatPrompt) else "prompt"
                raise _BadPrompt(param, str(error)) from error
        return prompts

    async def _prepare(
        self,
        submission: Submission,
        prompts: Sequence[list[int]],
        done: Sequence[Done],
        adapter: LoadedAdapter | None,
    ) -> list[Request]:
        """Return a checked request for each prompt."""
        is_plain = self.tokenizer_of(adapter).chat_template is None

        def prepare() -> list[Request]:
            return [
                self.engine.prepare(
                    ids, self._params(submission, prompt, ids, is_plain), of_prompt, adapter=adapter
                )
                for prompt, ids, of_prompt in zip(submission.prompts, prompts, done, strict=True)
            ]

        # Bad words are encoded.
        if not (submission.params.constrained or submission.params.bad_words):
            return prepare()
        return await asyncio.get_running_loop().run_in_executor(self._compiling, prepare)

    def _params(
        self, submission: Submission, prompt: Prompt, ids: list[int], is_plain: bool
    ) -> SamplingParams:
        params = submission.params
        if isinstance(prompt, ChatPrompt) and is_plain:
            params = replace(params, stop=(*params.stop_strings, *PLAIN_STOP))
        room = self.engine.max_seq_len - len(ids)
        if submission.fit and 0 < room < params.max_tokens:
            params = replace(params, max_tokens=room)
        return params

    def _echo(self, submission: Submission, prompts: Sequence[list[int]]) -> list[str]:
        given = zip(submission.prompts, prompts, strict=True)
        return [prompt if isinstance(prompt, str) else self.tokenizer.decode(ids) for prompt, ids in given]

    def _deliver(self, items: list[tuple[Part | Collector, Item]]) -> None:
        """Send what a step gave. Called in the engine's thread.

        Plain tokens are sent from here. The event loop would first have to wait for the interpreter, which the next
        step is about to need, and the API's turn would come while the model computes, not while the step is planned.
        """
        plain: dict[Connection, list[Wire]] = {}
        others: list[tuple[Part | Collector, Item]] = []
        for receiver, item in items:
            message = receiver.plain(item)
            if message is None or receiver.connection is None:
                others.append((receiver, item))
            else:
                plain.setdefault(receiver.connection, []).append(message)
        for connection, messages in plain.items():
            connection.send(messages)
        if not others:
            return
        self._items.append(others)
        # If there is more, the loop has been woken and has not come to it.
        if len(self._items) == 1 and self._loop is not None:
            # RuntimeError: the loop is closed, and nobody waits for the events.
            with suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._send)

    def _send(self) -> None:
        connections: set[Connection] = set()
        while self._items:
            for part, item in self._items[0]:
                part.take(item)
                if part.connection is not None:
                    connections.add(part.connection)
            self._items.popleft()
        for connection in connections:
            connection.flush()


class _BadPrompt(ValueError):
    """A prompt that cannot be encoded; `param` is the field that it came in."""

    def __init__(self, param: str, message: str) -> None:
        super().__init__(message)
        self.param = param


def _started(submission: Submission, prompts: list[list[int]], echo: list[str] | None) -> Started:
    """Return the first event; what comes with it comes once, however many replicas answer."""
    if submission.echoes_logprobs or submission.done:
        echo = None
    ids = prompts if submission.reporting.prompt_ids and not submission.done else None
    return Started(submission.ref, sum(len(ids) for ids in prompts), echo, ids)


def adapter_failure(error: AdapterError) -> Failure:
    """Return what the client is told of an adapter that cannot be used."""
    if error.passing:
        return Failure(503, str(error), code="not_ready")
    return Failure(404, str(error), code="model_not_found", param="model")


def _failure(error: Exception, submission: Submission) -> Failure:
    """Return what the client is told of an error."""
    if isinstance(error, GenerationError):
        return Failure(500, str(error), code="generation_failed")
    if isinstance(error, _BadPrompt):
        return Failure(400, str(error), param=error.param)
    if isinstance(error, AdapterError):
        return adapter_failure(error)
    if isinstance(error, ValueError):
        # Where a single field is at fault, the message begins with its name.
        name = re.match(r"(?:the )?(\w*)", str(error))
        at_fault = name[1] if name and name[1] in _FIELDS else None
        if at_fault == "prompt" and any(isinstance(prompt, ChatPrompt) for prompt in submission.prompts):
            at_fault = "messages"
        return Failure(400, str(error), param=at_fault)
    _log.error("a request fails", exc_info=error)
    return Failure(500, INTERNAL_ERROR)
