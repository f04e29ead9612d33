"""One token a row out of logits: temperature, top-k, top-p, min-p, and a draw at a given number.

A row's outcome must not depend on the rows beside it, nor on how many there are. Sums of floats do: a device splits
them according to the shape of the whole. So probabilities become whole numbers here, in units of 2^-36 of the most
probable token's, and are added in fp64, where sums below 2^53 are exact and thus the same in any order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llama_ray.generation.candidates import TopCandidates
from llama_ray.generation.sampling import SamplingParams

UNITS = 2.0**36
_BLOCK = 128
_CHUNK = 16  # rows: what is in work at once fits the processor's cache
_LEAST_WIDTH = 64
# A nucleus rarely holds more tokens than this, and finding so many is several times cheaper than sorting them all.
_NUCLEUS_WIDTH = 1024


def candidates_needed(params: SamplingParams, vocab_size: int) -> int:
    """How many of the most probable tokens a row looks at; 0 if it draws from the whole vocabulary.

    A power of two, so that rows with different `top_k` share a call, and the row's own, so that they may.
    """
    if 0 < params.top_k < vocab_size:
        return min(max(_LEAST_WIDTH, 1 << (params.top_k - 1).bit_length()), vocab_size)
    return min(_NUCLEUS_WIDTH, vocab_size) if params.top_p < 1 else 0


@dataclass(frozen=True)
class Filters:
    """The parameters of some rows, as columns [rows, 1] on the logits' device, and how many candidates they need."""

    width: int
    temperature: Tensor
    beyond_k: Tensor
    """bool [rows, width]: candidates that top-k leaves out."""
    from_all: Tensor
    """bool [rows, 1]: whether top-p counts the mass of the whole vocabulary, there being no top-k."""
    top_p: Tensor
    log_min_p: Tensor | None

    def may_be_short(self, vocab_size: int) -> bool:
        """Whether so many candidates may not hold all of a nucleus."""
        return self.width == _NUCLEUS_WIDTH and self.width < vocab_size

    @classmethod
    def of(
        cls, params: Sequence[SamplingParams], width: int, vocab_size: int, device: torch.device
    ) -> Filters:
        """Those of `params`, whose temperatures must be above 0, for draws from `width` candidates (0: from all)."""
        tiny = torch.finfo(torch.float32).tiny  # below it 0 / temperature could be 0 / 0
        k = _column([p.top_k or vocab_size for p in params], torch.int64, device)
        # A mass of 1 may be reached early by rounding: 1 means no limit.
        top_p = [p.top_p if p.top_p < 1 else math.inf for p in params]
        log_min_p = [math.log(p.min_p) if p.min_p else -math.inf for p in params]
        return cls(
            width,
            _column([max(p.temperature, tiny) for p in params], torch.float32, device),
            torch.arange(width, device=device) >= k,
            k >= vocab_size,
            _column(top_p, torch.float64, device),
            _column(log_min_p, torch.float32, device) if any(p.min_p for p in params) else None,
        )


DrawFiltered = Callable[[Tensor, Filters, Tensor], tuple[Tensor, Tensor | None]]
"""Draws rows of logits fp32 [rows, vocab_size] from their `Filters.width` most probable tokens at noise fp64 [rows, 1].

The noise is in [0, 1). Returns the tokens, int64 [rows], and where the width may not hold all of a nucleus, a mask
[rows] of those where it does not: they must be drawn again, from more. Every filter keeps a beginning of the
candidates, and the token is the first whose cumulative mass passes the row's number.
"""


