"""Logits and each request's parameters -> one token a row.

The order of operations: log-probabilities are read off the raw logits; then repetition penalty, presence and
frequency penalty, logit bias, temperature, top-k, top-p over what top-k kept, min-p, and one draw from what is left.

A row's token depends on its own logits, parameters, seed and position only. So every reduction below runs along the
vocabulary, over a width that the row itself decides, and the draw inverts the cumulative distribution in the order
of the vocabulary at a number that `noise` makes from seed and position.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from llama_ray.generation.noise import uniforms
from llama_ray.generation.sampling import SamplingParams, TokenLogprob

_LEAST_WIDTH = 64
# A nucleus rarely holds more tokens than this, and finding so many is several times cheaper than sorting them all.
_NUCLEUS_WIDTH = 1024


class Row(Protocol):
    """What the sampler reads of a sequence. `seed` is drawn already where the request named none."""

    @property
    def params(self) -> SamplingParams: ...  # noqa: D102
    @property
    def prompt(self) -> Sequence[int]: ...  # noqa: D102
    @property
    def output(self) -> Sequence[int]: ...  # noqa: D102
    @property
    def seed(self) -> int: ...  # noqa: D102
    @property
    def index(self) -> int: ...  # noqa: D102


@dataclass(frozen=True, slots=True)
class Sample:
    """One row's outcome; `token_id` is None where the logits held NaN or infinity, so that nothing can be drawn."""

    token_id: int | None
    logprob: TokenLogprob | None


def sample(logits: Tensor, rows: Sequence[Row]) -> list[Sample]:
    """Logits [rows, vocab_size] of any dtype, which are left as they are -> one outcome for each row."""
    raw = logits.float()
    adjusted = raw
    for i, row in enumerate(rows):
        if changes_logits(row.params):
            adjusted = adjusted.clone() if adjusted is raw else adjusted
            adjust(adjusted[i], row)

    tokens = adjusted.argmax(-1)
    drawn = [i for i, row in enumerate(rows) if row.params.temperature > 0]
    if drawn:
        picked = adjusted if len(drawn) == len(rows) else adjusted[drawn]
        tokens[drawn] = _draw(picked, [rows[i] for i in drawn])

    # amax carries NaN through, so it is finite exactly where the row has neither NaN nor +inf nor only -inf.
    finite = raw.amax(-1).isfinite().tolist()
    chosen = [token if ok else None for token, ok in zip(tokens.tolist(), finite, strict=True)]
    logprobs = _logprobs(raw, chosen, rows)
    return [Sample(token, logprobs.get(i)) for i, token in enumerate(chosen)]


def changes_logits(params: SamplingParams) -> bool:
    """Whether a penalty or a bias is in force."""
    penalties = params.presence_penalty or params.frequency_penalty or params.repetition_penalty != 1
    return bool(penalties or params.logit_bias)


def adjust(logits: Tensor, row: Row) -> None:
    """Apply penalties and bias to one row's fp32 logits [vocab_size], in place; see `SamplingParams`."""
    params, device = row.params, logits.device
    if params.repetition_penalty != 1:
        seen = torch.unique(torch.tensor([*row.prompt, *row.output], device=device))
        values = logits[seen]
        factor = params.repetition_penalty
        logits[seen] = torch.where(values > 0, values / factor, values * factor)
    if (params.presence_penalty or params.frequency_penalty) and row.output:
        seen, count = torch.unique(torch.tensor(row.output, device=device), return_counts=True)
        logits[seen] -= params.presence_penalty + params.frequency_penalty * count
    if params.logit_bias:
        ids = torch.tensor(list(params.logit_bias), device=device)
        logits[ids] += torch.tensor(list(params.logit_bias.values()), dtype=torch.float32, device=device)


