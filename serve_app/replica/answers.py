"""What takes the deltas of an engine: an answer in parts, one for each prompt, or a caller in this process."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import replace

from llama_ray.data.tokenizing.tokenizer import Tokenizer
from llama_ray.generation.completion import GenerationError
from llama_ray.generation.engine_thread import Item
from llama_ray.generation.request import Done
from llama_ray.generation.sampling.params import SamplingParams, TokenLogprob
from llama_ray.generation.scheduling.sequence import Delta
from llama_ray.utils.panics import panics_as_errors
from serve_app.errors import INTERNAL_ERROR
from serve_app.replica.logprobs import LogprobWriter, prompt_tokens
from serve_app.streams.frames import Wire, to_wire
from serve_app.streams.messages import (
    Answered,
    ChoiceDelta,
    Event,
    Failure,
    Logprobs,
    PromptToken,
    Submission,
)
from serve_app.streams.sender import Connection

_log = logging.getLogger(__name__)

_LONG_REPORT = 500
"""Tokens of a prompt with log-probabilities; some milliseconds of finding their texts."""
MAX_REPORT = 2**18
"""Log-probabilities of prompts that a request may ask for, those of each choice counted: the API takes half a second to
write them."""


class Answer:
    """One submission that is being answered; `ended` is set when no more will be sent."""

    def __init__(self, submission: Submission, connection: Connection) -> None:
        self.submission, self.connection = submission, connection
        self.ended: asyncio.Future[Answered] = asyncio.get_running_loop().create_future()
        self.request_ids: list[int] = []
        self.unfinished = 0

    def send(self, event: Event) -> None:
        """Send an event with the next frame, unless the answer has ended."""
        if not self.ended.done():
            self.connection.write(to_wire(self.submission.stream, event))

    def end(self, how: Answered = "done") -> None:
        """Send no more."""
        if not self.ended.done():
            self.ended.set_result(how)

    def fail(self, failure: Failure) -> None:
        """Send why there is no more."""
        self.send(failure)
        self.end()


class Collector:
    """Receives the deltas of one candidate for a caller in this process."""

    connection: Connection | None = None

    def __init__(self, deltas: asyncio.Future[list[Delta]]) -> None:
        self.deltas = deltas
        self._received: list[Delta] = []

    def plain(self, item: Item) -> Wire | None:
        """Return None: nothing is sent."""
        return None

    def take(self, item: Item) -> None:
        """Take what one step gave."""
        if self.deltas.done():
            return
        if isinstance(item, GenerationError):
            self.deltas.set_exception(item)
            return
        self._received += item
        if item[-1].finish_reason is not None:
            self.deltas.set_result(self._received)


class Part:
    """The candidates of prompt number `number` of an answer, those of `done` as they have begun elsewhere.

    `echo` precedes their texts. What takes long runs in `lane`, so that other streams go on.
    """

    def __init__(
        self,
        answer: Answer,
        number: int,
        ids: list[int],
        done: Done,
        echo: str,
        tokenizer: Tokenizer,
        lane: Executor,
    ) -> None:
        self.answer, self.connection = answer, answer.connection
        self._is_plain = params_are_plain(answer.submission.params)
        self._ids, self._echo, self._tokenizer, self._lane = ids, echo, tokenizer, lane
        params = answer.submission.params
        self._first = number * params.n
        self._writers = list[LogprobWriter]()
        for index in range(0 if params.logprobs is None else params.n):
            writer = self._writer(ids, params.constrained, len(echo))
            writer.skip(done.get(index) or ())
            self._writers.append(writer)
        self._report: tuple[Logprobs | None, list[PromptToken] | None] | None = None
        # What steps gave while the lane was busy with the one before them.
        self._later: list[Item] | None = None

    def plain(self, item: Item) -> Wire | None:
        """Return tokens that are sent as they are, in the engine's thread; None for what `take` must see.

        From the first end of a candidate on that is everything, so that what the others get stays in order.
        """
        if not self._is_plain or isinstance(item, GenerationError) or self.answer.ended.done():
            return None
        self._is_plain = all(delta.finish_reason is None for delta in item)
        if not self._is_plain:
            return None
        try:
            return to_wire(self.answer.submission.stream, self._choices(item))
        except Exception:
            # `take` meets the same error and ends this answer alone; here it would end the engine.
            return None

    def take(self, item: Item) -> None:
        """Send what one step gave."""
        if self._later is not None:
            self._later.append(item)
            return
        try:
            with panics_as_errors():
                self._take(item)
        except Exception as error:
            self._crash(error)

    def _take(self, item: Item) -> None:
        if isinstance(item, GenerationError):
            self.answer.end("engine_ended")
        elif error := next((delta.error for delta in item if delta.error is not None), None):
            self.answer.fail(Failure(500, error, code="generation_failed"))
        elif any(len(delta.prompt_logprobs or ()) > _LONG_REPORT for delta in item):
            self._later = []
            loop = asyncio.get_running_loop()
            loop.run_in_executor(self._lane, self._choices, item).add_done_callback(self._resume)
        else:
            self._send(self._choices(item))

    def _resume(self, choices: asyncio.Future[list[ChoiceDelta]]) -> None:
        """Send what the lane has made of an item, and what came meanwhile."""
        later, self._later = self._later or [], None
        if choices.cancelled():
            self.answer.end("engine_ended")
        elif (error := choices.exception()) is not None:
            self._crash(error)
        else:
            self._send(choices.result())
        for item in later:
            self.take(item)
        self.connection.flush()

    def _send(self, choices: list[ChoiceDelta]) -> None:
        self.answer.unfinished -= sum(choice.finish_reason is not None for choice in choices)
        self.answer.send(choices)
        if not self.answer.unfinished:
            self.answer.end()

    def _crash(self, error: BaseException) -> None:
        _log.error("a request fails", exc_info=error)
        self.answer.fail(Failure(500, INTERNAL_ERROR))

    def _choices(self, item: Sequence[Delta]) -> list[ChoiceDelta]:
        return [self._choice(delta) for delta in item]

    def _choice(self, delta: Delta) -> ChoiceDelta:
        logprobs = None if delta.logprobs is None else self._writers[delta.index].write(delta.logprobs)
        choice = ChoiceDelta(
            self._first + delta.index,
            delta.text,
            delta.token_ids,
            logprobs,
            delta.finish_reason,
            delta.stop_reason,
            None,
            # Those of the other candidates are the first one's.
            0 if delta.index else delta.cached_tokens,
        )
        return choice if delta.prompt_logprobs is None else self._with_prompt(choice, delta.prompt_logprobs)

    def _with_prompt(self, choice: ChoiceDelta, positions: Sequence[TokenLogprob]) -> ChoiceDelta:
        """Return the first delta of a choice with what the request wants to be told of the prompt."""
        if self._report is None:
            self._report = self._make_report(positions)
        echo, tokens = self._report
        if echo is None or choice.logprobs is None:
            return replace(choice, prompt_logprobs=tokens)
        logprobs = Logprobs.joined([echo, choice.logprobs])
        return replace(choice, text=self._echo + choice.text, logprobs=logprobs, prompt_logprobs=tokens)

    def _make_report(
        self, positions: Sequence[TokenLogprob]
    ) -> tuple[Logprobs | None, list[PromptToken] | None]:
        submission, first = self.answer.submission, self._ids[0]
        echo, tokens = None, None
        if submission.echoes_logprobs:
            echo = self._writer((), constrained=False, before=0).write_prompt(first, positions)
        if (top := submission.reporting.prompt_logprobs) is not None:
            tokens = prompt_tokens(self._tokenizer, first, positions, top)
        return echo, tokens

    def _writer(self, prompt: Sequence[int], constrained: bool, before: int) -> LogprobWriter:
        submission = self.answer.submission
        return LogprobWriter(
            self._tokenizer,
            prompt,
            constrained,
            top=submission.params.logprobs or 0,
            before=before,
            names=submission.reporting.names,
        )


def params_are_plain(params: SamplingParams) -> bool:
    """Whether a request gets nothing but tokens and their text."""
    return params.logprobs is None and params.prompt_logprobs is None


def check_report(submission: Submission, prompt_tokens: int) -> None:
    """Raise ValueError if the request asks for too many log-probabilities of its prompts."""
    params, top = submission.params, submission.reporting.prompt_logprobs
    each = 0 if top is None else top + 1
    if submission.echoes_logprobs:
        each += (params.logprobs or 0) + 1
    number = prompt_tokens * params.n * each
    if number > MAX_REPORT:
        name = "logprobs" if top is None else "prompt_logprobs"
        raise ValueError(
            f"{name} of {prompt_tokens:,} prompt tokens, {each} for each, with n {params.n} are {number:,}; a request "
            f"may ask for at most {MAX_REPORT:,}; lower it or n, or send several requests"
        )
