from __future__ import annotations

import numpy as np
import torch

from llama_ray.generation.sampling.masks import TokenMasks, forbid_tokens


def test_a_mask_sets_only_logits_without_a_bit_to_minus_infinity() -> None:
    logits = torch.arange(4 * 50, dtype=torch.float32).view(4, 50)
    bits = np.zeros((2, 8), dtype=np.uint8)
    bits[0, 0], bits[1, 6] = 0b10000001, 0b11111111
    expected = torch.full((4, 50), -torch.inf)
    expected[[0, 2]] = logits[[0, 2]]
    expected[3, [0, 7]] = logits[3, [0, 7]]
    expected[1, [48, 49]] = logits[1, [48, 49]]
    TokenMasks().apply(logits, torch.tensor([3, 1]), torch.from_numpy(bits))
    assert logits.equal(expected)


def test_tokens_are_forbidden_unless_that_leaves_none() -> None:
    bits = np.array([0b00000110, 0b10000000], dtype=np.uint8)
    forbid_tokens(bits, [1, 15])
    assert bits.tolist() == [0b100, 0]
    forbid_tokens(bits, [2])
    assert bits.tolist() == [0b100, 0]
