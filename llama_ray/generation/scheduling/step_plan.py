"""What one step computes, as the scheduler decides it and runners and proposers read it."""

from __future__ import annotations

from dataclasses import dataclass, field

from llama_ray.generation.scheduling.sequence import SequenceState


@dataclass(slots=True)
class Chunk:
    """Tokens of one sequence that a step computes: `length` tokens from position `sequence.computed` on, then `draft`.

    A proposer may fill `draft` with up to `draft_room` tokens; the sequence holds blocks for them.
    """

    sequence: SequenceState
    length: int
    draft_room: int = 0
    forks: list[SequenceState] = field(default_factory=list)
    """Other candidates of the same request that start from this chunk's logits."""
    draft: list[int] = field(default_factory=list)

    @property
    def complete(self) -> bool:
        """Whether the chunk reaches the sequence's last token, so that the next one can be sampled."""
        return self.sequence.computed + self.length == len(self.sequence.tokens)


@dataclass(slots=True)
class StepPlan:
    """One step: copy blocks, then compute chunks."""

    chunks: list[Chunk] = field(default_factory=list)
    copies: list[tuple[int, int]] = field(default_factory=list)
    """(source, target) block numbers."""

    def drop(self, sequence: SequenceState) -> None:
        """Remove a sequence from the step, as the sequence of a chunk and as a fork."""
        self.chunks = [chunk for chunk in self.chunks if chunk.sequence is not sequence]
        for chunk in self.chunks:
            if sequence in chunk.forks:
                chunk.forks.remove(sequence)