def draw_filtered(
    logits: Tensor, filters: Filters, noise: Tensor, top_candidates: TopCandidates
) -> tuple[Tensor, Tensor | None]:
    """`DrawFiltered` in plain torch, on any device."""
    width = filters.width
    values, ids = top_candidates(logits, width)
    shifted = (values - values[:, :1]).div_(filters.temperature)
    mass = shifted.exp().mul_(UNITS).round_().masked_fill_(filters.beyond_k, 0)
    running = mass.cumsum(-1, dtype=torch.float64)
    total, short = running[:, -1:], None
    if filters.may_be_short(logits.shape[-1]):
        # Rows with as large a top-k share this width; their mass is that of what top-k kept.
        everything = total_mass(logits, values[:, :1], filters.temperature)
        total = torch.where(filters.from_all, everything, total)
        short = (filters.from_all & (running[:, -1:] < filters.top_p * total))[:, 0]
    kept = (running - mass) < filters.top_p * total  # those before it do not reach p
    if filters.log_min_p is not None:
        kept &= shifted >= filters.log_min_p
    at = noise * (mass * kept).sum(-1, keepdim=True, dtype=torch.float64)
    # A number is at most 1 - 2^-24, so its product with the mass stays below the mass: always a token that is kept.
    place = (running <= at).sum(-1, keepdim=True)
    return ids.gather(-1, place)[:, 0], short


def draw_from_all(logits: Tensor, rows: Tensor | None, filters: Filters, noise: Tensor) -> Tensor:
    """Draw `rows` (None: all) of logits fp32 [_, vocab_size] from the whole vocabulary -> int64 [len(rows)].

    `filters` and `noise` hold one entry for each of `rows`. Tokens are passed in the order of their ids.
    """
    tokens = []
    for some in _chunks(noise):
        chunk = logits[some] if rows is None else logits[rows[some]]
        shifted = (chunk - chunk.amax(-1, keepdim=True)).div_(filters.temperature[some])
        if filters.log_min_p is not None:
            shifted.masked_fill_(shifted < filters.log_min_p[some], -math.inf)
        tokens.append(_draw(shifted.exp_().mul_(UNITS).round_(), noise[some]))
    return tokens[0] if len(tokens) == 1 else torch.cat(tokens)


def _draw(mass: Tensor, noise: Tensor) -> Tensor:
    """The first token whose cumulative mass passes the row's number: first its block, then its place in it."""
    blocks = _blocks(mass)
    masses = blocks.sum(-1, dtype=torch.float64)
    running = masses.cumsum(-1)
    at = noise * running[:, -1:]
    # Rows that hold NaN count up to 0 here: they are reported as failed, but must not lead out of the vocabulary.
    block = (running <= at).sum(-1, keepdim=True)
    at = at - (running - masses).gather(-1, block)
    inside = blocks[torch.arange(len(blocks), device=blocks.device), block[:, 0]]
    place = (inside.cumsum(-1, dtype=torch.float64) <= at).sum(-1)
    return block[:, 0] * _BLOCK + place


def _chunks(rows: Tensor) -> Iterator[slice]:
    step = _CHUNK if rows.device.type == "cpu" else max(len(rows), 1)
    return (slice(start, start + step) for start in range(0, len(rows), step))


def total_mass(logits: Tensor, top: Tensor, temperature: Tensor) -> Tensor:
    """The sum of exp((logits - top) / temperature) in `UNITS`, fp64 [rows, 1]; `top` are the largest [rows, 1]."""
    parts = []
    for some in _chunks(top):
        mass = (logits[some] - top[some]).div_(temperature[some]).exp_().mul_(UNITS).round_()
        parts.append(_blocks(mass).sum(-1, dtype=torch.float64).sum(-1, keepdim=True))
    return torch.cat(parts)


def argmax(logits: Tensor) -> Tensor:
    """The first of the largest logits of each row, int64 [rows]; several times faster on a CPU than torch's."""
    vocab_size = logits.shape[-1]
    if logits.device.type != "cpu" or vocab_size % _BLOCK:
        return logits.argmax(-1)
    blocks = _blocks(logits)
    block = blocks.amax(-1).argmax(-1)
    inside = blocks[torch.arange(len(blocks)), block]
    return block * _BLOCK + inside.argmax(-1)


def _blocks(x: Tensor) -> Tensor:
    """[rows, vocab_size] -> [rows, blocks, _BLOCK], with zeros at the end."""
    if x.shape[-1] % _BLOCK:
        x = torch.nn.functional.pad(x, (0, -x.shape[-1] % _BLOCK))
    return x.view(len(x), -1, _BLOCK)


def _column(values: Sequence[float], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=dtype, device=device)[:, None]
