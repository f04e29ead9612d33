"""Which windows each step of a run takes."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from llama_ray.data.mixtures.order import Phase
from llama_ray.data.mixtures.stages import Segment


@dataclass(frozen=True)
class Timetable:
    """The steps of a run of which `step` are done, which have taken `position` windows.

    A run that was resumed with another global batch has taken other steps than its segments say, so what lies behind
    is recorded: `begun` are the positions at which the segments began that a step that is done belongs to.
    """

    segments: Sequence[Segment]
    step: int = 0
    position: int = 0
    begun: Sequence[int] = ()

    @cached_property
    def starts(self) -> list[int]:
        """The position at which each segment begins."""
        found = list(self.begun)
        step, position = self.step, self.position
        windows = self.segments[len(found) - 1].windows if found else 0
        for segment in self.segments[len(found) :]:
            position += (segment.from_step - 1 - step) * windows
            step, windows = segment.from_step - 1, segment.windows
            found.append(position)
        return found

    def segment(self, step: int) -> Segment:
        """Return the segment that `step`, counted from 1, belongs to."""
        return self.segments[self._number(step)]

    def ahead(self, last: int) -> Sequence[Segment]:
        """Return the segments of the steps from the next one to `last`."""
        first = self._number(self.step + 1)
        return [segment for segment in self.segments[first:] if segment.from_step <= last]

    def position_after(self, step: int) -> int:
        """Return the windows taken in the first `step` steps, which are not fewer than those that are done."""
        if step == self.step:
            return self.position
        number = self._number(step)
        before, position = self._anchor(number)
        return position + (step - before) * self.segments[number].windows

    def steps_within(self, windows: int) -> int:
        """Return the largest number of steps that take at most `windows` windows; at least those that are done."""
        number = max(bisect_right(self.starts, windows) - 1, len(self.begun) - 1, 0)
        before, position = self._anchor(number)
        return before + max(windows - position, 0) // self.segments[number].windows

    def phases(self) -> list[Phase]:
        """Return the phases of the order that the segments make."""
        return [
            Phase(start, segment.shares) for start, segment in zip(self.starts, self.segments, strict=True)
        ]

    def _number(self, step: int) -> int:
        return bisect_right(self.segments, step, key=lambda segment: segment.from_step) - 1

    def _anchor(self, number: int) -> tuple[int, int]:
        """Return a step, and the position after it, from which on the segment's steps are alike."""
        if number < len(self.begun):
            return self.step, self.position
        return self.segments[number].from_step - 1, self.starts[number]
