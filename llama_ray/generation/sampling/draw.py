"""Draw one token for each row of logits: temperature, top-k, top-p, min-p, then an exponential race.

In the race every token gets an exponentially distributed time, divided by its mass, and the smallest time wins; a token
wins with a probability proportional to its mass (the Gumbel-max trick, as in Maddison, Tarlow and Minka 2014,
arXiv:1411.0030, in another form). Noise is keyed by (position, token), so a draft model with similar logits draws the
same token; inverse-CDF sampling would accept about half as many.

A row's token must not depend on the other rows of the batch, nor on their number. Sums of floats do: a device splits
them by the shape of the whole tensor. So for top-p, masses are integers, in units of 2^-36 of the most probable token's
probability, and are added in fp64, where sums below 2^53 are exact in any order.
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
# Rows that are worked on at once, so that they fit the CPU's cache.
_CHUNK_ROWS = 16
# Numbers that a GPU works on at once; a few temporaries of 8 bytes exist for each.
_GPU_CHUNK_NUMBERS = 2**24
_MIN_WIDTH = 64
# A nucleus (what top-p keeps) rarely holds more tokens, and finding them is several times cheaper than sorting all.
_NUCLEUS_WIDTH = 1024


def candidates_needed(params: SamplingParams, vocab_size: int) -> int:
    """Return how many of the most probable tokens a row looks at; 0 if it draws from the whole vocabulary.

    A power of two, so that rows with different `top_k` share a call; it depends only on the row's own parameters.
    """
    if 0 < params.top_k < vocab_size:
        return min(max(_MIN_WIDTH, 1 << (params.top_k - 1).bit_length()), vocab_size)
    return min(_NUCLEUS_WIDTH, vocab_size) if params.top_p < 1 else 0


@dataclass(frozen=True)
class SamplingTensors:
    """The parameters of several rows, on the logits' device, as columns [rows, 1] unless noted.

    `width` is how many candidates the rows look at; 0 means the whole vocabulary.
    """

    width: int
    temperature: Tensor
    outside_top_k: Tensor
    """bool [rows, width]: candidates that top-k removes."""
    no_top_k: Tensor
    """bool: whether the row has no top-k, so that top-p is a share of the whole vocabulary's mass."""
    top_p: Tensor
    log_min_p: Tensor | None

    def may_be_short(self, vocab_size: int) -> bool:
        """Whether a nucleus may hold more tokens than `width`."""
        return self.width == _NUCLEUS_WIDTH and self.width < vocab_size

    @classmethod
    def of(
        cls, params: Sequence[SamplingParams], width: int, vocab_size: int, device: torch.device
    ) -> SamplingTensors:
        """Build the tensors of rows with `params`, whose temperatures must be above 0."""
        tiny = torch.finfo(torch.float32).tiny  # Below it 0 / temperature could be 0 / 0.
        k = _column([p.top_k or vocab_size for p in params], torch.int64, device)
        # Rounding may let the sum reach 1 before the last token: 1 means no limit.
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


DrawFiltered = Callable[[Tensor, SamplingTensors, Tensor], tuple[Tensor, Tensor | None]]
"""(logits fp32 [rows, vocab_size], tensors, noise keys [rows, 1]) -> (tokens int64 [rows], short bool [rows] or None).

Draws from each row's `tensors.width` most probable tokens; every filter keeps a prefix of them. `short` marks rows
whose nucleus exceeds the width: their tokens are void and must be drawn again from more candidates. It is None if
that cannot happen.
"""

DrawFromAll = Callable[[Tensor, Tensor | None, SamplingTensors, Tensor], Tensor]
"""(logits fp32 [_, vocab_size], rows or None, tensors, noise keys [rows, 1]) -> tokens int64 [rows].

Draws the listed rows (None: all) from the whole vocabulary, by temperature and min-p alone. Tensors and noise keys
hold an entry for each listed row.
"""


