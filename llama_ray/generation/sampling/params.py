"""What a request may ask of sampling, and what it gets told about the probabilities."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

MAX_LOGPROBS = 20
MAX_N = 128


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How the tokens of one request are chosen. A value out of range raises ValueError.

    - `max_tokens`: at most so many new tokens.
    - `min_tokens`: no end-of-text or stop token before there are so many, and no stop string counts before it is
      completed by one after them; an output that a constraint has completed ends nevertheless.
    - `temperature`: logits are divided by it; 0 is greedy (the most probable token, no randomness).
    - `top_k`: keep the k most probable tokens, of equally probable ones those with lower ids; 0 keeps all.
    - `top_p`: keep the most probable tokens that together reach this mass (Holtzman et al. 2020, arXiv:1904.09751).
    - `min_p`: keep tokens with at least this share of the most probable one's probability (arXiv:2407.01082).
    - `seed`: the same seed gives the same tokens; None draws one when the request is submitted.
    - `stop`: a string or several; generation ends where one would appear, and the text ends before it.
    - `stop_token_ids`: token ids that end the generation as an end-of-text token does; the text ends before them.
    - `repetition_penalty`: above 1 makes tokens of prompt and output less likely (Keskar et al. 2019,
      arXiv:1909.05858): positive logits are divided by it, negative ones multiplied.
    - `presence_penalty`, `frequency_penalty`: subtracted from the logits of tokens of the output, once, and once
      for each occurrence, as in OpenAI's API.
    - `logit_bias`: token id -> what is added to its logit.
    - `logprobs`: report the sampled token's log-probability and those of the so many most probable ones (0 to 20);
      None reports nothing. They come from the logits as the model gave them, before any of the above.
    - `prompt_logprobs`: the same for the prompt's own tokens, from the second on.
    - `json_schema`: the output is JSON that this schema allows (a dict or a JSON string); `{"type": "object"}` is
      any JSON object. Runs of whitespace are limited to 64 characters.
    - `regex`: the output as a whole matches this expression (Rust's syntax: no look-around, no back-references).
    - `n`: so many independent completions of the same prompt (1 to 128); the first is that of `n=1`.
    - `ignore_eos`: go on after an end-of-text token; excludes `json_schema` and `regex`, which end with one.
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
        fits = 0 <= self.min_tokens <= self.max_tokens
        _check("min_tokens", self.min_tokens, fits, f"0 (off) to max_tokens, {self.max_tokens}")
        _check("temperature", self.temperature, 0 <= self.temperature < math.inf, "0 (greedy) or above")
        _check("top_k", self.top_k, self.top_k >= 0, "0 (off) or above")
        _check("top_p", self.top_p, 0 < self.top_p <= 1, "above 0 and at most 1 (off)")
        _check("min_p", self.min_p, 0 <= self.min_p <= 1, "between 0 (off) and 1")
        if self.seed is not None:
            _check("seed", self.seed, -(2**63) <= self.seed < 2**64, "a 64-bit integer")
        whole = all(isinstance(s, str) and s for s in self.stop_strings)
        _check("stop", self.stop, whole, "strings that are not empty")
        for token in self.stop_token_ids:
            _check("stop_token_ids", self.stop_token_ids, isinstance(token, int) and token >= 0, "token ids")
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
        if self.json_schema is None and self.regex is None:
            return
        if self.json_schema is not None and self.regex is not None:
            raise ValueError("json_schema and regex are both given; give one of them")
        if self.ignore_eos:
            name = "regex" if self.json_schema is None else "json_schema"
            raise ValueError(
                f"ignore_eos is True; it must be False with {name}, which ends the output itself"
            )
        if self.json_schema is not None:
            _check_schema(self.json_schema)

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """`stop` as a tuple, also where a single string was given."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Natural log-probabilities at one position: the token that was taken, and the most probable ones.

    `top` holds (token id, log-probability) pairs, most probable first, as many as the request asked for; the
    taken token need not be among them.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]


def _check(name: str, value: object, fits: bool, allowed: str) -> None:
    if not fits:
        raise ValueError(f"{name} is {value}; it must be {allowed}")


def _check_schema(schema: Mapping[str, Any] | str) -> None:
    try:
        value = json.loads(schema if isinstance(schema, str) else json.dumps(schema))
    except (TypeError, ValueError) as e:
        raise ValueError(f"json_schema is not JSON: {e}") from e
    _check("json_schema", value, isinstance(value, dict), 'a JSON object, such as {"type": "object"}')
