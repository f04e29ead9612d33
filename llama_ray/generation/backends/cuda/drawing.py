"""`SamplerOps` of a few launches: candidates are found by their keys, and one program draws a row's token from them.

In plain torch, a draw is some fifty launches, which take longer than their work. The keys, int64, order tokens by logit
and then by id, and hold both, so `topk` of keys is all that a draw needs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from llama_ray.generation.sampling import draw
from llama_ray.generation.sampling.candidates import block_size
from llama_ray.generation.sampling.draw import SamplerOps, SamplingTensors
from llama_ray.utils.integers import GOLDEN_GAMMA, SPLITMIX64_FACTORS, ceil_div

_WIDEST = 1024
"""Candidates that one program draws from; more are drawn from in plain torch."""
_ELEMENTS = 2048
"""Logits that a program of the other kernels reads."""
_GAMMA = tl.constexpr(GOLDEN_GAMMA)
_FIRST_FACTOR = tl.constexpr(SPLITMIX64_FACTORS[0])
_SECOND_FACTOR = tl.constexpr(SPLITMIX64_FACTORS[1])
_UNITS = tl.constexpr(draw.UNITS)
_INTEGERS = tl.constexpr(2.0**52)
"""From here to twice that, fp64 holds integers only."""
_LAST_ID = 0x7FFFFFFF
_LAST = tl.constexpr(_LAST_ID)


@triton.jit
def _key(value, token):
    """Return int64 keys that are larger for larger values and, among equal ones, for smaller tokens."""
    # -0 equals 0.
    bits = tl.where(value == 0.0, 0.0, value).to(tl.int32, bitcast=True)
    # The bits of negative floats order backwards.
    ascending = bits ^ ((bits >> 31) & _LAST)
    return (ascending.to(tl.int64) << 32) + (_LAST - token.to(tl.int64))


@triton.jit
def _value(key):
    ascending = (key >> 32).to(tl.int32)
    return (ascending ^ ((ascending >> 31) & _LAST)).to(tl.float32, bitcast=True)


@triton.jit
def _token(key, vocab_size):
    # What is beyond the vocabulary is -inf.
    return tl.minimum(_LAST - (key & _LAST), vocab_size - 1)


@triton.jit
def _logits(row, at, vocab_size):
    """Load logits of a row: -inf for NaN, of which there is no order, and beyond the vocabulary."""
    value = tl.load(row + at, mask=at < vocab_size, other=float("-inf"))
    return tl.where(value == value, value, float("-inf"))


@triton.jit
def _mass(shifted):
    """Return exp(shifted) in `UNITS`, as whole numbers in fp64."""
    # Rounded to fp32 first, as in plain torch. Adding and subtracting rounds to integers, halves to even ones.
    mass = tl.exp(shifted.to(tl.float64)).to(tl.float32).to(tl.float64) * _UNITS
    return (mass + _INTEGERS) - _INTEGERS


@triton.jit
def _exponential(key, token):
    """Return `exponentials` of a noise key and tokens, int64."""
    z = key.to(tl.uint64, bitcast=True) + token.to(tl.uint64, bitcast=True) * _GAMMA
    z = (z ^ (z >> 30)) * _FIRST_FACTOR
    z = (z ^ (z >> 27)) * _SECOND_FACTOR
    z = z ^ (z >> 31)
    # 1 - v is exact.
    return -tl.log(1.0 - ((z >> 12).to(tl.int64).to(tl.float64) + 0.5) * (1.0 / _INTEGERS))


@triton.jit
def _block_keys(keys, logits, logits_stride, vocab_size, blocks, BLOCKS: tl.constexpr, SIZE: tl.constexpr):
    """Write the keys of each block's largest logit and the block's number."""
    row = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS)
    at = block[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    value = _logits(logits + row * logits_stride, at, vocab_size)
    tl.store(keys + row * blocks + block, _key(tl.max(value, 1), block), mask=block < blocks)


@triton.jit
def _token_keys(
    keys, logits, chosen, logits_stride, vocab_size, width, BLOCKS: tl.constexpr, SIZE: tl.constexpr
):
    """Write the keys of the tokens of the chosen blocks, given by their keys."""
    row = tl.program_id(0).to(tl.int64)
    number = tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS)
    known = tl.minimum(number, width - 1)
    block = _LAST - (tl.load(chosen + row * width + known) & _LAST)
    inside = tl.arange(0, SIZE)[None, :]
    at = block[:, None] * SIZE + inside
    value = _logits(logits + row * logits_stride, at, vocab_size)
    target = keys + row * width * SIZE + known[:, None] * SIZE + inside
    tl.store(target, _key(value, at), mask=(number < width)[:, None])


@triton.jit
def _part_masses(
    parts, logits, candidates, temperature, logits_stride, vocab_size, width, count, ELEMENTS: tl.constexpr
):
    """Write the mass of a part of a row's vocabulary."""
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    at = part * ELEMENTS + tl.arange(0, ELEMENTS)
    value = _logits(logits + row * logits_stride, at, vocab_size)
    top = _value(tl.load(candidates + row * width))
    mass = _mass(tl.div_rn(value - top, tl.load(temperature + row)))
    tl.store(parts + row * count + part, tl.sum(tl.where(at < vocab_size, mass, 0.0), 0))


