"""The log-probabilities of a prompt's own tokens, collected chunk by chunk."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

from llama_ray.generation.sampling.params import SamplingParams, TokenLogprob


class PromptReport:
    """The log-probabilities that a request asked for of its prompt's tokens, from the second on.

    All candidates of the request share one report: whichever computes a token first adds it, and what is computed again
    after a preemption is not reported again.
    """

    def __init__(self, wanted: int | None) -> None:
        """Collect so many entries; None: no report was asked for, or another engine has given it."""
        self._wanted = wanted or 0
        self._entries: list[TokenLogprob] | None = None if wanted is None else []

    @classmethod
    def of(cls, params: SamplingParams, prompt: Sequence[int]) -> Self:
        """Return the report that a request with these parameters asks for."""
        return cls(None if params.prompt_logprobs is None else len(prompt) - 1)

    @property
    def reported(self) -> int:
        """Number of entries so far, and so the position whose logits predict the next token to report."""
        return len(self._entries or ())

    @property
    def complete(self) -> bool:
        """Whether nothing is missing, as if nothing was asked for."""
        return self.reported == self._wanted

    @property
    def entries(self) -> list[TokenLogprob] | None:
        """The whole report, a new list; None if it is incomplete or was not asked for."""
        return list(self._entries) if self._entries is not None and self.complete else None

    def add(self, position: int, logprob: TokenLogprob) -> None:
        """Add the entry of the prompt's token number `position`, from 1 on, unless it is there already."""
        if self._entries is not None and position == self.reported + 1:
            self._entries.append(logprob)
