"""Penalties for tokens that occurred before, from counts that grow with the sequence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llama_ray.generation.sampling.params import SamplingParams


class TokenCounts:
    """The distinct tokens of one candidate and how often each occurs in its output. `push` takes constant time.

    Tokens of the prompt are included with 0 occurrences: only the repetition penalty applies to them.
    """

    def __init__(self, prompt: Sequence[int]) -> None:
        distinct = dict.fromkeys(prompt)
        self._index = {token: i for i, token in enumerate(distinct)}
        self._ids = np.array([*distinct], dtype=np.int64)
        self._counts = np.zeros(len(distinct), dtype=np.float32)

    @classmethod
    def of(cls, params: SamplingParams, prompt: Sequence[int]) -> Self | None:
        """Return the counts of a candidate with an empty output; None if `params` have no penalty."""
        if params.repetition_penalty != 1:
            return cls(prompt)
        return cls(()) if params.presence_penalty or params.frequency_penalty else None

    def push(self, token: int) -> None:
        """Count one more token of the output."""
        i = self._index.setdefault(token, len(self._index))
        if i == len(self._ids):
            capacity = max(16, 2 * i)
            self._ids = np.concatenate([self._ids, np.zeros(capacity - i, dtype=np.int64)])
            self._counts = np.concatenate([self._counts, np.zeros(capacity - i, dtype=np.float32)])
        self._ids[i] = token
        self._counts[i] += 1

    def after(self, draft: Sequence[int] = ()) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Return the distinct token ids and their occurrences in the output followed by `draft`.

        The arrays are views: read them only.
        """
        size = len(self._index)
        ids, counts = self._ids[:size], self._counts[:size]
        if not draft:
            return ids, counts
        new = [token for token in dict.fromkeys(draft) if token not in self._index]
        index = self._index | {token: size + i for i, token in enumerate(new)} if new else self._index
        ids = np.concatenate([ids, np.array(new, dtype=np.int64)])
        counts = np.concatenate([counts, np.zeros(len(new), dtype=np.float32)])
        np.add.at(counts, [index[token] for token in draft], 1)
        return ids, counts


class Penalties:
    """The penalties of several rows, applied to a batch's logits at once. `rows` are their numbers in the batch."""

    def __init__(self, rows: Sequence[int], params: Sequence[SamplingParams], device: torch.device) -> None:
        self._rows = np.array(rows, dtype=np.int64)
        strengths = [[p.repetition_penalty, p.presence_penalty, p.frequency_penalty] for p in params]
        self._strengths = torch.tensor(strengths, dtype=torch.float32, device=device)

    def apply(self, logits: Tensor, seen: Sequence[tuple[NDArray[np.int64], NDArray[np.float32]]]) -> None:
        """Penalise logits fp32 [rows of the batch, vocab_size], contiguous, in place.

        `seen` holds `TokenCounts.after` of each penalised row. The logit of a token that occurred is divided by the
        repetition penalty if positive and multiplied by it if negative. Then the presence penalty is subtracted from
        tokens of the output, and the frequency penalty once for each of their occurrences.
        """
        vocab_size, device = logits.shape[-1], logits.device
        owner = np.repeat(np.arange(len(seen)), [len(ids) for ids, _ in seen])
        flat_ids = self._rows[owner] * vocab_size + np.concatenate([ids for ids, _ in seen])
        at = torch.from_numpy(flat_ids).to(device)
        count = torch.from_numpy(np.concatenate([counts for _, counts in seen])).to(device)
        repetition, presence, frequency = self._strengths[torch.from_numpy(owner).to(device)].unbind(-1)
        flat = logits.view(-1)
        values = flat[at]
        values = torch.where(values > 0, values / repetition, values * repetition)
        flat[at] = values - (presence * (count > 0) + frequency * count)