def filter_logits(logits: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """Temperature, top-k, top-p and min-p: fp32 [rows, vocab_size] -> the same, with -inf for what is filtered out.

    Each row is shifted so that its largest logit is 0, which changes no probability and keeps small temperatures
    from overflowing. Temperatures must be above 0. Every filter amounts to a least logit; tokens that are exactly
    as likely as the last one kept are kept too, as none of them has a better claim.
    """
    temperature = _column([p.temperature for p in params], logits).clamp_min(torch.finfo(torch.float32).tiny)
    logits = (logits - logits.amax(-1, keepdim=True)) / temperature
    if any(p.top_k or p.top_p < 1 for p in params):
        least = _least_kept(logits, params)
        logits = logits.masked_fill(logits < least, -math.inf)
    if any(p.min_p for p in params):
        share = _column([p.min_p for p in params], logits)
        logits = logits.masked_fill(logits < share.log(), -math.inf)  # log(0) is -inf: off
    return logits


def _draw(logits: Tensor, rows: Sequence[Row]) -> Tensor:
    """Logits [rows, vocab_size] -> int64 [rows]: the first token whose cumulative mass passes the row's number."""
    probabilities = filter_logits(logits, [row.params for row in rows]).softmax(-1)
    # A parallel sum may round so that the running total grows, or falls, where a probability is 0. With those
    # entries at 0 no such token can be drawn, and the largest total is one of a token that can.
    mass = probabilities.cumsum(-1).masked_fill(probabilities == 0, 0)
    noise = uniforms(
        [row.seed for row in rows],
        [row.index for row in rows],
        [len(row.prompt) + len(row.output) for row in rows],
    )
    # A number is at most 1 - 2^-24, so its product with the total rounds to less than the total: always a token.
    at = torch.from_numpy(noise).to(logits.device)[:, None] * mass.amax(-1, keepdim=True)
    return (mass > at).byte().argmax(-1)  # the first of the largest


def _least_kept(logits: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """The least logit that top-k and then top-p keep, [rows, 1]; -inf where neither is asked for."""
    vocab_size = logits.shape[-1]
    least = logits.new_full((len(params), 1), -math.inf)
    groups: dict[int, list[int]] = defaultdict(list)
    for i, p in enumerate(params):
        if 0 < p.top_k < vocab_size:
            # A power of two, so that rows with different k share a call, and the row's own, so that they may.
            groups[max(_LEAST_WIDTH, 1 << (p.top_k - 1).bit_length())].append(i)
        elif p.top_p < 1:
            groups[_NUCLEUS_WIDTH].append(i)
    for width, members in groups.items():
        least[members] = _least_of_group(logits[members], [params[i] for i in members], width)
    return least


def _least_of_group(logits: Tensor, params: Sequence[SamplingParams], width: int) -> Tensor:
    """As `_least_kept`, for rows that need about the `width` largest logits only."""
    vocab_size = logits.shape[-1]
    width = min(width, vocab_size)
    values = logits.topk(width).values if width < vocab_size else logits.sort(descending=True).values
    k = _column([p.top_k or vocab_size for p in params], logits).clamp_max(vocab_size)
    values = values.masked_fill(torch.arange(width, device=logits.device) >= k, -math.inf)
    total = torch.where(k < vocab_size, values.logsumexp(-1, True), logits.logsumexp(-1, True))
    mass = (values - total).exp().cumsum(-1)
    # A token is kept if those before it do not reach p. Mass 1 may be reached early by rounding: 1 means no limit.
    p = _column([q.top_p if q.top_p < 1 else math.inf for q in params], logits)
    before = mass.roll(1, -1)
    before[:, 0] = 0
    kept = (before < p) & (values > -math.inf)
    # At least one is kept, except where the logits are NaN; such a row is reported as failed later on.
    least = values.gather(-1, (kept.sum(-1, keepdim=True) - 1).clamp_min(0))
    short = (k >= vocab_size) & (mass[:, -1:] < p)
    if width < vocab_size and bool(short.any()):
        again = short[:, 0].nonzero()[:, 0].tolist()
        least[again] = _least_of_group(logits[again], [params[i] for i in again], vocab_size)
    return least


def _logprobs(raw: Tensor, tokens: Sequence[int | None], rows: Sequence[Row]) -> dict[int, TokenLogprob]:
    """What to report, by row, for the rows that asked."""
    reports = {}
    for i, (row, token) in enumerate(zip(rows, tokens, strict=True)):
        if row.params.logprobs is not None and token is not None:
            logprobs = raw[i].log_softmax(-1)
            top = logprobs.topk(min(row.params.logprobs, len(logprobs)))
            pairs = tuple(zip(top.indices.tolist(), top.values.tolist(), strict=True))
            reports[i] = TokenLogprob(token, logprobs[token].item(), pairs)
    return reports


def _column(values: Sequence[float], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device=like.device)[:, None]
