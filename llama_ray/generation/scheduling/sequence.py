"""The state of one candidate completion while it is generated, and the deltas that report its progress."""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

from llama_ray.generation.adapters.active import Adapter
from llama_ray.generation.constraints.grammar import Constraint, Ending
from llama_ray.generation.sampling.bad_words import BadWords
from llama_ray.generation.sampling.params import SamplingParams, TokenLogprob
from llama_ray.generation.sampling.penalties import TokenCounts
from llama_ray.generation.sampling.sampler import NOT_FINITE, Sample
from llama_ray.generation.scheduling.prompt_report import PromptReport
from llama_ray.generation.scheduling.text import TextOutput
from llama_ray.generation.stats import RequestStats

_log = logging.getLogger(__name__)

FinishReason = Literal["stop", "length", "constraint", "error"]


@dataclass(frozen=True, slots=True)
class Delta:
    """What one step, or several merged ones, added to candidate `index` of a request.

    `text` may be empty although there are tokens: incomplete characters and possible beginnings of a stop string are
    held back. The texts of all deltas together are the completion's text. `token_ids` include an end-of-text token and
    the tokens of a stop string, which the text leaves out. `logprobs` has an entry for each token, or is None if the
    request did not ask for them; `prompt_logprobs`, as far as it asked for them, come with the first delta.
    `finish_reason` is set on the candidate's last delta, with its `stats`: "stop" (end-of-text or stop token, stop
    string, or a complete match of `regex` or `json_schema`), "length" (`max_tokens`), "constraint" (the output cannot
    go on as `regex` or `json_schema` want it, or finding out how exceeds the limits of a step, or `allowed_token_ids`
    and `bad_words` leave no token), or "error" with the cause in `error`. `stop_reason` is the string or the id of the
    token, one of `stop_token_ids`, that ended it. `cached_tokens`, those of the prompt that were not computed, come
    with the first delta.
    """

    request_id: int
    index: int
    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprob] | None
    finish_reason: FinishReason | None
    error: str | None = None
    prompt_logprobs: list[TokenLogprob] | None = None
    stats: RequestStats | None = None
    stop_reason: str | int | None = None
    cached_tokens: int = 0

    @classmethod
    def joined(cls, deltas: Sequence[Delta]) -> Delta:
        """Merge deltas of one candidate, which are in order."""
        first, last = deltas[0], deltas[-1]
        logprobs = None if first.logprobs is None else [p for d in deltas for p in d.logprobs or ()]
        return cls(
            first.request_id,
            first.index,
            "".join([d.text for d in deltas]),
            [t for d in deltas for t in d.token_ids],
            logprobs,
            last.finish_reason,
            last.error,
            first.prompt_logprobs,
            last.stats,
            last.stop_reason,
            first.cached_tokens,
        )

    def __add__(self, later: Delta) -> Delta:
        """Merge with a later delta of the same candidate."""
        return Delta.joined((self, later))


