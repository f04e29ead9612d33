"""A Ray actor's work: one engine that is kept full with the rows of several parts at once."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from llama_ray.batch_inference.attempts import ALONE, Attempts
from llama_ray.batch_inference.engine_loop import Candidate, EngineCrashed, EngineLoop, EngineLost
from llama_ray.batch_inference.output import Counts, commit
from llama_ray.batch_inference.rows import (
    Line,
    Part,
    RowError,
    params_of,
    parse,
    prompt_of,
    read_lines,
)
from llama_ray.generation.engine import Engine
from llama_ray.generation.sampling.params import SamplingParams, TokenLogprob
from llama_ray.orchestration.resources import cpu_threads
from llama_ray.storage.store import StorageError
from llama_ray.utils.errors import first_line

_log = logging.getLogger(__name__)

ADDED_FIELDS = ("row", "completions", "error")
"""What the output has beside the fields of the input; such fields of the input, as of an earlier output, give way."""


@dataclass(frozen=True)
class Setup:
    """What a replica needs to know; `engine` are options of `Engine.from_pretrained`."""

    checkpoint: str
    directory: str
    params: SamplingParams
    seed: int
    prompt_field: str
    replicas_on_node: int
    engine: dict[str, Any] = field(default_factory=dict)


@dataclass
class _Asked:
    """A row whose answer is under way, or which has an error already."""

    line: Line
    fields: dict[str, Any]
    params: SamplingParams | None = None
    prompt: str | list[int] = ""
    prompt_tokens: int = 0
    answer: Future[list[Candidate]] | None = None
    error: str = ""


class Replica:
    """Answers parts; called by several threads at once, so that the next part fills what a part's last rows leave.

    Errors that the user can mend come back as a value: Ray would wrap them into a page of traceback.
    """

    def __init__(self, setup: Setup) -> None:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the engine has the threads
        self._setup = setup
        self._failure = ""
        device = setup.engine.get("device")
        if device == "cpu":
            torch.set_num_threads(cpu_threads(setup.replicas_on_node))
        try:
            self._engine = EngineLoop(lambda: Engine.from_pretrained(setup.checkpoint, **setup.engine))
        except ValueError as error:
            self._failure = f"a worker cannot load the model: {error}"
        self._turns = _Turns()

    def __call__(self, row: dict[str, str]) -> dict[str, Any]:
        """Answers `row["part"]`, commits it and tells its counts."""
        part = Part.from_json(row["part"])
        counts, failure = Counts(), self._failure
        if not failure:
            try:
                counts = self._answer(part)
            except ValueError as error:
                failure = str(error)
        return {"part": part.index, "failure": failure, **vars(counts)}

    def _answer(self, part: Part) -> Counts:
        asked = [self._read(line) for line in read_lines(part)]
        try:
            attempts = Attempts(self._setup.directory, part)
            if attempts.may_go_together:
                self._answer_together(asked, attempts)
            else:
                self._answer_one_by_one(asked, attempts)
        except OSError as error:
            raise self._cannot_write(error) from error
        rows = [_output(row) for row in asked]
        counts = Counts(
            rows=len(rows),
            errors=sum("error" in row for row in rows),
            prompt_tokens=sum(row.prompt_tokens for row in asked if not row.error),
            generated_tokens=sum(
                len(completion["token_ids"]) for row in rows for completion in row.get("completions", ())
            ),
        )
        try:
            commit(self._setup.directory, part, rows, counts)
            attempts.forget()
        except OSError as error:
            raise self._cannot_write(error) from error
        return counts

    def _answer_together(self, asked: list[_Asked], attempts: Attempts) -> None:
        with self._turns.together():
            attempts.begin_together()
            for row in asked:
                self._submit(row)
            crashed = [row for row in asked if self._crashed(row)]
        if crashed:  # one of them may be the cause, so each is tried where it can harm no other
            with self._turns.alone():
                for row in crashed:
                    self._submit(row)
                    if self._crashed(row):
                        row.error = f"{row.error} (twice: the second time with no other row in it)"

    def _answer_one_by_one(self, asked: list[_Asked], attempts: Attempts) -> None:
        """After processes have died, and took what they knew with them: slow, and finds the row that kills."""
        with self._turns.alone():
            for row in asked:
                if row.params is None:
                    continue
                number = row.line.row
                if attempts.kills(number):
                    row.error = f"the process died {ALONE} times when it answered this row and nothing else"
                    continue
                attempts.begin_alone(number)
                self._submit(row)
                self._crashed(row)
                attempts.survived(number)

    def _cannot_write(self, error: OSError) -> StorageError:
        reason = first_line(error)
        return StorageError(f"a worker cannot write to {self._setup.directory}: {reason}")

    def _read(self, line: Line) -> _Asked:
        try:
            fields = parse(line)
        except RowError as error:
            return _Asked(line, {"line": line.content.decode(errors="replace")}, error=str(error))
        row = _Asked(line, fields)
        try:
            row.prompt = prompt_of(fields, self._setup.prompt_field)
            row.params = params_of(fields, self._setup.params, self._setup.seed, line.row)
        except RowError as error:
            row.error = str(error)
        return row

    def _submit(self, row: _Asked) -> None:
        if row.params is None:
            return
        row.error, row.answer = "", None
        try:
            row.prompt_tokens, row.answer = self._engine.submit(row.prompt, row.params)
        except EngineLost:  # such as a CUDA context that the crash has ruined: only a new process helps
            _log.exception("this worker ends, Ray starts another")
            os._exit(1)
        except Exception as error:  # one row's, whatever it is: the others go on
            row.error = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"

    def _crashed(self, row: _Asked) -> bool:
        """Waits for the row's answer; whether the engine crashed before it came."""
        if row.answer is None:
            return False
        try:
            candidates = row.answer.result()
        except EngineCrashed as error:
            row.error = str(error)
            return True
        row.error = next((c.error for c in candidates if c.error), "")
        return False


