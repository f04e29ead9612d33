"""Rotary scaling in GGUF: a tensor by which the frequencies are divided, or metadata.

https://github.com/ggml-org/llama.cpp/blob/master/conversion/llama.py writes the tensor.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from llama_ray.model.config import LlamaConfig, RopeScaling
from llama_ray.model.layers import rope_frequencies

_TOLERANCE = 1e-5
"""Relative: factors are stored in float32, and were computed in it, too."""
_DIGITS = (1, 2, 3, 4, 6, 9)


def rope_factors(config: LlamaConfig) -> Tensor:
    """Return the numbers by which `config` divides the rotary frequencies, fp32 [head_dim / 2]."""
    plain = rope_frequencies(config.head_dim, config.rope_theta, None)
    return plain / rope_frequencies(config.head_dim, config.rope_theta, config.rope_scaling)


def scaling_of(factors: Tensor, head_dim: int, theta: float, original: int | None) -> RopeScaling | None:
    """Return the scaling that divides the frequencies of `head_dim` and `theta` by `factors`.

    `original` is the length of the first training, where the file names it. Of all settings that give the same
    factors, those of Llama 3.1 come first, then those with few digits. Raises ValueError for factors that `RopeScaling`
    cannot express.
    """
    least, most = float(factors.min()), float(factors.max())
    if not 1 - _TOLERANCE <= least <= most < math.inf:
        raise ValueError("its factors are not all finite and at least 1")
    if most - least <= _TOLERANCE * most:
        return None if most - 1 <= _TOLERANCE else RopeScaling(rope_type="linear", factor=_rounded(most))
    frequencies = rope_frequencies(head_dim, theta, None)
    length = original or RopeScaling.original_max_seq_len
    for low, high in [(1.0, 4.0), *_solutions(factors, most, frequencies * length / (2 * math.pi))]:
        if 0 < low < high:
            scaling = RopeScaling(
                rope_type="llama3",
                factor=_rounded(most),
                low_freq_factor=low,
                high_freq_factor=high,
                original_max_seq_len=length,
            )
            wanted = frequencies / rope_frequencies(head_dim, theta, scaling)
            if torch.allclose(wanted, factors, rtol=_TOLERANCE, atol=0):
                return scaling
    raise ValueError("its factors are neither those of linear scaling nor of Llama 3's")


def _solutions(factors: Tensor, most: float, turns: Tensor) -> list[tuple[float, float]]:
    """Return candidates of (low, high): how much a frequency is kept is linear in its turns between them."""
    keep = (1 / factors.double() - 1 / most) / (1 - 1 / most)
    between = ((keep > _TOLERANCE) & (keep < 1 - _TOLERANCE)).nonzero().flatten()
    if len(between) < 2:
        return []
    first, last = int(between[0]), int(between[-1])
    slope = float((keep[first] - keep[last]) / (turns[first] - turns[last]))
    low = float(turns[last]) - float(keep[last]) / slope
    return [(float(f"{low:.{n}g}"), float(f"{low + 1 / slope:.{n}g}")) for n in _DIGITS]


def _rounded(value: float) -> float:
    """Return the number of few digits that `value` is but for rounding."""
    return next(
        (short for n in _DIGITS if abs((short := float(f"{value:.{n}g}")) - value) <= 1e-6 * value), value
    )
