"""Guesses from the text itself: what followed these words before."""

from __future__ import annotations

from weakref import WeakKeyDictionary

from llama_ray.generation.scheduling.sequence import SequenceState
from llama_ray.generation.scheduling.step_plan import StepPlan


class PromptLookup:
    """Guesses that what followed the last few tokens before will follow them again (Saxena 2023, prompt lookup).

    The longest of the last `longest` to `shortest` tokens that occurred before counts, where it did so last.
    """

    def __init__(self, longest: int = 4, shortest: int = 2) -> None:
        if not 1 <= shortest <= longest:
            raise ValueError(
                f"shortest is {shortest} and longest is {longest}; 1 <= shortest <= longest must hold"
            )
        self._widths = range(longest, shortest - 1, -1)
        self._seen: WeakKeyDictionary[SequenceState, _Seen] = WeakKeyDictionary()

    def propose(self, plan: StepPlan) -> None:
        """See `Proposer`."""
        for chunk in plan.chunks:
            if chunk.draft_room:
                chunk.draft = self._continuation(chunk.sequence, chunk.draft_room)

    def check(self, vocab_size: int, max_seq_len: int) -> None:
        """See `Proposer`: it can for any."""

    @property
    def block_bytes(self) -> int:
        """See `Proposer`."""
        return 0

    def reserve(self, num_blocks: int, max_num_seqs: int, max_seq_len: int) -> None:
        """See `Proposer`."""

    def _continuation(self, sequence: SequenceState, room: int) -> list[int]:
        tokens = sequence.tokens
        seen = self._seen.setdefault(sequence, _Seen())
        for end in range(seen.length, len(tokens)):
            for width in self._widths:
                if width <= end:
                    seen.ends[tuple(tokens[end - width : end])] = end
        seen.length = len(tokens)
        for width in self._widths:
            found = seen.ends.get(tuple(tokens[-width:]))
            if found is not None:
                guess = tokens[found : found + room]
                # Where that is all there is, it repeats itself.
                return (guess * (room // len(guess) + 1))[:room]
        return []


class _Seen:
    """Where each n-gram of a sequence ended last, for those among its first `length` tokens that something follows."""

    def __init__(self) -> None:
        self.length = 1
        self.ends: dict[tuple[int, ...], int] = {}