@triton.jit
def _draw(
    tokens,
    short,
    candidates,
    parts,
    temperature,
    outside_top_k,
    no_top_k,
    top_p,
    log_min_p,
    noise,
    vocab_size,
    width,
    count,
    PADDED: tl.constexpr,
    PARTS: tl.constexpr,
    MIN_P: tl.constexpr,
):
    """Draw a row's token from its candidates, given by their keys; see `draw_filtered` in plain torch."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, PADDED)
    valid = at < width
    candidates += row * width
    key = tl.load(candidates + at, mask=valid, other=0)
    shifted = tl.div_rn(_value(key) - _value(tl.load(candidates)), tl.load(temperature + row))
    outside = tl.load(outside_top_k + row * width + at, mask=valid, other=1)
    mass = tl.where(outside == 0, _mass(shifted), 0.0)
    inside = tl.sum(mass, 0)
    total = inside
    limit = tl.load(top_p + row)
    if PARTS:
        part = tl.arange(0, PARTS)
        everything = tl.sum(tl.load(parts + row * count + part, mask=part < count, other=0.0), 0)
        unlimited = tl.load(no_top_k + row) != 0
        total = tl.where(unlimited, everything, inside)
        tl.store(short + row, (unlimited & (inside < limit * total)).to(tl.uint8))
    # A token is kept if those before it do not reach top-p yet.
    kept = (tl.cumsum(mass, 0) - mass < limit * total) & (mass > 0.0)
    if MIN_P:
        kept = kept & (shifted >= tl.load(log_min_p + row))
    time = _exponential(tl.load(noise + row), _token(key, vocab_size)) / tl.where(kept, mass, 1.0)
    winner = tl.argmin(tl.where(kept, time, float("inf")), 0)
    # Rows that hold NaN have no winner.
    tl.store(tokens + row, _token(tl.load(candidates + tl.minimum(winner, width - 1)), vocab_size))


def candidate_keys(logits: Tensor, width: int) -> Tensor:
    """Return the keys of the `width` most probable tokens, largest first, int64 [rows, width].

    `logits` are fp32 [rows, vocab_size]. See `top_candidates_by_keys`, which does the same.
    """
    rows, vocab_size = logits.shape
    size = block_size(vocab_size, width)
    blocks = ceil_div(vocab_size, size)
    together = _ELEMENTS // size
    keys = torch.empty(rows, blocks, dtype=torch.int64, device=logits.device)
    _block_keys[(rows, ceil_div(blocks, together))](
        keys, logits, logits.stride(0), vocab_size, blocks, BLOCKS=together, SIZE=size, num_warps=4
    )
    # Blocks of one token are the tokens.
    chosen = keys.topk(width, sorted=size == 1).values
    if size == 1:
        return chosen
    together = min(together, triton.next_power_of_2(width))
    keys = torch.empty(rows, width * size, dtype=torch.int64, device=logits.device)
    _token_keys[(rows, ceil_div(width, together))](
        keys, logits, chosen, logits.stride(0), vocab_size, width, BLOCKS=together, SIZE=size, num_warps=4
    )
    return keys.topk(width).values


def top_candidates(logits: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """`TopCandidates` by `candidate_keys`."""
    keys = candidate_keys(logits, width)
    ascending = (keys >> 32).int()
    values = (ascending ^ ((ascending >> 31) & _LAST_ID)).view(torch.float32)
    return values, (_LAST_ID - (keys & _LAST_ID)).clamp_(max=logits.shape[-1] - 1)


def draw_filtered(logits: Tensor, tensors: SamplingTensors, keys: Tensor) -> tuple[Tensor, Tensor | None]:
    """`DrawFiltered` with one program for each row."""
    (rows, vocab_size), width = logits.shape, tensors.width
    if width > _WIDEST:
        return draw.draw_filtered(logits, tensors, keys)
    candidates = candidate_keys(logits, width)
    tokens = torch.empty(rows, dtype=torch.int64, device=logits.device)
    short, parts, count = None, None, 0
    if tensors.may_be_short(vocab_size):
        count = ceil_div(vocab_size, _ELEMENTS)
        short = torch.empty(rows, dtype=torch.bool, device=logits.device)
        parts = torch.empty(rows, count, dtype=torch.float64, device=logits.device)
        _part_masses[(rows, count)](
            parts,
            logits,
            candidates,
            tensors.temperature,
            logits.stride(0),
            vocab_size,
            width,
            count,
            ELEMENTS=_ELEMENTS,
            num_warps=8,
        )
    padded = triton.next_power_of_2(width)
    _draw[(rows,)](
        tokens,
        None if short is None else short.view(torch.uint8),
        candidates,
        parts,
        tensors.temperature,
        tensors.outside_top_k.view(torch.uint8),
        tensors.no_top_k.view(torch.uint8),
        tensors.top_p,
        tensors.log_min_p,
        keys,
        vocab_size,
        width,
        count,
        PADDED=padded,
        PARTS=triton.next_power_of_2(count) if count else 0,
        MIN_P=tensors.log_min_p is not None,
        num_warps=max(1, min(8, padded // 128)),
    )
    return tokens, short


TRITON_OPS = SamplerOps(top_candidates, draw_filtered, draw.draw_from_all)
