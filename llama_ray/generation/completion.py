"""The results of `Engine.generate`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Self

from llama_ray.generation.sampling.params import TokenLogprob
from llama_ray.generation.scheduling.sequence import Delta, FinishReason
from llama_ray.generation.stats import RequestStats


class GenerationError(RuntimeError):
    """An accepted request could not be finished; the message gives the cause."""


@dataclass(frozen=True)
class Completion:
    """One finished candidate; for its `finish_reason` see `Delta`.

    `token_ids` include the end-of-text token or the stop string's tokens, which `text` leaves out. `logprobs` has an
    entry for each of them, and `prompt_logprobs` for each prompt token from `prompt_logprobs_start` on; each is None
    if the request did not ask for it. `stop_reason` is what ended the text: a stop string, or the id of one of
    `stop_token_ids`.
    """

    text: str
    token_ids: list[int]
    finish_reason: FinishReason
    logprobs: list[TokenLogprob] | None
    prompt_token_ids: list[int]
    prompt_logprobs: list[TokenLogprob] | None = None
    stats: RequestStats | None = field(default=None, compare=False)
    stop_reason: str | int | None = None

    @classmethod
    def of(cls, deltas: Sequence[Delta], prompt: list[int]) -> Self:
        """Merge all deltas of one candidate. Raises GenerationError if they end with an error or are incomplete."""
        whole = Delta.joined(deltas) if deltas else None
        if whole is None or whole.finish_reason is None or whole.error is not None:
            raise GenerationError(whole.error if whole and whole.error else "the request was aborted")
        return cls(
            whole.text,
            whole.token_ids,
            whole.finish_reason,
            whole.logprobs,
            prompt,
            whole.prompt_logprobs,
            whole.stats,
            whole.stop_reason,
        )
