"""One candidate completion on its way: its tokens, its text, and when it ends."""

from __future__ import annotations

from collections.abc import Collection
from collections.abc import Sequence as Ids
from dataclasses import dataclass
from typing import Literal

from llama_ray.generation.constraints import Constraint
from llama_ray.generation.penalties import TokenCounts
from llama_ray.generation.sampler import NOT_FINITE, Sample
from llama_ray.generation.sampling import SamplingParams, TokenLogprob
from llama_ray.generation.text import TextOutput

FinishReason = Literal["stop", "length", "error"]


@dataclass(frozen=True, slots=True)
class Delta:
    """What one step, or several that were taken together, added to candidate `index` of a request.

    `text` may be empty although there are tokens: bytes of a character, or the beginning of a stop string, wait for
    what follows. All texts of a candidate together are its completion's text. `token_ids` include an end-of-text
    token and those of a stop string, though the text does not. `logprobs` has an entry for each token, or is
    None where the request did not ask. `finish_reason` is set on the last delta of the candidate: "stop"
    (end-of-text or stop token, stop string, or the end of what `regex` or `json_schema` allow), "length"
    (`max_tokens`), or "error" with the cause in `error`.
    """

    request_id: int
    index: int
    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprob] | None
    finish_reason: FinishReason | None
    error: str | None = None

    def __add__(self, later: Delta) -> Delta:
        """Both deltas of one candidate as one."""
        logprobs = None
        if self.logprobs is not None or later.logprobs is not None:
            logprobs = (self.logprobs or []) + (later.logprobs or [])
        return Delta(
            self.request_id,
            self.index,
            self.text + later.text,
            self.token_ids + later.token_ids,
            logprobs,
            later.finish_reason,
            later.error,
        )


class Sequence:
    """The state of one candidate. `slot` is the cache row it holds while it runs."""

    def __init__(
        self,
        request_id: int,
        index: int,
        prompt: Ids[int],
        params: SamplingParams,
        seed: int,
        text: TextOutput,
        eos_ids: Collection[int],
        constraint: Constraint | None = None,
    ) -> None:
        self.request_id, self.index = request_id, index
        self.prompt, self.output = prompt, list[int]()
        self.params, self.seed = params, seed
        self.slot: int | None = None
        self.draft: Ids[int] = ()
        self.end_ids = frozenset([*(() if params.ignore_eos else eos_ids), *params.stop_token_ids])
        self.counts = TokenCounts.of(params, prompt)
        self.constraint = constraint
        self._text = text

    def append(self, sample: Sample) -> Delta:
        """Take the token that was sampled. Where none could be, the sequence ends with an error."""
        if sample.token_id is None:
            return self._delta("", [], None, "error", sample.error or NOT_FINITE)
        token = sample.token_id
        self.output.append(token)
        if self.counts is not None:
            self.counts.push(token)
        at_end = token in self.end_ids
        text, stopped = ("", False) if at_end else self._text.push(token)
        if self.constraint is not None and not at_end:
            self.constraint.push(token)
            at_end = self.constraint.finished and self.constraint.error is None
        done = at_end or len(self.output) >= self.params.max_tokens
        if done and not stopped:
            rest, stopped = self._text.finish()
            text += rest
        finish: FinishReason | None = "stop" if at_end or stopped else "length" if done else None
        return self._delta(text, [token], sample.logprob, finish)

    def _delta(
        self,
        text: str,
        token_ids: list[int],
        logprob: TokenLogprob | None,
        finish: FinishReason | None,
        error: str | None = None,
    ) -> Delta:
        logprobs = None if logprob is None else [logprob]
        return Delta(self.request_id, self.index, text, token_ids, logprobs, finish, error)
