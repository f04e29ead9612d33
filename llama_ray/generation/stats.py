"""Measurements of each request, of each step, and of an engine as a whole."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class RequestStats:
    """Measurements of one candidate. Moments are seconds of `time.monotonic`."""

    arrived: float
    prompt_tokens: int
    reused_tokens: int = 0
    """Prompt tokens whose keys and values were in the cache."""
    started: float | None = None
    """Start of the step that computed its first tokens."""
    first_token: float | None = None
    last_token: float | None = None
    finished: float | None = None
    output_tokens: int = 0
    longest_gap_s: float = 0.0
    """Longest time between two steps that gave it tokens."""

    @property
    def queue_s(self) -> float | None:
        """Seconds from arrival to start."""
        return None if self.started is None else self.started - self.arrived

    @property
    def time_to_first_token_s(self) -> float | None:
        """Seconds from arrival to the first token."""
        return None if self.first_token is None else self.first_token - self.arrived

    @property
    def inter_token_s(self) -> float | None:
        """Mean seconds between two tokens."""
        if self.first_token is None or self.last_token is None or self.output_tokens < 2:
            return None
        return (self.last_token - self.first_token) / (self.output_tokens - 1)

    def count(self, tokens: int, now: float) -> None:
        """Record that `tokens` new tokens came at `now`."""
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
    """Measurements of one step."""

    seconds: float
    sequences: int
    prompt_tokens: int
    """Prompt tokens that were computed."""
    generated_tokens: int
    draft_tokens: int
    """Draft tokens that were proposed."""
    accepted_tokens: int
    """Draft tokens that were accepted."""


@dataclass(frozen=True)
class EngineStats:
    """The state of an engine: `running`, `waiting` and `blocks_in_use` are of now, others since its start."""

    running: int
    waiting: int
    requests: int
    prompt_tokens: int
    """Prompt tokens that were computed, repeatedly after preemption; those found in the cache are `reused_tokens`."""
    reused_tokens: int
    generated_tokens: int
    draft_tokens: int
    accepted_tokens: int
    preemptions: int
    evictions: int
    """Cached blocks whose content was dropped for new content."""
    steps: int
    blocks: int
    blocks_in_use: int
    block_size: int
    max_num_seqs: int
    kv_cache_bytes: int
    weight_bytes: int
    last_step: StepStats | None
