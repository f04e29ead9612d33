"""One forward pass: token ids in, the logits of each sequence's next token out."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from llama_ray.generation.kv_cache import KVCache
from llama_ray.model.llama import Llama


class Runner:
    """A model and the cache that it reads and fills."""

    def __init__(self, model: Llama, cache: KVCache) -> None:
        self.model, self.cache = model, cache
        self._device = model.embed_tokens.weight.device

    @torch.inference_mode()
    def prefill(self, slots: Sequence[int], prompts: Sequence[Sequence[int]]) -> Tensor:
        """Read whole prompts into their slots -> logits of the token after each, [len(slots), vocab_size].

        The prompts are laid end to end, so that no work goes into padding; only last positions reach the head.
        """
        lengths = [len(p) for p in prompts]
        tokens = self._tensor([t for p in prompts for t in p])[None]
        positions = self._tensor([i for n in lengths for i in range(n)])
        hidden = self.model.hidden(tokens, positions, self.cache.prefill(slots, lengths))
        last = self._tensor(lengths).cumsum(0) - 1
        return self.model.head(hidden[0, last])

    @torch.inference_mode()
    def decode(self, slots: Sequence[int], tokens: Sequence[int], positions: Sequence[int]) -> Tensor:
        """Add one token to each slot (ascending) at its position -> logits of the next, [len(slots), vocab_size]."""
        attend = self.cache.decode(slots, positions)
        hidden = self.model.hidden(self._tensor(tokens)[:, None], self._tensor(positions)[:, None], attend)
        return self.model.head(hidden[:, 0])

    def _tensor(self, ids: Sequence[int]) -> Tensor:
        return torch.tensor(ids, dtype=torch.int64, device=self._device)
