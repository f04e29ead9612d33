"""Sample one token for each row of a batch, on the logits' device, each row by its own parameters.

In this order: log-probabilities are read off the raw logits; then repetition penalty, presence and frequency penalty,
logit bias, forbidden tokens, temperature, top-k, top-p over what top-k kept, min-p, and one draw from what is left. The
draw's noise is keyed by (seed, candidate, position, token).

A row's token depends only on its own logits, parameters, seed and position; `draw.py` says how.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from llama_ray.generation.constraints.grammar import Constraint, Ending
from llama_ray.generation.constraints.waiting import Patience
from llama_ray.generation.sampling.draw import TORCH_OPS, SamplerOps, SamplingTensors, argmax
from llama_ray.generation.sampling.logprobs import token_logprobs
from llama_ray.generation.sampling.masks import TokenMasks, forbid_tokens
from llama_ray.generation.sampling.metadata import RowGroup, SamplingMetadata
from llama_ray.generation.sampling.params import TokenLogprob
from llama_ray.generation.sampling.row import Row, below_min_tokens
from llama_ray.utils.integers import ceil_div

NOT_FINITE = (
    "the model's logits are not finite (its numbers overflowed or its weights hold NaN); "
    "try dtype bfloat16 or float32"
)
_NOTHING_LEFT = "allowed_token_ids, bad_words and what else limits it leave no token"
_REDRAW = -1


@dataclass(frozen=True, slots=True)
class Sample:
    """One row's outcome: a token, an error, or the ending that the row's constraint makes.

    None of them if the row's mask has not come yet: then the same position is sampled again in a later step.
    """

    token_id: int | None
    logprob: TokenLogprob | None
    error: str | None = None
    ending: Ending | None = None

    @property
    def pending(self) -> bool:
        """Whether the row's mask has not come yet."""
        return self.token_id is None and self.error is None and self.ending is None


_PENDING = Sample(None, None)


