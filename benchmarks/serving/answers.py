"""Answers of the endpoint, compared with what the engine alone gives for the version that they name."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import torch

from benchmarks.serving.load import Load, Measured, Outcome
from benchmarks.serving.registered import Registered
from llama_ray import Engine, SamplingParams
from serve_app.replica.logprobs import LogprobWriter


@dataclass(frozen=True)
class Answer:
    """The text of an answer, its tokens, and their log-probabilities."""

    text: str
    tokens: list[str]
    logprobs: list[float | None]


@dataclass(frozen=True)
class Verdict:
    """What clients saw in some time: requests, how many failed, how many answers are not those of one version, the
    longest gap within a stream and the longest wait for its beginning; `quiet_gap_s` is the gap without disturbances.
    """

    requests: int = 0
    failed: int = 0
    wrong: int = 0
    gap_s: float = 0.0
    quiet_gap_s: float = 0.0
    first_s: float = 0.0
    tokens_per_s: float = 0.0
    versions: Counter[str] = field(default_factory=Counter)

    def joined(self, other: Verdict, *, disturbed: bool = True) -> Verdict:
        """Return both together, without the rate; only a disturbed one counts for the longest times."""
        joined = Verdict(
            self.requests + other.requests,
            self.failed + other.failed,
            self.wrong + other.wrong,
            self.gap_s,
            self.quiet_gap_s,
            self.first_s,
            versions=self.versions + other.versions,
        )
        if not disturbed:
            return replace(joined, quiet_gap_s=max(self.quiet_gap_s, other.gap_s))
        return replace(joined, gap_s=max(self.gap_s, other.gap_s), first_s=max(self.first_s, other.first_s))

    def __str__(self) -> str:
        versions = ", ".join(f"{count} by {ref}" for ref, count in sorted(self.versions.items()))
        return (
            f"{self.requests} requests ({versions}), {self.failed} failed, {self.wrong} wrong, "
            f"{self.tokens_per_s:,.0f} tok/s, longest gap {self.gap_s:.2f} s, first token {self.first_s:.2f} s"
        )


class Answers:
    """Knows what each version answers to the prompts of `load`."""

    def __init__(self, model: Registered, load: Load) -> None:
        assert load.prompts is not None
        self._load, self._prompts = load, load.prompts
        self._expected = {
            model.version(i + 1): self._answers(str(directory))
            for i, directory in enumerate(model.directories)
        }

    def _answers(self, directory: str) -> list[Answer]:
        torch.set_num_threads(1)
        engine = Engine.from_pretrained(directory)
        assert engine.tokenizer is not None
        params = SamplingParams(max_tokens=self._load.new_tokens, ignore_eos=True, **self._load.fields)
        prompts = [self._load.prompt(i) for i in range(self._prompts)]
        answers = []
        for prompt, completion in zip(prompts, engine.generate(prompts, params), strict=True):
            logprobs = LogprobWriter(engine.tokenizer, prompt, False, top=0).write(completion.logprobs or [])
            answers.append(Answer(completion.text, logprobs.tokens, logprobs.token_logprobs))
        return answers

    def expected(self, ref: str, number: int) -> Answer:
        """Return what the version `ref` answers to request `number`."""
        return self._expected[ref][number % self._prompts]

    def compare(self, measured: Measured) -> Verdict:
        """Return what clients saw; the first failed request and the first wrong answer are printed."""
        failed = [o for o in measured.outcomes if o.error is not None]
        wrong = [o for o in measured.outcomes if o.error is None and self._difference(o) is not None]
        for what, outcomes in (("failed", failed), ("wrong", wrong)):
            if outcomes:
                first = outcomes[0]
                print(f"  request {first.number} {what}: {first.error or self._difference(first)}")
        good = [o for o in measured.outcomes if o.arrivals]
        return Verdict(
            requests=len(measured.outcomes),
            failed=len(failed),
            wrong=len(wrong),
            gap_s=max((b - a for o in good for a, b in pairwise(o.arrivals)), default=0.0),
            first_s=max((o.arrivals[0] - o.due for o in good), default=0.0),
            tokens_per_s=sum(o.tokens for o in measured.outcomes) / measured.seconds,
            versions=Counter(o.version for o in measured.outcomes if o.version is not None),
        )

    def _difference(self, outcome: Outcome) -> str | None:
        """Return how an answer differs from that of the version which it names, or None."""
        events = [json.loads(event) for event in outcome.events]
        named = {event["system_fingerprint"] for event in events} | {outcome.version}
        if len(named) != 1:
            return f"it names {sorted(map(str, named))}"
        expected = self.expected(str(named.pop()), outcome.number)
        got = _answer(events)
        if got == expected and outcome.tokens == self._load.new_tokens:
            return None
        same = next(
            (i for i, (a, b) in enumerate(zip(got.tokens, expected.tokens, strict=False)) if a != b), None
        )
        if same is None:
            lengths = f"{len(got.tokens)} tokens, usage says {outcome.tokens}, of {len(expected.tokens)}"
            return f"its tokens are right ({lengths}), its text or log-probabilities are not"
        return f"token {same} is {got.tokens[same]!r}, not {expected.tokens[same]!r} ({outcome.version})"


def _answer(events: list[dict[str, Any]]) -> Answer:
    choices = [choice for event in events for choice in event["choices"]]
    logprobs = [choice["logprobs"] for choice in choices if choice["logprobs"]]
    return Answer(
        "".join(choice["text"] for choice in choices),
        [token for part in logprobs for token in part["tokens"]],
        [value for part in logprobs for value in part["token_logprobs"]],
    )
