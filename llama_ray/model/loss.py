"""The training objective."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

IGNORE = -100
"""A target with this value is not predicted and carries no loss."""


def cross_entropy_sum(logits: Tensor, targets: Tensor) -> Tensor:
    """Next-token negative log-likelihood in nats, summed over tokens, in fp32.

    `logits` [batch, seq, vocab] in any float dtype, `targets` int64 [batch, seq]. A sum, not a mean: the caller
    divides by the number of targets in the whole global batch, which one micro-batch does not know.
    """
    return F.cross_entropy(
        logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction="sum"
    )
