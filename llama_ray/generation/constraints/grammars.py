"""The grammars of an engine: what can be enforced is found out once, in a process of its own, at a bounded cost."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Collection
from importlib.util import find_spec

from llama_ray.data.tokenizing.tokenizer import Tokenizer
from llama_ray.generation.constraints.grammar import Constraint, Grammar
from llama_ray.generation.constraints.limits import (
    COMPILE_CPU_S,
    MAX_CACHED_GRAMMARS,
    MAX_IDLE_PROCESSES,
    MAX_SLOW,
    MEMORY_BYTES,
    QUICK_CPU_S,
    QUICK_LANES,
    QUICK_NICE,
    SLOW_LANES,
    SLOW_NICE,
    WALL_CLOCK_FACTOR,
)
from llama_ray.generation.constraints.messages import Kind
from llama_ray.generation.constraints.processes import Death, GrammarProcess, Template

_ATTEMPTS = 3
"""Times to begin again when a process is lost that has not exceeded its limits."""
_START_TIMEOUT_S, _NEWS_TIMEOUT_S = 120.0, 30.0
"""For the template to read the tokenizer, and to tell of a death, on a machine that is busy."""


class Grammars:
    """Makes constraints for one tokenizer and model. Safe to call from any thread.

    `vocab_size` is the model's; ids that the tokenizer does not know are never allowed. `eos_ids` are the tokens that
    may end an output; `compile_cpu_s` is the processor time that compiling a grammar may take. Processes start with the
    first constraint, and end with `close` or with this object.
    """

    def __init__(
        self,
        tokenizer: Tokenizer | None,
        vocab_size: int,
        eos_ids: Collection[int],
        *,
        compile_cpu_s: float = COMPILE_CPU_S,
    ) -> None:
        self._compile_cpu_s = compile_cpu_s
        self._missing: str | None = None
        eos_ids = sorted(eos_ids)
        if tokenizer is None or not eos_ids:
            self._missing = f"a model with {'a tokenizer' if tokenizer is None else 'an end-of-text token'}"
        elif find_spec("llguidance") is None:
            self._missing = "the package llguidance"
        # Now rather than at the first request, whose neighbours would wait for a large vocabulary.
        json = "" if tokenizer is None or self._missing else tokenizer.to_json(vocab_size)
        self._template = Template(json, vocab_size, eos_ids)
        self._quick = threading.BoundedSemaphore(QUICK_LANES)
        self._slow = threading.BoundedSemaphore(SLOW_LANES)
        self._room = threading.BoundedSemaphore(MAX_SLOW)
        # Guards the rest, whose most recently used entries come last.
        self._lock = threading.Lock()
        self._known: OrderedDict[tuple[Kind, bytes], Grammar] = OrderedDict()
        self._running: OrderedDict[int, Grammar] = OrderedDict()

    def constraints(self, kind: Kind, text: str, count: int) -> list[Constraint]:
        """Return constraints for `count` empty outputs; waits while the grammar is compiled.

        Raises ValueError if it cannot be enforced within the limits, or the model has no tokenizer or no end-of-text
        token.
        """
        if self._missing is not None:
            raise ValueError(f"{kind} needs {self._missing}, which is missing here")
        grammar = self._grammar(kind, text.encode())
        with grammar.checking:
            if not grammar.checked:
                self._check(grammar)
                grammar.checked = True
        if grammar.refusal is not None:
            raise ValueError(f"{kind} cannot be enforced: {grammar.refusal}")
        return [Constraint(grammar) for _ in range(count)]

    def close(self) -> None:
        """End all processes; grammars then cannot be compiled or followed any more."""
        self._template.close()

    def _grammar(self, kind: Kind, text: bytes) -> Grammar:
        with self._lock:
            grammar = self._known.get((kind, text))
            if grammar is None:
                grammar = Grammar(kind, text, self._restart, self._template.death_of)
                self._known[kind, text] = grammar
                if len(self._known) > MAX_CACHED_GRAMMARS:
                    self._known.popitem(last=False)
            self._known.move_to_end((kind, text))
            return grammar

    def _check(self, grammar: Grammar) -> None:
        """Compile a grammar; then it has a process, or a refusal. Raises ValueError for what may pass later."""
        for _ in range(_ATTEMPTS):
            with self._quick:
                death = self._attempt(grammar, QUICK_CPU_S, QUICK_NICE)
            if death is not None and (death.of_time or death.of_waiting):
                death = self._attempt_slowly(grammar)
            if death is None:
                return
            grammar.refusal = self._refusal(death)
            if grammar.refusal is not None:
                return
            if death.of_waiting:
                raise _for_now(grammar, f"{self._compile_cpu_s * WALL_CLOCK_FACTOR:g} s to compile")
        raise RuntimeError(f"the process that compiles a {grammar.kind} was lost {_ATTEMPTS} times ({death})")

    def _refusal(self, death: Death) -> str | None:
        """Return what is wrong with a grammar whose process ended; None if nothing may be."""
        if self._template.refusal is not None:
            return f"this tokenizer cannot be used: {self._template.refusal}"
        if death.of_time:
            return f"it takes more than {self._compile_cpu_s:g} s of processor time to compile; simplify it"
        if death.of_cost:
            limit = f"{MEMORY_BYTES >> 20} MiB"
            return f"it takes more than {limit} of memory to compile, or crashes ({death}); simplify it"
        return None

    def _attempt_slowly(self, grammar: Grammar) -> Death | None:
        """Attempt it with all the processor time that there is. Raises ValueError if too many others want that."""
        if not self._room.acquire(blocking=False):
            raise _for_now(
                grammar, f"{QUICK_CPU_S:g} s of processor time to compile, as {MAX_SLOW} others do now"
            )
        try:
            with self._slow:
                return self._attempt(grammar, self._compile_cpu_s, SLOW_NICE)
        finally:
            self._room.release()

    def _attempt(self, grammar: Grammar, cpu_s: float, nice: int) -> Death | None:
        """Compile a grammar; return how its process ended, or None if the grammar has it, or a refusal, now."""
        process = self._template.start(grammar.kind, grammar.text, cpu_s, nice)
        try:
            if not process.has_news(_START_TIMEOUT_S + cpu_s * WALL_CLOCK_FACTOR):
                return Death(None)
            grammar.refusal = process.read()
        except (EOFError, OSError):
            return self._template.death_of(process, _NEWS_TIMEOUT_S)
        finally:
            if process.busy:
                process.close()
        if grammar.refusal is None:
            grammar.adopt(process)
            self._note_running(grammar)
        return None

    def _restart(self, grammar: Grammar) -> GrammarProcess:
        """Start a process for a grammar that is known to compile."""
        self._note_running(grammar)
        return self._template.start(grammar.kind, grammar.text, self._compile_cpu_s, QUICK_NICE)

    def _note_running(self, grammar: Grammar) -> None:
        """Note that a grammar has a process, and end those that have waited longest for a candidate."""
        with self._lock:
            self._running[id(grammar)] = grammar
            self._running.move_to_end(id(grammar))
            for old in list(self._running.values())[:-MAX_IDLE_PROCESSES]:
                if old.retire():
                    del self._running[id(old)]


def _for_now(grammar: Grammar, cost: str) -> ValueError:
    return ValueError(
        f"{grammar.kind} cannot be enforced: it takes more than {cost}; simplify it, or try again later"
    )
