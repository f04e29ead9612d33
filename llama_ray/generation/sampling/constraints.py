"""Constrained output: JSON of a schema, or a regular expression. llguidance parses; this module makes token masks."""

from __future__ import annotations

import json
import threading
from collections import OrderedDict, defaultdict
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llama_ray.data.tokenizer import Tokenizer
from llama_ray.generation.sampling.params import SamplingParams
from llama_ray.utils.integers import ceil_div

if TYPE_CHECKING:
    # Imported where it is used: engines without constrained output, as on bare GPU machines, do not need the package.
    from llguidance import LLExecutor, LLMatcher, LLTokenizer

# A compiled grammar takes some hundred kilobytes.
_MAX_CACHED_GRAMMARS = 64
# JSON allows any amount of whitespace between its parts, but a model that begins to repeat it might never end.
_JSON_DEFAULTS: dict[str, Any] = {"whitespace_pattern": r"[\x20\x0A\x0D\x09]{1,64}"}


class Constraint:
    """Tracks which tokens may come next in one candidate. `Grammars` makes it; use it from one thread at a time."""

    def __init__(self, matcher: LLMatcher) -> None:
        self.matcher = matcher

    def push(self, token: int) -> None:
        """Advance by the next token of the output; a token that is not allowed sets `error`."""
        self.matcher.consume_token(token)

    @property
    def finished(self) -> bool:
        """Whether the output is complete, so that only an end-of-text token may follow."""
        return bool(self.matcher.is_stopped())

    @property
    def error(self) -> str | None:
        """Why the output cannot continue, or None.

        Reasons: no token spells what must follow, a limit of the parser, or a pushed token that was not allowed.
        """
        if not self.matcher.is_error():
            return None
        cause = _one_line(self.matcher.get_error().replace("<non-verbose/>", ""))
        return f"the output cannot go on as json_schema or regex want it: {cause}"


class Grammars:
    """Makes constraints for one tokenizer and model, and caches the 64 grammars that were used last.

    `vocab_size` is the model's; ids that the tokenizer does not know are never allowed. `eos_ids` are the tokens that
    may end an output. Safe to call from any thread.
    """

    def __init__(self, tokenizer: Tokenizer | None, vocab_size: int, eos_ids: Collection[int]) -> None:
        self._tokenizer, self._vocab_size = tokenizer, vocab_size
        self._eos_ids = sorted(eos_ids)
        self._lock = threading.Lock()
        self._compiled: OrderedDict[str, LLMatcher] = OrderedDict()
        self._backend: LLTokenizer | None = None

    def constraint(self, params: SamplingParams) -> Constraint | None:
        """Return a constraint for an empty output; None if `params` have neither `json_schema` nor `regex`.

        Raises ValueError if the schema or expression cannot be enforced, and if the model has no tokenizer or no
        end-of-text token.
        """
        if params.regex is None and params.json_schema is None:
            return None
        name = "json_schema" if params.regex is None else "regex"
        if self._tokenizer is None or not self._eos_ids:
            missing = "a tokenizer" if self._tokenizer is None else "an end-of-text token"
            raise ValueError(f"{name} needs a model with {missing}, and this one has none")
        try:
            from llguidance import LLMatcher
        except ImportError as error:
            raise ValueError(f"{name} needs the package llguidance; pip install llguidance") from error
        if params.regex is not None:
            grammar = LLMatcher.grammar_from_regex(params.regex)
        else:
            schema = params.json_schema
            text = schema if isinstance(schema, str) else json.dumps(schema)
            grammar = LLMatcher.grammar_from_json_schema(text, defaults=_JSON_DEFAULTS)  # type: ignore[arg-type]
        with self._lock:
            matcher = self._compiled.get(grammar)
            if matcher is None:
                matcher = self._compile(name, grammar, self._tokenizer)
                self._compiled[grammar] = matcher
                if len(self._compiled) > _MAX_CACHED_GRAMMARS:
                    self._compiled.popitem(last=False)
            self._compiled.move_to_end(grammar)
            return Constraint(matcher.deep_copy())

    def _compile(self, name: str, grammar: str, tokenizer: Tokenizer) -> LLMatcher:
        from llguidance import LLMatcher, LLParserLimits, LLTokenizer

        if self._backend is None:
            try:
                self._backend = LLTokenizer(
                    tokenizer.to_json(self._vocab_size), n_vocab=self._vocab_size, eos_token=self._eos_ids
                )
            except ValueError as error:
                cause = _one_line(str(error))
                raise ValueError(f"{name} cannot be enforced with this tokenizer: {cause}") from error
        limits = LLParserLimits(verbose_errors=False)
        matcher = LLMatcher(self._backend, grammar, log_level=0, limits=limits)
        if matcher.is_error():
            raise ValueError(f"{name} cannot be enforced: {_one_line(matcher.get_error())}")
        return matcher


