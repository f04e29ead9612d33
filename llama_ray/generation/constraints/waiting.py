"""Asking for the masks of a step, and waiting for them no longer than the step's other sequences can bear."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Mapping
from multiprocessing.connection import Connection, wait

from llama_ray.generation.constraints.grammar import Constraint, Draft, Grammar
from llama_ray.generation.constraints.limits import LONE_WAIT_S, REFILL_S, STEP_WAIT_S

Drafts = Mapping[Constraint, Draft]
"""For each constraint the draft whose positions are sampled in a step."""


def ask(drafts: Drafts) -> list[Connection]:
    """Ask for the masks that have not been asked for; return where answers are outstanding. Does not wait."""
    by_grammar: dict[Grammar, list[tuple[Constraint, Draft]]] = defaultdict(list)
    for constraint, draft in drafts.items():
        if not constraint.settled:
            by_grammar[constraint.grammar].append((constraint, draft))
    connections = [grammar.ask(wanted) for grammar, wanted in by_grammar.items()]
    return [connection for connection in connections if connection is not None]


class Patience:
    """How long steps wait for masks: a few milliseconds each, unless they can do nothing without."""

    def __init__(self) -> None:
        self._left_s = STEP_WAIT_S

    def wait(self, drafts: Drafts, *, alone: bool) -> None:
        """Wait for the masks of a step; `alone` means that it samples no position without a mask."""
        self._left_s = min(self._left_s + REFILL_S, STEP_WAIT_S)
        start = time.monotonic()
        _wait(drafts, start + self._left_s, len(drafts))
        self._left_s = max(self._left_s - (time.monotonic() - start), 0.0)
        if alone:
            _wait(drafts, start + LONE_WAIT_S, 1)


def _wait(drafts: Drafts, deadline: float, enough: int) -> None:
    """Wait until so many constraints are settled."""
    while True:
        outstanding = ask(drafts)
        remaining = deadline - time.monotonic()
        if not outstanding or remaining <= 0 or sum(c.settled for c in drafts) >= enough:
            return
        wait(outstanding, remaining)
