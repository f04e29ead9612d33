"""Draft tokens from the text itself: those that followed the same words before."""

from __future__ import annotations

from weakref import WeakKeyDictionary

from llama_ray.generation.scheduling.sequence import SequenceState
from llama_ray.generation.scheduling.step_plan import StepPlan


class PromptLookup:
    """Drafts the tokens that followed the last n-gram when it occurred before (Saxena 2023, prompt lookup decoding).

    Tries n from `longest` to `shortest`, and of several occurrences takes the last one.
    """

    def __init__(self, longest: int = 4, shortest: int = 2) -> None:
        if not 1 <= shortest <= longest:
            raise ValueError(
                f"shortest is {shortest} and longest is {longest}; they must be 1 <= shortest <= longest"
            )
        self._widths = range(longest, shortest - 1, -1)
        self._indices: WeakKeyDictionary[SequenceState, _NgramIndex] = WeakKeyDictionary()

    def propose(self, plan: StepPlan) -> None:
        """See `Proposer`."""
        for chunk in plan.chunks:
            if chunk.draft_room:
                chunk.draft = self._continuation(chunk.sequence, chunk.draft_room)

    def check(self, vocab_size: int, max_seq_len: int) -> None:
        """See `Proposer`; any model will do."""

    @property
    def block_bytes(self) -> int:
        """See `Proposer`."""
        return 0

    def reserve(self, num_blocks: int, max_num_seqs: int, max_seq_len: int) -> None:
        """See `Proposer`; there is no cache."""

    def _continuation(self, sequence: SequenceState, room: int) -> list[int]:
        tokens = sequence.tokens
        index = self._indices.setdefault(sequence, _NgramIndex())
        for end in range(index.length, len(tokens)):
            for width in self._widths:
                if width <= end:
                    index.ends[tuple(tokens[end - width : end])] = end
        index.length = len(tokens)
        for width in self._widths:
            found = index.ends.get(tuple(tokens[-width:]))
            if found is not None:
                draft = tokens[found : found + room]
                # A continuation shorter than the room is repeated.
                return (draft * (room // len(draft) + 1))[:room]
        return []


class _NgramIndex:
    """The end of each n-gram's last occurrence, for n-grams before the last of a sequence's first `length` tokens."""

    def __init__(self) -> None:
        self.length = 1
        self.ends: dict[tuple[int, ...], int] = {}
