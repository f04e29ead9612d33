"""A progress bar for `Engine.generate`."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Self

from tqdm import tqdm

from llama_ray.generation.scheduling.sequence import Delta


class ProgressBar:
    """Shows finished completions, tokens and tokens per second on stderr, if `shown`."""

    def __init__(self, completions: int, *, shown: bool) -> None:
        # With miniters 0 the count of tokens is redrawn while no completion finishes.
        self._bar = tqdm(total=completions, unit="completion", miniters=0, disable=not shown)
        self._start, self._tokens = time.perf_counter(), 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.close()

    def count(self, deltas: Sequence[Delta]) -> None:
        """Add the deltas of a step."""
        self._tokens += sum(len(delta.token_ids) for delta in deltas)
        rate = self._tokens / (time.perf_counter() - self._start)
        self._bar.set_postfix_str(f"{self._tokens:,} tokens, {rate:,.0f} tokens/s", refresh=False)
        self._bar.update(sum(delta.finish_reason is not None for delta in deltas))
