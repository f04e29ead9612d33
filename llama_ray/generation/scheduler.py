"""Who runs next. Knows sequences and slots, nothing of tensors."""

from __future__ import annotations

import heapq
from collections import deque

from llama_ray.generation.sequence import Sequence


class Scheduler:
    """First come, first served: a sequence waits until one of `slots` cache rows is free and keeps it to its end.

    `prefill_tokens` bounds the prompts that one step takes in together, so that running sequences do not wait for
    all of a crowd's prompts at once; a single longer prompt is still taken, alone.
    """

    def __init__(self, slots: int, prefill_tokens: int) -> None:
        self.waiting: deque[Sequence] = deque()
        self.running: dict[int, Sequence] = {}
        self._prefill_tokens = prefill_tokens
        self._free = list(range(slots))  # a heap: low slots first keeps the rows in use together

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence behind all others."""
        self.waiting.append(sequence)

    def admit(self) -> list[Sequence]:
        """Give slots to the sequences at the head of the queue and return them; they run from now on."""
        admitted: list[Sequence] = []
        budget = self._prefill_tokens
        while self.waiting and self._free:
            if admitted and len(self.waiting[0].prompt) > budget:
                break
            sequence = self.waiting.popleft()
            sequence.slot = heapq.heappop(self._free)
            budget -= len(sequence.prompt)
            self.running[sequence.slot] = sequence
            admitted.append(sequence)
        return admitted

    def release(self, sequence: Sequence) -> None:
        """Take the slot of a running sequence back; others may have it in the next step."""
        if sequence.slot is not None:
            del self.running[sequence.slot]
            heapq.heappush(self._free, sequence.slot)
            sequence.slot = None

    def abort(self, request_id: int) -> None:
        """Drop all sequences of a request, waiting and running."""
        if any(s.request_id == request_id for s in self.waiting):
            self.waiting = deque(s for s in self.waiting if s.request_id != request_id)
        for sequence in [s for s in self.running.values() if s.request_id == request_id]:
            self.release(sequence)