class SequenceState:
    """One candidate: its tokens, its text, its blocks, and when it ends.

    `tokens` are prompt and output; keys and values of the first `computed` tokens are in `blocks`, of which `reused`
    tokens were taken from other sequences. A candidate with a `leader` starts from the leader's computed prompt if
    `max_num_seqs` allows it; until then it is one of the leader's `followers`. A candidate that `resume` has given the
    output of another engine goes on after it, and never reports a token or a text twice.
    """

    draft: Sequence[int] = ()
    """See `row.Row`: a sequence itself has no draft tokens."""

    def __init__(
        self,
        index: int,
        prompt: Sequence[int],
        params: SamplingParams,
        text: TextOutput,
        eos_ids: Collection[int],
        constraint: Constraint | None = None,
        leader: SequenceState | None = None,
        bad_words: BadWords | None = None,
        adapter: Adapter | None = None,
    ) -> None:
        self.index = index
        self.request_id = self.seed = 0
        # Candidates of a request share what none of them changes.
        self.prompt: list[int] = leader.prompt if leader else list(prompt)
        self.output: list[int] = []
        self.tokens = list(prompt)
        self.params = params
        self.leader, self.followers = leader, list[SequenceState]()
        self.arrival = 0
        self.running = False
        self.blocks: list[int] = []
        # Of the full blocks that were published.
        self.digests: list[bytes] = []
        self.computed = self.reused = self.draft_computed = 0
        self.prompt_report: PromptReport = (
            PromptReport.of(params, prompt) if leader is None else leader.prompt_report
        )
        self.stats = RequestStats(arrived=time.monotonic(), prompt_tokens=len(prompt))
        self.end_ids: frozenset[int] = (
            leader.end_ids
            if leader
            else frozenset([*(() if params.ignore_eos else eos_ids), *params.stop_token_ids])
        )
        self.counts = TokenCounts.of(params, prompt)
        self.constraint, self.bad_words, self.adapter = constraint, bad_words, adapter
        self._text = text
        self._eos_ids: Collection[int] = () if params.ignore_eos else eos_ids
        self._ended: FinishReason | None = None
        self._stop_reason: str | int | None = None

    def arrive(self, request_id: int, seed: int) -> None:
        """Become a candidate of request `request_id`, whose noise depends on `seed`; its time begins now."""
        self.request_id, self.seed = request_id, seed
        self.stats.arrived = time.monotonic()

    def start(self, now: float) -> None:
        """Note that the first step that computes it begins `now`."""
        self.stats.started = now
        self.stats.reused_tokens = min(self.reused, len(self.prompt))

    def resume(self, output: Sequence[int]) -> None:
        """Take the tokens, at least one, that another engine has generated and reported, each with its text.

        Raises ValueError if they go on after the token that ends the candidate.
        """
        self.prompt_report = PromptReport(None)
        for position, token in enumerate(output, 1):
            _, self._ended = self._take(token)
            if self.ended and position < len(output):
                raise ValueError(
                    f"candidate {self.index} is done to token {len(output)}; it must be at most {position}, which ends "
                    "it; leave out what follows"
                )

    @property
    def ended(self) -> bool:
        """Whether the tokens that `resume` took end the candidate, so that only the reason is left to report."""
        return self._ended is not None

    def end(self) -> Delta:
        """Return the last delta of a candidate that has `ended`."""
        return self._delta("", [], None if self.params.logprobs is None else [], self._ended)

    @property
    def cache_seed(self) -> bytes:
        """What its keys and values depend on beside its tokens: the parent of its first block's digest."""
        return b"" if self.adapter is None else self.adapter.digest

    @property
    def remaining(self) -> int:
        """Number of tokens to compute before the next one can be sampled."""
        return len(self.tokens) - self.computed

    @property
    def tokens_left(self) -> int:
        """Number of tokens that may still be generated."""
        return self.params.max_tokens - len(self.output)

    @property
    def reusable(self) -> Sequence[int]:
        """The tokens of which all but the last may come from the cache; those to report need their logits."""
        return self.tokens if self.prompt_report.complete else self.tokens[: self.prompt_report.next]

    def reported_token(self, position: int) -> int:
        """Return the token that `prompt_report` counts as number `position`."""
        behind = position - len(self.prompt)
        return self.prompt[position] if behind < 0 else self.params.prompt_logprobs_next[behind]

    def append(self, samples: Sequence[Sample]) -> Delta:
        """Append sampled tokens, in order, until the sequence ends; a sample without a token ends it.

        The output of a constrained sequence is complete or not when its constraint says so: at the next sample.
        """
        texts: list[str] = []
        token_ids: list[int] = []
        logprobs: list[TokenLogprob] | None = None if self.params.logprobs is None else []
        finish: FinishReason | None = None
        # All candidates of a request report its prompt, with their first delta.
        prompt_logprobs, cached_tokens = (
            (None, 0) if self.output else (self.prompt_report.entries, self.stats.reused_tokens)
        )
        for sample in samples:
            if sample.ending is not None or (not self.tokens_left and not sample.error):
                text, finish = self._end(sample.ending)
                texts.append(text)
                break
            if sample.token_id is None:
                reason = sample.error or NOT_FINITE
                return self._delta("".join(texts), token_ids, logprobs, "error", reason)
            text, finish = self._take(sample.token_id)
            texts.append(text)
            token_ids.append(sample.token_id)
            if logprobs is not None and sample.logprob is not None:
                logprobs.append(sample.logprob)
            if finish is not None:
                break
        return self._delta("".join(texts), token_ids, logprobs, finish, None, prompt_logprobs, cached_tokens)

    def fail(self, reason: str) -> Delta:
        """End the sequence with an error."""
        return self._delta("", [], [] if self.params.logprobs is not None else None, "error", reason)

    def _take(self, token: int) -> tuple[str, FinishReason | None]:
        self.output.append(token)
        self.tokens.append(token)
        if self.counts is not None:
            self.counts.push(token)
        at_end = token in self.end_ids
        named = at_end and token not in self._eos_ids
        shown = not at_end or (named and self.params.include_stop_str_in_output)
        text, stop = self._text.push(token) if shown else ("", None)
        if self.constraint is not None and not at_end:
            self.constraint.push(token)
        done = at_end or (not self.tokens_left and self.constraint is None)
        if done and not stop:
            rest, stop = self._text.finish()
            text += rest
        self._stop_reason = token if named else stop
        return text, "stop" if at_end or stop else "length" if done else None

    def _end(self, ending: Ending | None) -> tuple[str, FinishReason]:
        """End without a further token, as the constraint wants it or (None) because there are `max_tokens`."""
        text, self._stop_reason = self._text.finish()
        if self._stop_reason or (ending is not None and ending.reason is None):
            return text, "stop"
        if not self.tokens_left:
            return text, "length"
        _log.warning(
            "request %d ends: its output cannot go on: %s", self.request_id, ending and ending.reason
        )
        return text, "constraint"

    def _delta(
        self,
        text: str,
        token_ids: list[int],
        logprobs: list[TokenLogprob] | None,
        finish: FinishReason | None,
        error: str | None = None,
        prompt_logprobs: list[TokenLogprob] | None = None,
        cached_tokens: int = 0,
    ) -> Delta:
        now = time.monotonic()
        self.stats.count(len(token_ids), now)
        if finish is not None:
            self.stats.finished = now
        stats = self.stats if finish is not None else None
        return Delta(
            self.request_id,
            self.index,
            text,
            token_ids,
            logprobs,
            finish,
            error,
            prompt_logprobs,
            stats,
            self._stop_reason,
            cached_tokens,
        )
