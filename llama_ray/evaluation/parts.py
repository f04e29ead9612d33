"""Answers that are kept: requests in parts, each with a file, so that a killed evaluation goes on where it was."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from llama_ray.data.tokenizing.tokenizer import Tokenizer
from llama_ray.evaluation.results import EvaluationError
from llama_ray.evaluation.scoring import Generation, Report, Scored, Scorer, Scoring, no_report
from llama_ray.generation.sampling.params import SamplingParams
from llama_ray.storage import store
from llama_ray.utils.errors import first_line

_PART_TOKENS = 2**16
"""Tokens of the requests of one part: seconds of a GPU, and what a kill costs at most."""


@dataclass(frozen=True)
class Part:
    """Requests of one kind that are answered together, and their answers kept in one file."""

    requests: tuple[Scoring, ...] | tuple[Generation, ...]

    def to_json(self) -> str:
        """Serialise for another process."""
        kind = "generate" if isinstance(self.requests[0], Generation) else "score"
        return json.dumps([kind, [_to_json(request) for request in self.requests]])

    @classmethod
    def from_json(cls, text: str) -> Part:
        """Rebuild the part that `to_json` wrote."""
        kind, rows = json.loads(text)
        if kind == "score":
            return cls(tuple(Scoring(tuple(tokens), start) for tokens, start in rows))
        return cls(tuple(Generation(tuple(t), SamplingParams.from_json(params)) for t, params in rows))

    @property
    def file(self) -> str:
        """The name of the file with the answers: a digest of the requests."""
        return f"part-{hashlib.sha256(self.to_json().encode()).hexdigest()[:32]}.json"

    def answer(self, scorer: Scorer, directory: str) -> None:
        """Answer all requests and keep the answers in `directory`. Raises EvaluationError."""
        answers: list[Any]
        if isinstance(self.requests[0], Generation):
            answers = list(scorer.generate([r for r in self.requests if isinstance(r, Generation)]))
        else:
            scored = scorer.score([r for r in self.requests if isinstance(r, Scoring)])
            answers = [[each.logprobs, each.greedy] for each in scored]
        try:
            store.write_text(store.join(directory, self.file), json.dumps(answers))
        except OSError as error:
            raise EvaluationError(
                f"cannot write to output {directory} ({first_line(error)}); give a directory on storage that all nodes "
                "share"
            ) from error

    def kept(self, directory: str) -> list[Any] | None:
        """Return the answers as JSON has them; None if they are not there, or not whole."""
        text = store.read_text(store.join(directory, self.file))
        try:
            answers = json.loads(text or "")
        except ValueError:
            # Storage that does not replace a file in one step may hold a truncated one.
            return None
        return answers if isinstance(answers, list) and len(answers) == len(self.requests) else None


Compute = Callable[[Sequence[Part]], Iterator[int]]
"""Answers parts, keeps their answers, and yields the number of requests of each as it is done."""


class PartedScorer:
    """A `Scorer` that keeps its answers in a directory, and computes only those that are not there."""

    def __init__(
        self, model: str, tokenizer: Tokenizer, max_seq_len: int, directory: str, compute: Compute
    ) -> None:
        """Keep answers in `directory`, a path or URI that nothing but this model's answers are in."""
        self.model, self.tokenizer = model, tokenizer
        self._max_seq_len, self._directory, self._compute = max_seq_len, directory, compute

    @property
    def max_seq_len(self) -> int:
        """See `Scorer`."""
        return self._max_seq_len

    def score(self, requests: Sequence[Scoring], report: Report = no_report) -> list[Scored]:
        """See `Scorer`."""
        return [
            Scored(tuple(logprobs), tuple(greedy)) for logprobs, greedy in self._answers(requests, report)
        ]

    def generate(self, requests: Sequence[Generation], report: Report = no_report) -> list[str]:
        """See `Scorer`."""
        return self._answers(requests, report)

    def _answers(self, requests: Sequence[Scoring] | Sequence[Generation], report: Report) -> list[Any]:
        # Requests that begin alike are computed together.
        order = sorted(range(len(requests)), key=lambda number: requests[number].tokens)
        parts = list(_divide([requests[number] for number in order]))
        done = {file for file in store.list_files(self._directory) if file.startswith("part-")}
        missing = [part for part in parts if part.file not in done or part.kept(self._directory) is None]
        finished = len(requests) - sum(len(part.requests) for part in missing)
        if missing:
            for count in self._compute(missing):
                finished += count
                report(finished, len(requests))
        answers: list[Any] = [None] * len(requests)
        numbers = iter(order)
        for part in parts:
            kept = part.kept(self._directory)
            if kept is None:
                raise EvaluationError(
                    f"{self._directory}/{part.file} is not there after it was written; give an output on storage that "
                    "all nodes share, and start again: what is finished is kept"
                )
            for answer in kept:
                answers[next(numbers)] = answer
        return answers


def compute_with(scorer: Scorer, directory: str) -> Compute:
    """Return what answers parts one after the other in this process."""

    def compute(parts: Sequence[Part]) -> Iterator[int]:
        for part in parts:
            part.answer(scorer, directory)
            yield len(part.requests)

    return compute


def _divide(requests: Sequence[Scoring | Generation]) -> Iterator[Part]:
    some: list[Any] = []
    size = 0
    for request in requests:
        some.append(request)
        size += len(request.tokens)
        if size >= _PART_TOKENS:
            yield Part(tuple(some))
            some, size = [], 0
    if some:
        yield Part(tuple(some))


def _to_json(request: Scoring | Generation) -> list[Any]:
    if isinstance(request, Scoring):
        return [request.tokens, request.start]
    return [request.tokens, asdict(request.params)]
