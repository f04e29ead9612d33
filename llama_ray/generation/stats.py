"""What the engine measures: each request, each step, and all of them together."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class RequestStats:
    """Of one candidate. Moments are seconds of `time.monotonic`."""

    arrived: float
    prompt_tokens: int
    reused_tokens: int = 0
    """Prompt tokens whose keys and values were in the cache already."""
    started: float | None = None
    """When its first tokens were computed."""
    first_token: float | None = None
    last_token: float | None = None
    finished: float | None = None
    output_tokens: int = 0
    longest_gap_s: float = 0.0
    """Between two steps that gave it tokens."""

    @property
    def queue_s(self) -> float | None:
        """From its arrival until it started."""
        return None if self.started is None else self.started - self.arrived

    @property
    def time_to_first_token_s(self) -> float | None:
        """From its arrival."""
        return None if self.first_token is None else self.first_token - self.arrived

    @property
    def inter_token_s(self) -> float | None:
        """Mean time between two of its tokens."""
        if self.first_token is None or self.last_token is None or self.output_tokens < 2:
            return None
        return (self.last_token - self.first_token) / (self.output_tokens - 1)

    def count(self, tokens: int, now: float) -> None:
        """So many came at `now`."""
        if not tokens:
            return
        if self.first_token is None:
            self.first_token = now
        if self.last_token is not None:
            self.longest_gap_s = max(self.longest_gap_s, now - self.last_token)
        self.last_token = now
        self.output_tokens += tokens


@dataclass(frozen=True, slots=True)
class StepStats:
    """Of one step."""

    seconds: float
    sequences: int
    prompt_tokens: int
    """Computed for sequences that do not generate yet."""
    generated_tokens: int
    draft_tokens: int
    """Guessed by speculation."""
    accepted_tokens: int
    """Of those, right."""


@dataclass(frozen=True)
class EngineStats:
    """What the engine is doing and has done: sequences and blocks now, everything else since it was made."""

    running: int
    waiting: int
    requests: int
    prompt_tokens: int
    """Computed, again where a sequence was preempted; those found in the cache are `reused_tokens`."""
    reused_tokens: int
    generated_tokens: int
    draft_tokens: int
    accepted_tokens: int
    preemptions: int
    evictions: int
    """Remembered blocks that gave way to new ones."""
    steps: int
    blocks: int
    blocks_in_use: int
    block_size: int
    max_num_seqs: int
    kv_cache_bytes: int
    weight_bytes: int
    last_step: StepStats | None

    @property
    def kv_cache_usage(self) -> float:
        """Share of the cache that running sequences hold."""
        return self.blocks_in_use / self.blocks
