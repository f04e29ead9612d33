"""How far a batch of prompts is, for somebody who waits for it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Self

from tqdm import tqdm

from llama_ray.generation.scheduling.sequence import Delta


class Progress:
    """A bar of finished completions on stderr, with the tokens so far and their rate; nothing unless `shown`."""

    def __init__(self, completions: int, *, shown: bool) -> None:
        # miniters 0: long completions move the count of tokens for a while before they move the bar
        self._bar = tqdm(total=completions, unit="completion", miniters=0, disable=not shown)
        self._start, self._tokens = time.perf_counter(), 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.close()

    def count(self, deltas: Sequence[Delta]) -> None:
        """Take note of what a step gave."""
        self._tokens += sum(len(delta.token_ids) for delta in deltas)
        rate = self._tokens / (time.perf_counter() - self._start)
        self._bar.set_postfix_str(f"{self._tokens:,} tokens, {rate:,.0f} tokens/s", refresh=False)
        self._bar.update(sum(delta.finish_reason is not None for delta in deltas))