def draw_filtered(logits: Tensor, tensors: SamplingTensors, keys: Tensor) -> tuple[Tensor, Tensor | None]:
    """`DrawFiltered` in plain torch, on any device."""
    values, ids = torch_top_candidates(logits, tensors.width)
    shifted = (values - values[:, :1]).div_(tensors.temperature)
    mass = shifted.exp().mul_(UNITS).round_().masked_fill_(tensors.outside_top_k, 0)
    running = mass.cumsum(-1, dtype=torch.float64)
    total, short = running[:, -1:], None
    if tensors.may_be_short(logits.shape[-1]):
        # Rows with a top-k of this width are here, too; for them the total is the mass that top-k kept.
        everything = total_mass(logits, values[:, :1], tensors.temperature)
        total = torch.where(tensors.no_top_k, everything, total)
        short = (tensors.no_top_k & (running[:, -1:] < tensors.top_p * total))[:, 0]
    # A token is kept if those before it do not reach top-p yet.
    kept = (running - mass) < tensors.top_p * total
    if tensors.log_min_p is not None:
        kept &= shifted >= tensors.log_min_p
    winner = (exponentials(keys, ids) / (mass * kept)).argmin(-1, keepdim=True)
    return ids.gather(-1, winner)[:, 0], short


def draw_from_all(logits: Tensor, rows: Tensor | None, tensors: SamplingTensors, keys: Tensor) -> Tensor:
    """`DrawFromAll` in plain torch, on any device."""
    tokens = []
    vocabulary = torch.arange(logits.shape[-1], device=logits.device)
    for part in _chunks(keys, logits.shape[-1]):
        chunk = logits[part] if rows is None else logits[rows[part]]
        shifted = (chunk - chunk.amax(-1, keepdim=True)).div_(tensors.temperature[part])
        if tensors.log_min_p is not None:
            shifted.masked_fill_(shifted < tensors.log_min_p[part], -math.inf)
        mass = shifted.exp_().mul_(UNITS).round_()
        tokens.append((exponentials(keys[part], vocabulary) / mass).argmin(-1))
    return tokens[0] if len(tokens) == 1 else torch.cat(tokens)


@dataclass(frozen=True)
class SamplerOps:
    """The operations that sampling is built from, as implemented for one device; the contracts are the same on all."""

    top_candidates: TopCandidates
    draw_filtered: DrawFiltered
    draw_from_all: DrawFromAll


TORCH_OPS = SamplerOps(torch_top_candidates, draw_filtered, draw_from_all)


def total_mass(logits: Tensor, top: Tensor, temperature: Tensor) -> Tensor:
    """Return the sum of exp((logits - top) / temperature) in `UNITS`, fp64 [rows, 1].

    `top` holds each row's largest logit [rows, 1].
    """
    parts = []
    for part in _chunks(top, logits.shape[-1]):
        mass = (logits[part] - top[part]).div_(temperature[part]).exp_().mul_(UNITS).round_()
        parts.append(_blocks(mass).sum(-1, dtype=torch.float64).sum(-1, keepdim=True))
    return torch.cat(parts)


def argmax(logits: Tensor) -> Tensor:
    """Return the first of the largest logits of each row, int64 [rows]; on a CPU several times faster than torch's."""
    vocab_size = logits.shape[-1]
    if logits.device.type != "cpu" or vocab_size % _BLOCK:
        return logits.argmax(-1)
    blocks = _blocks(logits)
    block = blocks.amax(-1).argmax(-1)
    inside = blocks[torch.arange(len(blocks)), block]
    return block * _BLOCK + inside.argmax(-1)


def _chunks(rows: Tensor, vocab_size: int) -> Iterator[slice]:
    size = _CHUNK_ROWS if rows.device.type == "cpu" else max(_GPU_CHUNK_NUMBERS // vocab_size, 1)
    return (slice(start, start + size) for start in range(0, len(rows), size))


def _blocks(x: Tensor) -> Tensor:
    """[rows, vocab_size] -> [rows, blocks, _BLOCK], padded with zeros."""
    if x.shape[-1] % _BLOCK:
        x = torch.nn.functional.pad(x, (0, -x.shape[-1] % _BLOCK))
    return x.view(len(x), -1, _BLOCK)


def _column(values: Sequence[float], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=dtype, device=device)[:, None]
