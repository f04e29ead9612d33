"""One token a row out of logits: temperature, top-k, top-p, min-p, and a draw.

The draw is a race: every token runs for an exponentially distributed time, divided by its mass, and the first one in
is drawn, which each is with a probability in proportion to its mass (the Gumbel-max trick, as in Maddison, Tarlow and
Minka 2014, arXiv:1411.0030, in another form). Times belong to a place and a token, so two models that think alike draw
alike there, which guesses of a draft model live on: if the cumulative mass were inverted, half as many would be right.

A row's outcome must not depend on the rows beside it, nor on how many there are. Sums of floats do: a device splits
them according to the shape of the whole. So for top-p probabilities become whole numbers, in units of 2^-36 of the most
probable token's, and are added in fp64, where sums below 2^53 are exact and thus the same in any order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llama_ray.generation.sampling.candidates import TopCandidates, torch_top_candidates
from llama_ray.generation.sampling.noise import exponentials
from llama_ray.generation.sampling.params import SamplingParams

UNITS = 2.0**36
_BLOCK = 128
_CHUNK = 16  # rows: what is in work at once fits the processor's cache
_GPU_CHUNK = 2**24  # numbers: of 8 bytes, and a few of them for each
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
"""Draws rows of logits fp32 [rows, vocab_size] from their `Filters.width` most probable tokens, at `noise.places`.

Returns the tokens, int64 [rows], and where the width may not hold all of a nucleus, a mask [rows] of those where it
does not: they must be drawn again, from more. Every filter keeps a beginning of the candidates.
"""

DrawFromAll = Callable[[Tensor, Tensor | None, Filters, Tensor], Tensor]
"""Draws `rows` (None: all) of logits fp32 [_, vocab_size] from the whole vocabulary -> int64 [rows].

`Filters`, of which temperature and min-p count, and `noise.places` hold an entry for each of `rows`.
"""


def draw_filtered(logits: Tensor, filters: Filters, place: Tensor) -> tuple[Tensor, Tensor | None]:
    """`DrawFiltered` in plain torch, on any device."""
    values, ids = torch_top_candidates(logits, filters.width)
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
    first = (exponentials(place, ids) / (mass * kept)).argmin(-1, keepdim=True)
    return ids.gather(-1, first)[:, 0], short


def draw_from_all(logits: Tensor, rows: Tensor | None, filters: Filters, place: Tensor) -> Tensor:
    """`DrawFromAll` in plain torch, on any device."""
    tokens = []
    every = torch.arange(logits.shape[-1], device=logits.device)
    for some in _chunks(place, logits.shape[-1]):
        chunk = logits[some] if rows is None else logits[rows[some]]
        shifted = (chunk - chunk.amax(-1, keepdim=True)).div_(filters.temperature[some])
        if filters.log_min_p is not None:
            shifted.masked_fill_(shifted < filters.log_min_p[some], -math.inf)
        mass = shifted.exp_().mul_(UNITS).round_()
        tokens.append((exponentials(place[some], every) / mass).argmin(-1))
    return tokens[0] if len(tokens) == 1 else torch.cat(tokens)


@dataclass(frozen=True)
class Kernels:
    """What sampling is made of, on one device; the same contracts everywhere."""

    top_candidates: TopCandidates = torch_top_candidates
    draw_filtered: DrawFiltered = draw_filtered
    draw_from_all: DrawFromAll = draw_from_all


def _chunks(rows: Tensor, vocab_size: int) -> Iterator[slice]:
    step = _CHUNK if rows.device.type == "cpu" else max(_GPU_CHUNK // vocab_size, 1)
    return (slice(start, start + step) for start in range(0, len(rows), step))


def total_mass(logits: Tensor, top: Tensor, temperature: Tensor) -> Tensor:
    """The sum of exp((logits - top) / temperature) in `UNITS`, fp64 [rows, 1]; `top` are the largest [rows, 1]."""
    parts = []
    for some in _chunks(top, logits.shape[-1]):
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
