"""One grammar with its process, and the candidates that follow it."""

from __future__ import annotations

import itertools
import logging
import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection

import numpy as np
from numpy.typing import NDArray

from llama_ray.generation.constraints.limits import MASK_CPU_S, MAX_MASKS, MEMORY_BYTES
from llama_ray.generation.constraints.messages import Answer, Kind, Question
from llama_ray.generation.constraints.processes import Death, GrammarProcess

_log = logging.getLogger(__name__)

_MAX_LOSSES = 3
"""Times in a row that a grammar's process may be lost, not by its own cost, before its candidates end."""

_NEWS_TIMEOUT_S = 0.1
"""How long a step waits to hear why a process has gone."""

Draft = Sequence[int]


@dataclass(frozen=True)
class Ending:
    """The output ends without a further token: it is complete, or cannot go on for a `reason`."""

    reason: str | None = None


@dataclass(frozen=True)
class _Masks:
    """Masks for a position and for those after the tokens of a draft, uint8 [positions, bytes]; see `Answer`."""

    bits: NDArray[np.uint8]
    finished: int | None
    error: str | None


class Constraint:
    """Which tokens may come next in one candidate. Use it from one thread at a time.

    `waiting.ask` has masks computed for the position after the tokens that were pushed, and for those after each token
    of a draft. `outcome` returns them once they are there.
    """

    def __init__(self, grammar: Grammar) -> None:
        self.grammar = grammar
        self.number: int | None = None
        self._tokens: list[int] = []
        # The process that knows this candidate, and how many of its tokens.
        self._process: GrammarProcess | None = None
        self._known = 0
        self._draft: list[int] | None = None
        self._masks: _Masks | None = None

    def push(self, token: int) -> None:
        """Advance by the next token of the output."""
        self._tokens.append(token)
        self._draft = self._masks = None

    def covered(self, draft: Draft) -> list[int]:
        """Return the beginning of a draft that masks have been asked for, or can be if none have since the last token.

        The positions after it cannot be sampled in this step.
        """
        if self._draft is None:
            return list(draft[: MAX_MASKS - 1])
        pairs = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(draft, self._draft, strict=False))
        return [token for token, _ in pairs]

    def outcome(self, draft: Draft) -> NDArray[np.uint8] | Ending | None:
        """Return which tokens may follow `draft`, as bits by token id, least significant first, uint8 [bytes].

        None: the mask has not come yet. `draft` is the beginning of what was asked for; after a token of it that is not
        allowed the bits are arbitrary: no token drawn there is ever accepted.
        """
        if self.grammar.refusal is not None:
            return Ending(self.grammar.refusal)
        masks, position = self._masks, len(draft)
        if masks is None:
            return None
        if masks.finished is not None and position >= masks.finished:
            return Ending()
        if masks.error is not None and position >= len(masks.bits):
            return Ending(masks.error)
        bits: NDArray[np.uint8] = masks.bits[min(position, len(masks.bits) - 1)]
        return bits

    @property
    def wanting(self) -> bool:
        """Whether no masks have been asked for since the last token."""
        return self._draft is None

    @property
    def settled(self) -> bool:
        """Whether `outcome` has an answer."""
        return self._masks is not None or self.grammar.refusal is not None

    def question(self, number: int, draft: Draft, process: GrammarProcess) -> Question:
        """Return what to ask `process`, which knows this candidate by `number`."""
        if self._process is not process:
            self._process, self._known = process, 0
        tokens, self._known = self._tokens[self._known :], len(self._tokens)
        self.number, self._draft = number, list(draft)
        return Question(number, tokens, self._draft)

    def take(self, answer: Answer, process: GrammarProcess) -> None:
        """Take the masks that were asked for."""
        bits = process.masks[answer.first : answer.first + answer.masks].copy()
        self._masks = _Masks(bits, answer.finished, answer.error)

    def retract(self) -> None:
        """Forget what was asked, since no answer will come."""
        self._draft = None


