"""What a model is trained on in one forward pass."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """Rows of tokens, each consecutive ones of a dataset, in which documents may begin and end.

    `inputs` and `targets` are int64 [batch, seq_len]: the target of a position is the next token, or IGNORE_INDEX where
    nothing is to be learned. `starts` is int32 [batch, seq_len]: the index in its row at which the document of each
    position begins, 0 if it began before the row; with None, a row is one document. `sources` is int64 [batch], the
    number of each row's source in the mixture; None where there is but one. `reference` is float32 [batch, seq_len] for
    pairs of answers (see `PairObjective`): at the first token of each document the log-probability of what is learned
    of it, as the reference model has it, and 0 elsewhere.
    """

    inputs: Tensor
    targets: Tensor
    starts: Tensor | None = None
    sources: Tensor | None = None
    reference: Tensor | None = None

    @property
    def positions(self) -> Tensor | None:
        """Int64 [batch, seq_len]: the position of each token in its document; None if a row is one document."""
        if self.starts is None:
            return None
        return torch.arange(self.starts.shape[1], device=self.starts.device) - self.starts

    def to(self, device: torch.device) -> Batch:
        """Return the batch on `device`; the copy may still be under way."""
        inputs, targets = (tensor.to(device, non_blocking=True) for tensor in (self.inputs, self.targets))
        starts, sources, reference = (
            tensor if tensor is None else tensor.to(device, non_blocking=True)
            for tensor in (self.starts, self.sources, self.reference)
        )
        return Batch(inputs, targets, starts, sources, reference)