class _Turns:
    """Many hold `together` at once, or one holds `alone`; who waits for `alone` comes before new ones."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._together = self._waiting = 0
        self._alone = False

    @contextmanager
    def together(self) -> Iterator[None]:
        with self._changed:
            self._changed.wait_for(lambda: not self._alone and not self._waiting)
            self._together += 1
        try:
            yield
        finally:
            with self._changed:
                self._together -= 1
                self._changed.notify_all()

    @contextmanager
    def alone(self) -> Iterator[None]:
        with self._changed:
            self._waiting += 1
            self._changed.wait_for(lambda: not self._alone and not self._together)
            self._waiting -= 1
            self._alone = True
        try:
            yield
        finally:
            with self._changed:
                self._alone = False
                self._changed.notify_all()


def _output(row: _Asked) -> dict[str, Any]:
    """The row of the output: the input's fields, its number, and completions or an error."""
    result = {k: v for k, v in row.fields.items() if k not in ADDED_FIELDS} | {"row": row.line.row}
    if row.error or row.answer is None:
        return result | {"error": row.error}
    completions = []
    for candidate in row.answer.result():
        completion: dict[str, Any] = {
            "text": "".join(candidate.text),
            "finish_reason": candidate.finish_reason,
            "token_ids": candidate.token_ids,
        }
        if row.params is not None and row.params.logprobs is not None:
            completion["logprobs"] = _logprobs(candidate.logprobs)
        if candidate.prompt_logprobs is not None:
            completion["prompt_logprobs"] = _logprobs(candidate.prompt_logprobs)
        completions.append(completion)
    return result | {"completions": completions}


def _logprobs(entries: Sequence[TokenLogprob]) -> list[dict[str, Any]]:
    return [
        {"token_id": e.token_id, "logprob": e.logprob, "top": [list(pair) for pair in e.top]} for e in entries
    ]
