"""Penalties for tokens that occurred, from counts that are kept as a sequence grows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llama_ray.generation.sampling.params import SamplingParams


class TokenCounts:
    """The distinct tokens of one candidate and how often each is in the output; `push` costs the same at any length.

    Tokens of the prompt count as seen, with 0 occurrences: only the repetition penalty regards them.
    """

    def __init__(self, prompt: Sequence[int]) -> None:
        distinct = dict.fromkeys(prompt)
        self._place = {token: i for i, token in enumerate(distinct)}
        self._ids = np.array([*distinct], dtype=np.int64)
        self._counts = np.zeros(len(distinct), dtype=np.float32)

    @classmethod
    def of(cls, params: SamplingParams, prompt: Sequence[int]) -> Self | None:
        """Counts for a candidate that begins now; None where no penalty is in force."""
        if params.repetition_penalty != 1:
            return cls(prompt)
        return cls(()) if params.presence_penalty or params.frequency_penalty else None

    def push(self, token: int) -> None:
        """Count one more token of the output."""
        place = self._place.setdefault(token, len(self._place))
        if place == len(self._ids):
            room = max(16, 2 * place)
            self._ids = np.concatenate([self._ids, np.zeros(room - place, dtype=np.int64)])
            self._counts = np.concatenate([self._counts, np.zeros(room - place, dtype=np.float32)])
        self._ids[place] = token
        self._counts[place] += 1

    def after(self, draft: Sequence[int] = ()) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Distinct token ids, and their occurrences in the output if `draft` came next; to be read only."""
        size = len(self._place)
        ids, counts = self._ids[:size], self._counts[:size]
        if not draft:
            return ids, counts
        new = [token for token in dict.fromkeys(draft) if token not in self._place]
        place = self._place | {token: size + i for i, token in enumerate(new)} if new else self._place
        ids = np.concatenate([ids, np.array(new, dtype=np.int64)])
        counts = np.concatenate([counts, np.zeros(len(new), dtype=np.float32)])
        np.add.at(counts, [place[token] for token in draft], 1)
        return ids, counts


class Penalties:
    """The penalties of several rows of a batch, to be applied at once; `rows` are their numbers in it."""

    def __init__(self, rows: Sequence[int], params: Sequence[SamplingParams], device: torch.device) -> None:
        self._rows = np.array(rows, dtype=np.int64)
        strengths = [[p.repetition_penalty, p.presence_penalty, p.frequency_penalty] for p in params]
        self._strengths = torch.tensor(strengths, dtype=torch.float32, device=device)

    def apply(self, logits: Tensor, seen: Sequence[tuple[NDArray[np.int64], NDArray[np.float32]]]) -> None:
        """Change logits fp32 [rows of the batch, vocab_size], contiguous, in place.

        `seen` holds, for each penalised row, the distinct ids and counts of `TokenCounts.after`. A positive logit
        of a token that occurred is divided by the repetition penalty and a negative one multiplied; then presence
        and, for each occurrence in the output, frequency are subtracted.
        """
        vocab_size, device = logits.shape[-1], logits.device
        owner = np.repeat(np.arange(len(seen)), [len(ids) for ids, _ in seen])
        place = self._rows[owner] * vocab_size + np.concatenate([ids for ids, _ in seen])
        at = torch.from_numpy(place).to(device)
        count = torch.from_numpy(np.concatenate([counts for _, counts in seen])).to(device)
        repetition, presence, frequency = self._strengths[torch.from_numpy(owner).to(device)].unbind(-1)
        flat = logits.view(-1)
        values = flat[at]
        values = torch.where(values > 0, values / repetition, values * repetition)
        flat[at] = values - (presence * (count > 0) + frequency * count)
