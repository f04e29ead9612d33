"""A row from its line in the input to its line in the output."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from llama_ray.batch_inference.partitions import Line
from llama_ray.batch_inference.rows import RowError, adapter_of, params_of, parse, prompt_of
from llama_ray.generation.sampling.params import SamplingParams, TokenLogprob
from llama_ray.generation.scheduling.sequence import Delta

_OUTPUT_FIELDS = ("row", "completions", "error")
"""What the output has beside the fields of the input; the input's own fields of these names, as an earlier output has
them, are dropped."""


@dataclass
class PendingRow:
    """A row that is being answered, or one with an `error`. `params` is None for a row that cannot be answered."""

    line: Line
    fields: dict[str, Any]
    params: SamplingParams | None = None
    prompt: str | list[int] = ""
    adapter: str | None = None
    prompt_tokens: int = 0
    answer: Future[list[Delta]] | None = None
    error: str = ""

    @classmethod
    def read(
        cls,
        line: Line,
        prompt_field: str,
        params: SamplingParams,
        seed: int,
        adapters: Collection[str] = (),
    ) -> PendingRow:
        """Read a line. `params` are the job's, which the row may change; mistakes become the row's `error`."""
        try:
            fields = parse(line)
        except RowError as error:
            return cls(line, {"line": line.content.decode(errors="replace")}, error=str(error))
        row = cls(line, fields)
        try:
            row.prompt = prompt_of(fields, prompt_field)
            row.adapter = adapter_of(fields, adapters)
            row.params = params_of(fields, params, seed, line.row)
        except RowError as error:
            row.error = str(error)
        return row

    def output(self) -> dict[str, Any]:
        """Return the output's row: the input's fields, the row's number, and completions or an error."""
        result = {k: v for k, v in self.fields.items() if k not in _OUTPUT_FIELDS} | {"row": self.line.row}
        if self.error or self.answer is None:
            return result | {"error": self.error}
        with_logprobs = self.params is not None and self.params.logprobs is not None
        completions = [_completion(c, with_logprobs=with_logprobs) for c in self.answer.result()]
        return result | {"completions": completions}


def _completion(candidate: Delta, *, with_logprobs: bool) -> dict[str, Any]:
    completion: dict[str, Any] = {
        "text": candidate.text,
        "finish_reason": candidate.finish_reason,
        "token_ids": candidate.token_ids,
    }
    if with_logprobs:
        completion["logprobs"] = _logprobs(candidate.logprobs or ())
    if candidate.prompt_logprobs is not None:
        completion["prompt_logprobs"] = _logprobs(candidate.prompt_logprobs)
    return completion


def _logprobs(entries: Sequence[TokenLogprob]) -> list[dict[str, Any]]:
    return [
        {"token_id": entry.token_id, "logprob": entry.logprob, "top": [list(pair) for pair in entry.top]}
        | ({} if entry.rank is None else {"rank": entry.rank})
        for entry in entries
    ]
