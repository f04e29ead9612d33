"""Sampling parameters of a request, and the log-probabilities that it gets back."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray

from llama_ray.generation.constraints.text import regex_text, schema_text
from llama_ray.utils.fields import Limits, check_fields, limits, shown

MAX_LOGPROBS = 20
MAX_N = 128
MAX_STOP_STRINGS, MAX_STOP_CHARACTERS, MAX_STOP_TOKEN_IDS = 16, 1000, 128
MAX_LOGIT_BIAS, MAX_BAD_WORDS, MAX_PROMPT_LOGPROBS_NEXT = 1024, 128, 128
"""All of these cost time at every token of every candidate."""
MAX_ALLOWED_TOKEN_IDS = 2**18
"""The largest vocabularies."""
_TOKEN_ID = Limits(least=0)
# So large that it forbids a token or leaves no other one, and so small that no sum of logits overflows.
_BIAS = Limits(least=-1e30, most=1e30)


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How the tokens of one request are chosen, and when its generation ends.

    Raises ValueError if a value is out of range or of another type, if `json_schema` is not a JSON object, and if
    `json_schema`, `regex` and `ignore_eos` are combined.

    Args:
        max_tokens: Limit of new tokens; with 0 the prompt is computed, and nothing is generated.
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
        stop: A string or up to 16, of 1 to 1000 characters; generation ends where one would appear, and the text ends
            before it.
        stop_token_ids: Up to 128 token ids that end the generation as an end-of-text token does; the text ends before
            them.
        repetition_penalty: Positive logits of tokens in prompt and output are divided by it, negative ones multiplied,
            so that above 1 they become less likely; 0.001 to 1000, and 1 is off (Keskar et al. 2019, arXiv:1909.05858).
        presence_penalty: Subtracted from the logits of tokens in the output, as in OpenAI's API; -2 to 2, and 0 is off.
        frequency_penalty: Subtracted once for each occurrence of a token in the output; -2 to 2, and 0 is off.
        include_stop_str_in_output: Whether the text ends after what ended it, not before.
        logit_bias: Token id -> what is added to its logit, -1e30 to 1e30; up to 1024 of them.
        allowed_token_ids: The only token ids that may be generated, at least one; None allows all. Ends of text are
            tokens, too.
        bad_words: A text or up to 128, of 1 to 1000 characters: the output never completes the tokens that one of them
            is encoded as, at the beginning of a text or after a space. Other tokens may spell it all the same.
        logprobs: Report the natural log-probability of each sampled token and of this many most probable ones (0 to
            20); None reports nothing. They are of the raw logits, before anything above.
        prompt_logprobs: The same for the prompt's own tokens, from the second on, each with its rank.
        prompt_logprobs_start: The position in the prompt, from 1, of the first token to report; what is before it may
            come from the cache of prefixes, and costs no logits.
        prompt_logprobs_next: Up to 128 token ids; each is reported after the prompt's own tokens, as the one that would
            follow the prompt.
        json_schema: The output is JSON that this schema (a dict, or JSON text) allows; `{"type": "object"}` allows any
            JSON object. A run of whitespace has at most 64 characters.
        regex: The whole output matches this expression (Rust's syntax: no look-around, no back-references).
        n: Independent completions of the prompt, 1 to 128; the first one is that of `n=1`.
        ignore_eos: Continue after an end-of-text token; not with `json_schema` or `regex`, which end with one.
    """

    max_tokens: int = field(default=16, metadata=limits(0))
    min_tokens: int = field(default=0, metadata=limits(0))
    temperature: float = field(default=1.0, metadata=limits(0))
    top_k: int = field(default=0, metadata=limits(0))
    top_p: float = field(default=1.0, metadata=limits(above=0, most=1))
    min_p: float = field(default=0.0, metadata=limits(0, 1))
    seed: int | None = field(default=None, metadata=limits(-(2**63), 2**64 - 1))
    stop: str | tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    include_stop_str_in_output: bool = False
    repetition_penalty: float = field(default=1.0, metadata=limits(0.001, 1000))
    presence_penalty: float = field(default=0.0, metadata=limits(-2, 2))
    frequency_penalty: float = field(default=0.0, metadata=limits(-2, 2))
    logit_bias: Mapping[int, float] | None = None
    allowed_token_ids: tuple[int, ...] | None = None
    bad_words: str | tuple[str, ...] = ()
    logprobs: int | None = field(default=None, metadata=limits(0, MAX_LOGPROBS))
    prompt_logprobs: int | None = field(default=None, metadata=limits(0, MAX_LOGPROBS))
    prompt_logprobs_start: int = field(default=1, metadata=limits(1))
    prompt_logprobs_next: tuple[int, ...] = ()
    json_schema: Mapping[str, Any] | str | None = None
    regex: str | None = None
    n: int = field(default=1, metadata=limits(1, MAX_N))
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        check_fields(self)
        _check(
            "min_tokens",
            self.min_tokens,
            self.min_tokens <= self.max_tokens,
            f"at most max_tokens, {self.max_tokens}",
        )
        self._check_stops()
        self._check_allowed()
        _check_ids("prompt_logprobs_next", self.prompt_logprobs_next, MAX_PROMPT_LOGPROBS_NEXT)
        self._check_bias()
        self._check_constraint()

    def _check_stops(self) -> None:
        _check_texts("stop", self.stop, MAX_STOP_STRINGS, "empty")
        _check_ids("stop_token_ids", self.stop_token_ids, MAX_STOP_TOKEN_IDS)

    def _check_allowed(self) -> None:
        _check_texts("bad_words", self.bad_words, MAX_BAD_WORDS, "blank")
        if (allowed := self.allowed_token_ids) is not None:
            _check_ids("allowed_token_ids", allowed, MAX_ALLOWED_TOKEN_IDS)
            _check("allowed_token_ids", allowed, len(allowed) > 0, "at least one token id, or None")

    def _check_bias(self) -> None:
        bias = self.logit_bias
        if bias is None:
            return
        _check("logit_bias", bias, isinstance(bias, Mapping), "token ids with what to add to their logits")
        _check_number("logit_bias", "entries", len(bias), MAX_LOGIT_BIAS)
        for token, value in bias.items():
            _TOKEN_ID.check("logit_bias has a token id that", token, int)
            _BIAS.check(f"logit_bias[{token}]", value, float)

    def _check_constraint(self) -> None:
        if not self.constrained:
            return
        if self.json_schema is not None and self.regex is not None:
            raise ValueError("json_schema and regex are both given; give one of them")
        if self.ignore_eos:
            name = "regex" if self.json_schema is None else "json_schema"
            raise ValueError(f"ignore_eos is True; it must be False with {name}, which ends the output")
        # Raises ValueError for what no grammar can be made of.
        _ = self.grammar

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """Return the parameters that a JSON object holds: it has no tuples, and its keys are strings.

        Raises TypeError for names that are no parameters, and ValueError as the class does.
        """
        given: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}
        if isinstance(bias := given.get("logit_bias"), dict):
            given["logit_bias"] = {token_id(key): value for key, value in bias.items()}
        return cls(**given)

    @property
    def constrained(self) -> bool:
        """Whether `json_schema` or `regex` limits the output."""
        return self.json_schema is not None or self.regex is not None

    @cached_property
    def bias(self) -> tuple[NDArray[np.int64], NDArray[np.float32]] | None:
        """`logit_bias` as token ids and what to add to their logits; None if it is empty."""
        if not self.logit_bias:
            return None
        return np.array([*self.logit_bias], dtype=np.int64), np.array(
            [*self.logit_bias.values()], dtype=np.float32
        )

    @cached_property
    def grammar(self) -> tuple[Literal["json_schema", "regex"], str] | None:
        """What limits the output, as text; None if nothing does."""
        if self.regex is not None:
            return "regex", regex_text(self.regex)
        return None if self.json_schema is None else ("json_schema", schema_text(self.json_schema))

    @cached_property
    def allowed(self) -> NDArray[np.int64] | None:
        """`allowed_token_ids` as an array."""
        ids = self.allowed_token_ids
        return None if ids is None else np.array([*ids], dtype=np.int64)

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """`stop` as a tuple, even if it is a single string."""
        return _texts(self.stop)

    @property
    def bad_word_strings(self) -> tuple[str, ...]:
        """`bad_words` as a tuple, even if it is a single string."""
        return _texts(self.bad_words)


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Natural log-probabilities at one position: of its token, and of the most probable ones.

    `top` holds (token id, log-probability) pairs, most probable first, as many as the request asked for; the token
    itself need not be among them. `rank` is the token's own place among all of the vocabulary, 1 for the most probable;
    only tokens of a prompt have one.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]
    rank: int | None = None


