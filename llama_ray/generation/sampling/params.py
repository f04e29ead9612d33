"""Sampling parameters of a request, and the log-probabilities that it gets back."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

MAX_LOGPROBS = 20
MAX_N = 128


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How the tokens of one request are chosen, and when its generation ends.

    Raises ValueError if a value is out of range, if `json_schema` is not a JSON object, and if `json_schema`, `regex`
    and `ignore_eos` are combined.

    Args:
        max_tokens: Limit of new tokens, at least 1.
        min_tokens: Until this many tokens are generated (0 to max_tokens), end-of-text and stop tokens are not sampled,
            and a stop string must end after them to count. An output that `json_schema` or `regex` makes complete ends
            all the same.
        temperature: Divides the logits; 0 is greedy: the most probable token, without randomness.
        top_k: Keep the k most probable tokens, lower ids first among equals; 0 keeps all.
        top_p: Keep the most probable tokens that together reach this probability, of what top-k kept; above 0, and 1
            keeps all (Holtzman et al. 2020, arXiv:1904.09751).
        min_p: Keep tokens with at least this share of the most probable token's probability, from 0, which keeps all,
            to 1 (arXiv:2407.01082).
        seed: The same seed (-2^63 to 2^64 - 1) gives the same tokens; None draws a seed at submission.
        stop: A string or several, none empty; generation ends where one would appear, and the text ends before it.
        stop_token_ids: Token ids that end the generation as an end-of-text token does; the text ends before them.
        repetition_penalty: Positive logits of tokens in prompt and output are divided by it, negative ones multiplied,
            so that above 1 they become less likely; above 0, and 1 is off (Keskar et al. 2019, arXiv:1909.05858).
        presence_penalty: Subtracted from the logits of tokens in the output, as in OpenAI's API; -2 to 2, and 0 is off.
        frequency_penalty: Subtracted once for each occurrence of a token in the output; -2 to 2, and 0 is off.
        logit_bias: Token id -> a finite number that is added to its logit.
        logprobs: Report the natural log-probability of each sampled token and of this many most probable ones (0 to
            20); None reports nothing. They are of the raw logits, before anything above.
        prompt_logprobs: The same for the prompt's own tokens, from the second on.
        json_schema: The output is JSON that this schema (a dict, or JSON text) allows; `{"type": "object"}` allows any
            JSON object. A run of whitespace has at most 64 characters.
        regex: The whole output matches this expression (Rust's syntax: no look-around, no back-references).
        n: Independent completions of the prompt, 1 to 128; the first one is that of `n=1`.
        ignore_eos: Continue after an end-of-text token; not with `json_schema` or `regex`, which end with one.
    """

    max_tokens: int = 16
    min_tokens: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    stop: str | tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    json_schema: Mapping[str, Any] | str | None = None
    regex: str | None = None
    n: int = 1
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        _check("max_tokens", self.max_tokens, self.max_tokens >= 1, "at least 1")
        in_range = 0 <= self.min_tokens <= self.max_tokens
        _check("min_tokens", self.min_tokens, in_range, f"0 (off) to max_tokens, {self.max_tokens}")
        _check("temperature", self.temperature, 0 <= self.temperature < math.inf, "0 (greedy) or above")
        _check("top_k", self.top_k, self.top_k >= 0, "0 (off) or above")
        _check("top_p", self.top_p, 0 < self.top_p <= 1, "above 0 and at most 1 (off)")
        _check("min_p", self.min_p, 0 <= self.min_p <= 1, "between 0 (off) and 1")
        if self.seed is not None:
            _check("seed", self.seed, -(2**63) <= self.seed < 2**64, "-2^63 to 2^64 - 1")
        usable = all(isinstance(s, str) and s for s in self.stop_strings)
        _check("stop", repr(self.stop), usable, "a string or several, none of them empty")
        for token in self.stop_token_ids:
            is_id = isinstance(token, int) and token >= 0
            _check("stop_token_ids", self.stop_token_ids, is_id, "token ids, integers from 0 on")
        penalty = self.repetition_penalty
        _check("repetition_penalty", penalty, 0 < penalty < math.inf, "above 0 (1 is off)")
        for name in ("presence_penalty", "frequency_penalty"):
            _check(name, getattr(self, name), -2 <= getattr(self, name) <= 2, "between -2 and 2")
        for token, bias in (self.logit_bias or {}).items():
            _check(f"logit_bias[{token}]", bias, math.isfinite(bias), "a finite number")
        for name in ("logprobs", "prompt_logprobs"):
            number = getattr(self, name)
            if number is not None:
                _check(name, number, 0 <= number <= MAX_LOGPROBS, f"0 to {MAX_LOGPROBS}")
        self._check_constraint()
        _check("n", self.n, 1 <= self.n <= MAX_N, f"1 to {MAX_N}")

    def _check_constraint(self) -> None:
        if not self.constrained:
            return
        if self.json_schema is not None and self.regex is not None:
            raise ValueError("json_schema and regex are both given; give one of them")
        if self.ignore_eos:
            name = "regex" if self.json_schema is None else "json_schema"
            raise ValueError(f"ignore_eos is True; it must be False with {name}, which ends the output")
        if self.json_schema is not None:
            _check_schema(self.json_schema)

    @property
    def constrained(self) -> bool:
        """Whether `json_schema` or `regex` limits the output."""
        return self.json_schema is not None or self.regex is not None

    @property
    def grammar(self) -> tuple[Literal["json_schema", "regex"], str] | None:
        """What limits the output, as text; None if nothing does."""
        if self.regex is not None:
            return "regex", self.regex
        if self.json_schema is None:
            return None
        schema = self.json_schema
        return "json_schema", schema if isinstance(schema, str) else json.dumps(schema)

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """`stop` as a tuple, even if it is a single string."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Natural log-probabilities at one position: of its token, and of the most probable ones.

    `top` holds (token id, log-probability) pairs, most probable first, as many as the request asked for; the token
    itself need not be among them.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]


def _check(name: str, value: object, ok: bool, allowed: str) -> None:
    if not ok:
        raise ValueError(f"{name} is {value}; it must be {allowed}")


def _check_schema(schema: Mapping[str, Any] | str) -> None:
    try:
        value = json.loads(schema if isinstance(schema, str) else json.dumps(schema))
    except (TypeError, ValueError) as error:
        raise ValueError(f"json_schema is {schema!r:.80}; it must be JSON: {error}") from error
    _check("json_schema", value, isinstance(value, dict), 'a JSON object, such as {"type": "object"}')