class TokenMasks:
    """Computes and applies masks of allowed tokens for all constrained rows of a batch at once."""

    def __init__(self) -> None:
        self._executor: LLExecutor | None = None
        self._additive: dict[torch.device, Tensor] = {}

    def allowed(
        self, constraints: Sequence[Constraint], drafts: Sequence[Sequence[int]], vocab_size: int
    ) -> NDArray[np.uint8]:
        """Return bitmasks by token id, least significant bit first, uint8 [rows, 4 * ceil(vocab_size / 32)].

        Row i is for the position after `drafts[i]` of `constraints[i]`, whose state does not change. After a draft
        that is itself not allowed the mask is arbitrary: no token drawn there is ever accepted.
        """
        mask_rows = [0] * len(constraints)
        walks_of: dict[int, list[tuple[list[int], int]]] = defaultdict(list)
        plain: list[tuple[LLMatcher, int]] = []
        drafted: list[tuple[LLMatcher, int, list[int]]] = []
        size = 0
        # One walk along a draft yields the masks of all its prefixes, so longer drafts come first.
        for i in sorted(range(len(constraints)), key=lambda i: -len(drafts[i])):
            draft, walks = list(drafts[i]), walks_of[id(constraints[i])]
            start = next((start for walk, start in walks if walk[: len(draft)] == draft), size)
            mask_rows[i] = start + len(draft)
            if start == size:
                matcher = constraints[i].matcher
                # Walks run in parallel, so each needs its own state.
                matcher = matcher.deep_copy() if walks else matcher
                if draft:
                    drafted.append((matcher, start, draft))
                else:
                    plain.append((matcher, start))
                walks.append((draft, start))
                size += len(draft) + 1
        bits = np.full((size, ceil_div(vocab_size, 32)), 0xFFFFFFFF, dtype=np.uint32)
        if self._executor is None:
            from llguidance import LLExecutor

            self._executor = LLExecutor()
        target = (bits.ctypes.data, bits.strides[0], size)
        if plain:
            self._executor.unsafe_compute_mask_ptr(plain, *target)
        if drafted:
            self._executor.unsafe_compute_mask_ptr_with_draft_token(drafted, *target)
        return bits.view(np.uint8)[mask_rows]

    def apply(self, logits: Tensor, rows: Tensor, allowed: NDArray[np.uint8]) -> None:
        """Set logits fp32 [_, vocab_size] of `rows` to -inf, in place, where the bit in `allowed` is 0."""
        device = logits.device
        if device not in self._additive:
            # For each value of a byte, what to add to the eight logits that it stands for.
            bits = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little")
            table = torch.zeros(256, 8).masked_fill_(torch.from_numpy(bits) == 0, -torch.inf)
            self._additive[device] = table.to(device)
        bytes_ = torch.from_numpy(allowed).to(device).int()
        addends = torch.nn.functional.embedding(bytes_, self._additive[device])
        logits[rows] += addends.view(len(rows), -1)[:, : logits.shape[-1]]


def forbid_tokens(allowed: NDArray[np.uint8], tokens: Collection[int]) -> None:
    """Clear the bits of `tokens` in one row's mask, uint8 [bytes], in place, unless that would clear all of it."""
    kept = allowed.copy()
    for token in tokens:
        kept[token // 8] &= ~np.uint8(1 << token % 8)
    if kept.any():
        allowed[:] = kept


def _one_line(message: str, limit: int = 300) -> str:
    line = " ".join(message.split())
    return line if len(line) <= limit else line[: limit - 3] + "..."
