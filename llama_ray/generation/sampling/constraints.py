"""Output that must be JSON of a schema or match a regular expression, token by token (llguidance does the parsing)."""

from __future__ import annotations

import json
import threading
from collections import OrderedDict, defaultdict
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import torch
from llguidance import LLExecutor, LLMatcher, LLParserLimits, LLTokenizer
from numpy.typing import NDArray
from torch import Tensor

from llama_ray.data.tokenizer import Tokenizer
from llama_ray.generation.sampling.params import SamplingParams
from llama_ray.utils.integers import ceil_div

_CACHED = 64  # grammars; one is some hundred kilobytes
# Whitespace between the parts of JSON is free, but a model that falls into repeating it would never come to an end.
_JSON: dict[str, Any] = {"whitespace_pattern": r"[\x20\x0A\x0D\x09]{1,64}"}


class Constraint:
    """Which tokens may come next in one candidate. Made by `Grammars`; used by one thread at a time."""

    def __init__(self, matcher: LLMatcher) -> None:
        self.matcher = matcher

    def push(self, token: int) -> None:
        """Take the next token of the output, one that was allowed."""
        self.matcher.consume_token(token)

    @property
    def finished(self) -> bool:
        """Whether the output is complete and nothing but an end-of-text token could follow."""
        return bool(self.matcher.is_stopped())

    @property
    def error(self) -> str | None:
        """Why it cannot go on: no token spells what must follow, a limit of the parser, a token not allowed."""
        if not self.matcher.is_error():
            return None
        cause = _one_line(self.matcher.get_error().replace("<non-verbose/>", ""))
        return f"the output cannot go on as json_schema or regex want it: {cause}"


class Grammars:
    """Makes the constraints for one tokenizer and model. Grammars are compiled once and kept, the last 64.

    `vocab_size` is the model's: tokens that the tokenizer does not know are never allowed. `eos_ids` are those that
    may end an output. May be called from any thread.
    """

    def __init__(self, tokenizer: Tokenizer | None, vocab_size: int, eos_ids: Collection[int]) -> None:
        self._tokenizer, self._vocab_size = tokenizer, vocab_size
        self._eos_ids = sorted(e for e in eos_ids if e < vocab_size)
        self._lock = threading.Lock()
        self._compiled: OrderedDict[str, LLMatcher] = OrderedDict()
        self._backend: LLTokenizer | None = None

    def constraint(self, params: SamplingParams) -> Constraint | None:
        """A constraint at its beginning; None where `params` ask for none.

        Raises ValueError for a schema or expression that cannot be enforced, and where the model has no
        tokenizer or no token to end with.
        """
        if params.regex is None and params.json_schema is None:
            return None
        name = "json_schema" if params.regex is None else "regex"
        if self._tokenizer is None or not self._eos_ids:
            missing = "a tokenizer" if self._tokenizer is None else "an end-of-text token"
            raise ValueError(f"{name} needs a model with {missing}, and this one has none")
        if params.regex is not None:
            grammar = LLMatcher.grammar_from_regex(params.regex)
        else:
            schema = params.json_schema
            text = schema if isinstance(schema, str) else json.dumps(schema)
            grammar = LLMatcher.grammar_from_json_schema(text, defaults=_JSON)  # type: ignore[arg-type]
        with self._lock:
            known = self._compiled.get(grammar)
            if known is None:
                known = self._compile(name, grammar, self._tokenizer)
                self._compiled[grammar] = known
                if len(self._compiled) > _CACHED:
                    self._compiled.popitem(last=False)
            self._compiled.move_to_end(grammar)
            return Constraint(known.deep_copy())

    def _compile(self, name: str, grammar: str, tokenizer: Tokenizer) -> LLMatcher:
        if self._backend is None:
            try:
                self._backend = LLTokenizer(
                    tokenizer.to_json(), n_vocab=self._vocab_size, eos_token=self._eos_ids
                )
            except ValueError as e:
                raise ValueError(f"{name} cannot be enforced with this tokenizer: {_one_line(str(e))}") from e
        limits = LLParserLimits(verbose_errors=False)
        matcher = LLMatcher(self._backend, grammar, log_level=0, limits=limits)
        if matcher.is_error():
            raise ValueError(f"{name} cannot be enforced: {_one_line(matcher.get_error())}")
        return matcher


class TokenMasks:
    """The tokens that a batch's constraints allow, for all of its constrained rows at once."""

    def __init__(self) -> None:
        self._executor: LLExecutor | None = None
        self._additive: dict[torch.device, Tensor] = {}

    def allowed(
        self, constraints: Sequence[Constraint], drafts: Sequence[Sequence[int]], vocab_size: int
    ) -> NDArray[np.uint8]:
        """Bits by token id, least significant first, uint8 [rows, 4 * ceil(vocab_size / 32)].

        Row i is for the place after `drafts[i]` of `constraints[i]`, whose state stays as it is. What is allowed
        after a draft that is not allowed means nothing: no token that is drawn there can be used.
        """
        places = [0] * len(constraints)
        chains: dict[int, list[tuple[list[int], int]]] = defaultdict(list)
        plain: list[tuple[LLMatcher, int]] = []
        drafted: list[tuple[LLMatcher, int, list[int]]] = []
        size = 0
        # One walk along a draft passes the places of all its beginnings.
        for i in sorted(range(len(constraints)), key=lambda i: -len(drafts[i])):
            draft, walks = list(drafts[i]), chains[id(constraints[i])]
            start = next((start for walk, start in walks if walk[: len(draft)] == draft), size)
            places[i] = start + len(draft)
            if start == size:
                matcher = constraints[i].matcher
                matcher = matcher.deep_copy() if walks else matcher  # walks run at the same time
                if draft:
                    drafted.append((matcher, start, draft))
                else:
                    plain.append((matcher, start))
                walks.append((draft, start))
                size += len(draft) + 1
        bits = np.full((size, ceil_div(vocab_size, 32)), 0xFFFFFFFF, dtype=np.uint32)
        if self._executor is None:
            self._executor = LLExecutor()
        where = (bits.ctypes.data, bits.strides[0], size)
        if plain:
            self._executor.unsafe_compute_mask_ptr(plain, *where)
        if drafted:
            self._executor.unsafe_compute_mask_ptr_with_draft_token(drafted, *where)
        return bits.view(np.uint8)[places]

    def apply(self, logits: Tensor, rows: Tensor, allowed: NDArray[np.uint8]) -> None:
        """Set the logits fp32 [_, vocab_size] of `rows` to -inf, in place, where `allowed` has no bit."""
        device = logits.device
        if device not in self._additive:
            # Eight logits at once: what to add to them, for each value of a byte.
            bits = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little")
            table = torch.zeros(256, 8).masked_fill_(torch.from_numpy(bits) == 0, -torch.inf)
            self._additive[device] = table.to(device)
        bytes_ = torch.from_numpy(allowed).to(device).int()
        addends = torch.nn.functional.embedding(bytes_, self._additive[device])
        logits[rows] += addends.view(len(rows), -1)[:, : logits.shape[-1]]


def forbid_tokens(allowed: NDArray[np.uint8], tokens: Collection[int]) -> None:
    """Take `tokens` from the allowed ones of one row, uint8 [bytes], in place, unless nothing were left."""
    kept = allowed.copy()
    for token in tokens:
        kept[token // 8] &= ~np.uint8(1 << token % 8)
    if kept.any():
        allowed[:] = kept


def _one_line(message: str, limit: int = 300) -> str:
    line = " ".join(message.split())
    return line if len(line) <= limit else line[: limit - 3] + "..."