class Grammar:
    """A grammar that can be enforced, unless it has a `refusal`. Its process is started again when it is missing.

    `start` starts one, and `death_of` tells why one has gone. Safe to call from any thread.
    """

    def __init__(
        self,
        kind: Kind,
        text: bytes,
        start: Callable[[Grammar], GrammarProcess],
        death_of: Callable[[GrammarProcess, float], Death],
    ) -> None:
        self.kind, self.text = kind, text
        self.checking = threading.Lock()
        self.checked = False
        self.refusal: str | None = None
        self._start, self._death_of = start, death_of
        # Guards the rest.
        self._lock = threading.Lock()
        self._process: GrammarProcess | None = None
        self._pending: list[Constraint] = []
        self._losses = 0
        self._numbers = itertools.count()
        # Changed by finalizers, too, which run at any moment and so take no lock.
        self._followers: set[int] = set()
        self._forgotten: list[int] = []

    def adopt(self, process: GrammarProcess) -> None:
        """Use a process that has compiled this grammar."""
        with self._lock:
            self._process = process

    def retire(self) -> bool:
        """End the process unless a candidate follows it; return whether there is none now."""
        if not self._lock.acquire(blocking=False):
            return False
        try:
            process = self._process
            if process is not None and not process.busy and not self._followers:
                process.close()
                self._process = None
            return self._process is None
        finally:
            self._lock.release()

    def ask(self, drafts: Sequence[tuple[Constraint, Draft]]) -> Connection | None:
        """Take what has come, ask for what is missing, and return the connection if an answer is outstanding."""
        with self._lock:
            self._take_news()
            wanting = [(constraint, draft) for constraint, draft in drafts if constraint.wanting]
            if wanting and self.refusal is None:
                self._send(wanting)
            process = self._process
            return process.connection if process is not None and process.busy else None

    def _send(self, wanting: Sequence[tuple[Constraint, Draft]]) -> None:
        if self._process is None:
            self._process = self._start(self)
        if self._process.busy:
            return
        questions: list[Question] = []
        room = MAX_MASKS
        for constraint, draft in wanting:
            room -= 1 + len(draft)
            if room < 0:
                break
            number = self._follow(constraint) if constraint.number is None else constraint.number
            questions.append(constraint.question(number, draft, self._process))
            self._pending.append(constraint)
        forgotten, self._forgotten = self._forgotten, []
        self._process.send([forgotten, questions])

    def _follow(self, constraint: Constraint) -> int:
        number = next(self._numbers)
        self._followers.add(number)
        weakref.finalize(constraint, self._forget, number).atexit = False
        return number

    def _forget(self, number: int) -> None:
        self._followers.discard(number)
        self._forgotten.append(number)

    def _take_news(self) -> None:
        process = self._process
        if process is None or not process.has_news():
            return
        pending, self._pending = self._pending, []
        try:
            message = process.read()
        except (EOFError, OSError):
            self._lose(process, pending)
            return
        if not pending:
            # The process is a new one, and this is what it says of the grammar.
            self.refusal = message
            return
        self._losses = 0
        for constraint, answer in zip(pending, message, strict=True):
            constraint.take(Answer(*answer), process)

    def _lose(self, process: GrammarProcess, pending: Sequence[Constraint]) -> None:
        """End all candidates if the process died of its own cost; otherwise another process will go on."""
        process.close()
        self._process = None
        for constraint in pending:
            constraint.retract()
        death = self._death_of(process, _NEWS_TIMEOUT_S)
        self._losses += 1
        if death.of_time:
            self.refusal = f"a mask takes more than {MASK_CPU_S:g} s of processor time; simplify it"
        elif death.of_cost:
            limit = f"{MEMORY_BYTES >> 20} MiB"
            self.refusal = f"its masks take more than {limit} of memory, or crash ({death}); simplify it"
        elif self._losses > _MAX_LOSSES:
            self.refusal = f"its process was lost {self._losses} times; {death}"
        else:
            _log.warning("a process that follows a %s was lost (%s); another one goes on", self.kind, death)
