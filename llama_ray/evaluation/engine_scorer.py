"""An engine in this process that answers an evaluation's requests, each shared beginning computed once."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from llama_ray.evaluation.prefixes import owners
from llama_ray.evaluation.results import EvaluationError
from llama_ray.evaluation.scoring import Generation, Report, Scored, Scoring, no_report
from llama_ray.generation.backends.runner import RunnerError
from llama_ray.generation.completion import Completion, GenerationError
from llama_ray.generation.engine import Engine
from llama_ray.generation.sampling.params import MAX_PROMPT_LOGPROBS_NEXT, SamplingParams
from llama_ray.generation.scheduling.sequence import Delta

_QUEUED = 4
"""Requests in the engine for each that it can run, so that no step lacks one."""


class _Work(NamedTuple):
    """One request of the engine: requests that differ in their last token alone are one."""

    prompt: tuple[int, ...]
    start: int
    next: tuple[int, ...]
    requests: tuple[int, ...]


class EngineScorer:
    """See `Scorer`."""

    def __init__(self, model: str, engine: Engine) -> None:
        """Answer with `engine`, of the model that the reference `model` names. Raises EvaluationError."""
        if engine.tokenizer is None:
            raise EvaluationError(f"{model} has no tokenizer; give a model that has one")
        self.model, self.tokenizer = model, engine.tokenizer
        self._engine = engine

    @property
    def max_seq_len(self) -> int:
        """See `Scorer`."""
        return self._engine.max_seq_len

    def score(self, requests: Sequence[Scoring], report: Report = no_report) -> list[Scored]:
        """See `Scorer`."""
        works = sorted(_works(requests), key=lambda work: work.prompt)
        before = owners([work.prompt for work in works], self._engine.stats.block_size)
        params = [
            SamplingParams(
                max_tokens=0,
                temperature=0,
                prompt_logprobs=0,
                prompt_logprobs_start=work.start,
                prompt_logprobs_next=work.next,
            )
            for work in works
        ]
        answers: list[Scored | None] = [None] * len(requests)
        done = 0
        for number, completion in self._run([work.prompt for work in works], params, before):
            work = works[number]
            entries = completion.prompt_logprobs or []
            own = entries[: len(entries) - len(work.next)]
            for request, last in zip(work.requests, entries[len(own) :], strict=True):
                both = (*own, last)
                answers[request] = Scored(
                    tuple(entry.logprob for entry in both), tuple(entry.rank == 1 for entry in both)
                )
            done += len(work.requests)
            report(done, len(requests))
        return [answer for answer in answers if answer is not None]

    def generate(self, requests: Sequence[Generation], report: Report = no_report) -> list[str]:
        """See `Scorer`."""
        order = sorted(range(len(requests)), key=lambda number: requests[number].tokens)
        prompts = [requests[number].tokens for number in order]
        before = owners(prompts, self._engine.stats.block_size)
        texts = [""] * len(requests)
        finished = self._run(prompts, [requests[number].params for number in order], before)
        for done, (number, completion) in enumerate(finished, 1):
            texts[order[number]] = completion.text
            report(done, len(requests))
        return texts

    def _run(
        self, prompts: Sequence[Sequence[int]], params: Sequence[SamplingParams], before: Sequence[int | None]
    ) -> Iterator[tuple[int, Completion]]:
        """Yield (number of the prompt, completion) as each is done; a prompt begins after the one `before` it."""
        engine = self._engine
        waiting: defaultdict[int | None, list[int]] = defaultdict(list)
        for number, owner in enumerate(before):
            waiting[owner].append(number)
        ready = deque(waiting.pop(None, []))
        running: dict[int, int] = {}
        deltas: defaultdict[int, list[Delta]] = defaultdict(list)
        try:
            while ready or running:
                while ready and len(running) < _QUEUED * engine.max_num_seqs:
                    number = ready.popleft()
                    running[engine.submit(list(prompts[number]), params[number])] = number
                for delta in engine.step():
                    deltas[delta.request_id].append(delta)
                    if delta.finish_reason is None:
                        continue
                    number = running.pop(delta.request_id)
                    # First those that begin like it, while that is in the cache.
                    ready.extendleft(reversed(waiting.pop(number, [])))
                    yield number, Completion.of(deltas.pop(delta.request_id), list(prompts[number]))
        except (GenerationError, RunnerError, ValueError) as error:
            raise EvaluationError(f"{self.model} cannot be evaluated: {error}") from error
        finally:
            for request_id in running:
                engine.abort(request_id)


def _works(requests: Sequence[Scoring]) -> Iterator[_Work]:
    """Yield what the engine has to do: requests that differ in their last token alone need its logits once."""
    alike: defaultdict[tuple[tuple[int, ...], int], list[int]] = defaultdict(list)
    for number, request in enumerate(requests):
        alike[request.tokens[:-1], request.start].append(number)
    for (prompt, start), numbers in alike.items():
        for first in range(0, len(numbers), MAX_PROMPT_LOGPROBS_NEXT):
            some = numbers[first : first + MAX_PROMPT_LOGPROBS_NEXT]
            yield _Work(prompt, start, tuple(requests[number].tokens[-1] for number in some), tuple(some))
