"""What a batch's sampling parameters imply, as tensors and row lists, computed once and kept while the rows stay."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from llama_ray.generation.sampling.draw import SamplingTensors, candidates_needed
from llama_ray.generation.sampling.noise import noise_keys, stream_keys
from llama_ray.generation.sampling.params import SamplingParams
from llama_ray.generation.sampling.penalties import Penalties
from llama_ray.generation.sampling.row import Row
from llama_ray.utils.integers import ceil_div


@dataclass(frozen=True)
class RowGroup:
    """Rows that are drawn in one call: the whole batch (`rows` None) or those listed. `tensors` None means greedy."""

    rows: Tensor | None
    tensors: SamplingTensors | None


class SamplingMetadata:
    """Everything that follows from the parameters and seeds of a batch's rows, but not from tokens or positions.

    Lists hold row numbers; the `*_index` tensors hold the same numbers on the logits' device.
    """

    def __init__(self, logits: Tensor, rows: Sequence[Row]) -> None:
        vocab_size, device = logits.shape[-1], logits.device
        self._shape, self._device = logits.shape, device
        self._params = params = [row.params for row in rows]
        self._streams = [(row.seed, row.index) for row in rows]
        self._stream_keys = stream_keys([row.seed for row in rows], [row.index for row in rows])
        self.groups = _groups(params, vocab_size, device)
        self.greedy = all(group.tensors is None for group in self.groups)
        self.logprob_rows = [i for i, p in enumerate(params) if p.logprobs is not None]
        self.logprob_index = torch.tensor(self.logprob_rows, dtype=torch.int64, device=device)
        self.penalty_rows = [i for i, row in enumerate(rows) if row.counts is not None]
        self.penalties = (
            Penalties(self.penalty_rows, [params[i] for i in self.penalty_rows], device)
            if self.penalty_rows
            else None
        )
        self.bias = _bias(params, vocab_size, device)
        self.allowed = _allowed(params, vocab_size, device)
        self.bad_words_rows = [i for i, row in enumerate(rows) if row.bad_words is not None]
        # Those for which no token may be left.
        self.narrowed_rows = [
            i for i, row in enumerate(rows) if row.params.allowed is not None or row.bad_words is not None
        ]
        self.constraint_rows = [i for i, row in enumerate(rows) if row.constraint is not None]
        self.constraint_index = torch.tensor(self.constraint_rows, dtype=torch.int64, device=device)
        self.min_tokens_rows = [
            i for i, row in enumerate(rows) if row.params.min_tokens and row.constraint is None
        ]

    def matches(self, logits: Tensor, rows: Sequence[Row]) -> bool:
        """Whether it holds for `rows`, too: the same candidates of the same requests in the same order."""
        return (
            logits.shape == self._shape
            and logits.device == self._device
            and all(row.params is p for row, p in zip(rows, self._params, strict=True))
            and all((row.seed, row.index) == s for row, s in zip(rows, self._streams, strict=True))
        )

    def noise_keys(self, rows: Sequence[Row]) -> Tensor:
        """Return the rows' `noise.noise_keys` at their current positions, int64 [rows, 1], on the logits' device."""
        positions = [len(row.prompt) + len(row.output) + len(row.draft) for row in rows]
        keys = noise_keys(self._stream_keys, positions)
        # Pinned, because the host would wait for the model's logits otherwise.
        return keys if self._device.type == "cpu" else keys.pin_memory().to(self._device, non_blocking=True)


def _groups(params: Sequence[SamplingParams], vocab_size: int, device: torch.device) -> list[RowGroup]:
    """Group rows by how many candidates they look at; -1 stands for greedy."""
    by_width: dict[int, list[int]] = defaultdict(list)
    for i, p in enumerate(params):
        by_width[candidates_needed(p, vocab_size) if p.temperature > 0 else -1].append(i)
    return [
        RowGroup(
            torch.tensor(rows, device=device) if len(by_width) > 1 else None,
            SamplingTensors.of([params[i] for i in rows], width, vocab_size, device) if width >= 0 else None,
        )
        for width, rows in by_width.items()
    ]


def _bias(
    params: Sequence[SamplingParams], vocab_size: int, device: torch.device
) -> tuple[Tensor, Tensor] | None:
    """Return flat indices into the batch's logits and what `logit_bias` adds there; None if no row has one."""
    biases = [(i, p.bias) for i, p in enumerate(params)]
    flat = [i * vocab_size + bias[0] for i, bias in biases if bias is not None]
    if not flat:
        return None
    values = np.concatenate([bias[1] for _, bias in biases if bias is not None])
    return torch.from_numpy(np.concatenate(flat)).to(device), torch.from_numpy(values).to(device)


def _allowed(
    params: Sequence[SamplingParams], vocab_size: int, device: torch.device
) -> tuple[Tensor, Tensor] | None:
    """Return the rows with `allowed_token_ids`, and those ids as bits for `TokenMasks`; None if there are none."""
    limited = [(i, p.allowed) for i, p in enumerate(params) if p.allowed is not None]
    if not limited:
        return None
    allowed = np.zeros((len(limited), ceil_div(vocab_size, 8) * 8), dtype=np.uint8)
    for bits, (_, ids) in zip(allowed, limited, strict=True):
        bits[ids] = 1
    rows = torch.tensor([i for i, _ in limited], device=device)
    return rows, torch.from_numpy(np.packbits(allowed, axis=1, bitorder="little")).to(device)