class Sampler:
    """Samples batch after batch, and keeps the batch's `SamplingMetadata` while its rows stay the same.

    Use it from one thread at a time.
    """

    def __init__(self, ops: SamplerOps = TORCH_OPS) -> None:
        self._ops = ops
        self._masks, self._patience = TokenMasks(), Patience()
        self._metadata: SamplingMetadata | None = None

    @torch.inference_mode()
    def sample(self, logits: Tensor, rows: Sequence[Row]) -> list[Sample]:
        """Return one outcome per row for logits [rows, vocab_size] of any dtype, which are overwritten."""
        logits = logits.float().contiguous()
        if self._metadata is None or not self._metadata.matches(logits, rows):
            self._metadata = SamplingMetadata(logits, rows)
        metadata = self._metadata
        # Not finite if the row holds NaN or +inf, or -inf only.
        largest = logits.amax(-1)
        raw = logits[metadata.logprob_index] if metadata.logprob_rows else None
        without_token = self._adjust(logits, rows, metadata)
        keys = None if metadata.greedy else metadata.noise_keys(rows)
        tokens: list[int] = self._draw(logits, metadata.groups, keys).tolist()
        finite = [math.isfinite(value) for value in largest.tolist()]
        if keys is not None:
            again = [i for i, token in enumerate(tokens) if token == _REDRAW and finite[i]]
            if again:
                self._redraw(logits, rows, keys, again, tokens)
        samples = [
            Sample(token, None) if ok else Sample(None, None, NOT_FINITE)
            for token, ok in zip(tokens, finite, strict=True)
        ]
        for i, sample in without_token.items():
            # A step that overflowed is an error, whatever the constraint says.
            if finite[i]:
                samples[i] = sample
        if raw is not None:
            self._report(raw, rows, metadata.logprob_rows, samples)
        return samples

    def _adjust(self, logits: Tensor, rows: Sequence[Row], metadata: SamplingMetadata) -> dict[int, Sample]:
        """Apply penalties, bias and masks to the logits in place; return rows that can have no token."""
        if metadata.penalties is not None:
            counts = [(rows[i].counts, rows[i].draft) for i in metadata.penalty_rows]
            metadata.penalties.apply(logits, [c.after(draft) for c, draft in counts if c is not None])
        if metadata.bias is not None:
            flat, values = metadata.bias
            logits.view(-1)[flat] += values
        if metadata.min_tokens_rows:
            ends = {i: rows[i].end_ids for i in metadata.min_tokens_rows if below_min_tokens(rows[i])}
            _forbid(logits, ends)
        if metadata.allowed is not None:
            self._masks.apply(logits, *metadata.allowed)
        if metadata.bad_words_rows:
            words = [(i, rows[i].bad_words) for i in metadata.bad_words_rows]
            _forbid(logits, {i: b.completing(rows[i].output, rows[i].draft) for i, b in words if b})
        without_token = self._constrain(logits, rows, metadata) if metadata.constraint_rows else {}
        if metadata.narrowed_rows:
            for i in _without_any(logits, metadata.narrowed_rows):
                without_token.setdefault(i, Sample(None, None, ending=Ending(_NOTHING_LEFT)))
        return without_token

    def _constrain(
        self, logits: Tensor, rows: Sequence[Row], metadata: SamplingMetadata
    ) -> dict[int, Sample]:
        """Forbid in place what the rows' constraints do not allow; return rows that can have no token."""
        constrained = [(i, c, rows[i].draft) for i in metadata.constraint_rows if (c := rows[i].constraint)]
        drafts: dict[Constraint, Sequence[int]] = {}
        for _, constraint, draft in constrained:
            drafts[constraint] = max(drafts.get(constraint, ()), draft, key=len)
        self._patience.wait(drafts, alone=len(constrained) == len(rows))
        allowed = np.full((len(constrained), ceil_div(logits.shape[-1], 32) * 4), 0xFF, dtype=np.uint8)
        without_token = {}
        for (i, constraint, draft), bits in zip(constrained, allowed, strict=True):
            outcome = constraint.outcome(draft)
            if outcome is None:
                without_token[i] = _PENDING
            elif isinstance(outcome, Ending):
                without_token[i] = Sample(None, None, ending=outcome)
            else:
                bits[:] = outcome
                if below_min_tokens(rows[i]):
                    forbid_tokens(bits, rows[i].end_ids)
        self._masks.apply(logits, metadata.constraint_index, torch.from_numpy(allowed).to(logits.device))
        return without_token

    def _draw(self, logits: Tensor, groups: Sequence[RowGroup], keys: Tensor | None) -> Tensor:
        """Return tokens int64 [rows]; `_REDRAW` for rows that must be drawn from more candidates."""
        if len(groups) == 1:
            return self._draw_group(logits, groups[0], keys)
        tokens = torch.empty(len(logits), dtype=torch.int64, device=logits.device)
        for group in groups:
            tokens[group.rows] = self._draw_group(logits, group, keys)
        return tokens

    def _draw_group(self, logits: Tensor, group: RowGroup, keys: Tensor | None) -> Tensor:
        rows, tensors = group.rows, group.tensors
        if tensors is None or keys is None:
            return argmax(logits if rows is None else logits[rows])
        if rows is not None:
            keys = keys[rows]
        if not tensors.width:
            return self._ops.draw_from_all(logits, rows, tensors, keys)
        tokens, short = self._ops.draw_filtered(logits if rows is None else logits[rows], tensors, keys)
        return tokens if short is None else tokens.masked_fill(short, _REDRAW)

    def _redraw(
        self, logits: Tensor, rows: Sequence[Row], keys: Tensor, again: list[int], tokens: list[int]
    ) -> None:
        """Replace the tokens of rows `again`, whose nuclei exceed the candidates looked at: draw from all tokens."""
        vocab_size = logits.shape[-1]
        tensors = SamplingTensors.of([rows[i].params for i in again], vocab_size, vocab_size, logits.device)
        drawn, _ = self._ops.draw_filtered(logits[again], tensors, keys[again])
        for i, token in zip(again, drawn.tolist(), strict=True):
            tokens[i] = token

    def _report(self, raw: Tensor, rows: Sequence[Row], reported: list[int], samples: list[Sample]) -> None:
        """Add log-probabilities, of the raw logits, to the samples of the `reported` rows."""
        tokens = [samples[i].token_id or 0 for i in reported]
        numbers = [rows[i].params.logprobs or 0 for i in reported]
        reports = token_logprobs(raw, tokens, numbers, self._ops.top_candidates)
        for i, report in zip(reported, reports, strict=True):
            if samples[i].token_id is not None:
                samples[i] = Sample(report.token_id, report)


def _forbid(logits: Tensor, forbidden: Mapping[int, Collection[int]]) -> None:
    """Set logits to -inf in place: those of some tokens of some rows."""
    vocab_size = logits.shape[-1]
    flat = [
        i * vocab_size + token for i, tokens in forbidden.items() for token in tokens if token < vocab_size
    ]
    if flat:
        logits.view(-1)[torch.tensor(flat, device=logits.device)] = -torch.inf


def _without_any(logits: Tensor, rows: Sequence[int]) -> list[int]:
    """Return those of `rows` that have no token left; their logits become 0, so that one can be drawn."""
    largest = logits[torch.tensor(rows, device=logits.device)].amax(-1).tolist()
    empty = [i for i, value in zip(rows, largest, strict=True) if value == -math.inf]
    if empty:
        logits[torch.tensor(empty, device=logits.device)] = 0
    return empty
