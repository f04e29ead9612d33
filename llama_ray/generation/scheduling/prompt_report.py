"""The log-probabilities of a prompt's own tokens, collected chunk by chunk."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

from llama_ray.generation.sampling.params import SamplingParams, TokenLogprob


class PromptReport:
    """The log-probabilities that a request asked for, of its prompt from `start` on, and of what may follow it.

    All candidates of the request share one report: whichever computes a token first adds it, and what is computed again
    after a preemption is not reported again.
    """

    def __init__(self, wanted: int | None, start: int = 1) -> None:
        """Collect so many entries; None: no report was asked for, or another engine has given it."""
        self._wanted = wanted or 0
        self._start = start
        self._entries: list[TokenLogprob] | None = None if wanted is None else []

    @classmethod
    def of(cls, params: SamplingParams, prompt: Sequence[int]) -> Self:
        """Return the report that a request with these parameters asks for."""
        start = min(params.prompt_logprobs_start, len(prompt))
        wanted = len(prompt) - start + len(params.prompt_logprobs_next)
        return cls(None if params.prompt_logprobs is None else wanted, start)

    @property
    def next(self) -> int:
        """The position of the next token to report: in the prompt, or behind it in `prompt_logprobs_next`."""
        return self._start + len(self._entries or ())

    @property
    def complete(self) -> bool:
        """Whether nothing is missing, as if nothing was asked for."""
        return len(self._entries or ()) == self._wanted

    @property
    def entries(self) -> list[TokenLogprob] | None:
        """The whole report, a new list; None if it is incomplete or was not asked for."""
        return list(self._entries) if self._entries is not None and self.complete else None

    def add(self, position: int, logprob: TokenLogprob) -> None:
        """Add the entry of the token at `position`, as `next` counts them, unless it is there already."""
        if self._entries is not None and position == self.next:
            self._entries.append(logprob)