def token_id(key: Any) -> Any:
    """Return the token id that a key of a JSON object stands for, in plain digits; any other key unchanged."""
    # Python also takes "1_0", " 1" and digits of other scripts for integers.
    return int(key) if isinstance(key, str) and re.fullmatch("0|[1-9][0-9]{0,18}", key) else key


def _texts(value: str | Sequence[str]) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else tuple(value)


def _check_texts(name: str, value: Any, most: int, unusable: Literal["empty", "blank"]) -> None:
    texts = _texts(value) if isinstance(value, (str, tuple, list)) else (None,)
    usable = all(isinstance(text, str) and (text if unusable == "empty" else text.strip()) for text in texts)
    _check(name, value, usable, f"a string or several, none of them {unusable}")
    _check_number(name, "strings", len(texts), most)
    longest = max((len(text) for text in texts if text), default=0)
    _check_number(name, "characters in one string", longest, MAX_STOP_CHARACTERS)


def _check_ids(name: str, ids: Any, most: int) -> None:
    _check(name, ids, isinstance(ids, Collection) and not isinstance(ids, str), "token ids")
    _check_number(name, "entries", len(ids), most)
    # There may be as many as a vocabulary has.
    if all(type(token) is int for token in ids) and min(ids, default=0) >= 0 and max(ids, default=0) < 2**31:
        return
    for token in ids:
        _TOKEN_ID.check(f"{name} has a token id that", token, int)


def _check(name: str, value: object, ok: bool, allowed: str) -> None:
    if not ok:
        raise ValueError(f"{name} is {shown(value)}; it must be {allowed}")


def _check_number(name: str, what: str, number: int, most: int) -> None:
    if number > most:
        raise ValueError(f"{name} has {number:,} {what}; it must have at most {most:,}")
