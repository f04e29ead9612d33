"""The process of one grammar: compiles it, then computes the masks of the candidates that follow it.

It may cost more than it is allowed to: then the kernel ends it, and with it nothing but its grammar's candidates.
"""

from __future__ import annotations

import ctypes
import itertools
import mmap
import os
import resource
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path

from llguidance import LLExecutor, LLMatcher, LLParserLimits, LLTokenizer

from llama_ray.generation.constraints.limits import (
    MEMORY_BYTES,
    WALL_CLOCK_FACTOR,
    mask_limit_s,
)
from llama_ray.generation.constraints.messages import Answer, Job, Question, receive, send

_NO_EXTENSION = "NoExtension"
_TRIAL_TOKENS = 4
_LOWEST_PRIORITY = 19


def serve_masks(job: Job, connection: Connection, memory: int, tokenizer: LLTokenizer) -> None:
    """Compile the grammar of `job`, tell what is wrong with it (None: nothing), then answer until the engine leaves.

    `memory` is the descriptor of what the process shares with the engine.
    """
    _limit_memory()
    shared = mmap.mmap(memory, 0)
    with _limit_time(job.cpu_s):
        matcher, error = _compile(job, bytes(shared[: job.length]).decode(), tokenizer)
    send(connection, error)
    if matcher is not None:
        candidates = _Candidates(matcher, shared, tokenizer.vocab_size)
        while True:
            candidates.answer(connection)


class _Candidates:
    """The states of all candidates that follow one grammar."""

    def __init__(self, initial: LLMatcher, shared: mmap.mmap, vocab_size: int) -> None:
        self._initial = initial
        self._matchers: dict[int, LLMatcher] = {}
        self._mask_bytes = (vocab_size + 31) // 32 * 4
        self._shared_bytes = len(shared)
        # The buffer is kept by the array, and its address stays.
        self._buffer = (ctypes.c_char * len(shared)).from_buffer(shared)
        self._address = ctypes.addressof(self._buffer)
        self._threads: LLExecutor | None = None

    def answer(self, connection: Connection) -> None:
        """Wait for a message, and answer it."""
        forgotten, questions = receive(connection)
        for candidate in forgotten:
            self._matchers.pop(candidate, None)
        questions = [Question(*question) for question in questions]
        ends = list(itertools.accumulate(1 + len(question.draft) for question in questions))
        firsts = [0, *ends[:-1]]
        with _limit_time(mask_limit_s(ends[-1])):
            matchers = [self._advance(question) for question in questions]
            self._compute([pair for pair in zip(matchers, firsts, strict=True) if not pair[0].is_stopped()])
            answers = [
                self._follow_draft(matcher, question.draft, first)
                for matcher, question, first in zip(matchers, questions, firsts, strict=True)
            ]
        send(connection, answers)

    def _advance(self, question: Question) -> LLMatcher:
        matcher = self._matchers.get(question.candidate)
        if matcher is None:
            matcher = self._matchers[question.candidate] = self._initial.deep_copy()
        matcher.consume_tokens(question.tokens)
        return matcher

    def _compute(self, masks: list[tuple[LLMatcher, int]]) -> None:
        """Write the mask of each state to its place in the shared memory."""
        if len(masks) == 1:
            ((matcher, place),) = masks
            matcher.unsafe_compute_mask_ptr(self._address + place * self._mask_bytes, self._mask_bytes)
        elif masks:
            # Its threads start only if there is something to share.
            self._threads = self._threads or LLExecutor()
            places = self._shared_bytes // self._mask_bytes
            self._threads.unsafe_compute_mask_ptr(masks, self._address, self._mask_bytes, places)

    def _follow_draft(self, matcher: LLMatcher, draft: list[int], first: int) -> Answer:
        """Return the answer for a state whose own mask has been computed."""
        if draft:
            # A state does not recover from an error, and the draft may not be what comes.
            matcher = matcher.deep_copy()
        for position, draft_token in enumerate((*draft, None)):
            if position and not matcher.is_stopped():
                self._compute([(matcher, first + position)])
            if matcher.is_error():
                return Answer(first, position, None, one_line(matcher.get_error()))
            if matcher.is_stopped():
                return Answer(first, position, position, None)
            if draft_token is None or not matcher.try_consume_tokens([draft_token]):
                break
        return Answer(first, position + 1, None, None)


def _compile(job: Job, text: str, tokenizer: LLTokenizer) -> tuple[LLMatcher | None, str | None]:
    """Return the grammar's initial state with its first mask computed, or what is wrong with it."""
    compiled: list[LLMatcher] = []
    failed: list[str] = []

    def compile_() -> None:
        # The priority is this thread's alone. The engine's own may be low already.
        own = os.getpriority(os.PRIO_PROCESS, 0)
        os.setpriority(os.PRIO_PROCESS, 0, min(own + job.nice, _LOWEST_PRIORITY))
        try:
            compiled.append(_matcher(job, text, tokenizer))
        except BaseException as error:  # A panic of the library is no Exception.
            failed.append(one_line(str(error)))

    thread = threading.Thread(target=compile_)
    thread.start()
    thread.join()
    if failed:
        return None, failed[0]
    return compiled[0], None


def _matcher(job: Job, text: str, tokenizer: LLTokenizer) -> LLMatcher:
    if job.kind == "regex":
        grammar = LLMatcher.grammar_from_regex(text)
    else:
        # JSON allows any amount of whitespace between its parts, but a model that begins to repeat it might never end.
        whitespace = {"whitespace_pattern": r"[\x20\x0A\x0D\x09]{1,64}"}
        grammar = LLMatcher.grammar_from_json_schema(text, defaults=whitespace)  # type: ignore[arg-type]
    matcher = LLMatcher(tokenizer, grammar, log_level=0, limits=LLParserLimits(verbose_errors=False))
    if not matcher.is_error() and not matcher.is_stopped():
        # The first mask is often the most costly one, and tells whether there is any output at all.
        matcher.compute_bitmask()
    if matcher.is_error():
        raise ValueError(matcher.get_error())
    _try_out(matcher.deep_copy())
    return matcher


def _try_out(matcher: LLMatcher) -> None:
    """Follow the grammar for some tokens; raise ValueError if it grows too complex at once."""
    for _ in range(_TRIAL_TOKENS):
        if matcher.is_stopped():
            break
        mask = int.from_bytes(matcher.compute_bitmask(), "little")
        # The lowest token that is allowed.
        matcher.consume_token((mask & -mask).bit_length() - 1)
    # The vocabulary may be unable to spell this one output; any other error is a limit of the parser.
    if matcher.is_error() and not matcher.get_error().startswith(_NO_EXTENSION):
        raise ValueError(f"it grows too complex while it is followed ({matcher.get_error()}); simplify it")


def one_line(message: str, limit: int = 300) -> str:
    """Return a message of llguidance as one line of at most `limit` characters."""
    line = " ".join(message.replace("<non-verbose/>", "").split())
    if "regex parse error" in line:
        # The cause comes after the whole expression.
        line = line.rpartition("error: ")[2].partition(" 1 |")[0]
    if line.startswith(_NO_EXTENSION):
        line = "no token of this model's vocabulary can begin or continue what it allows"
    return line if len(line) <= limit else line[: limit - 3] + "..."


@contextmanager
def _limit_time(cpu_s: float) -> Iterator[None]:
    """Let the kernel end this process if the block takes longer, whatever library code is running."""
    signal.setitimer(signal.ITIMER_PROF, cpu_s)
    signal.setitimer(signal.ITIMER_REAL, cpu_s * WALL_CLOCK_FACTOR)
    yield
    signal.setitimer(signal.ITIMER_PROF, 0)
    signal.setitimer(signal.ITIMER_REAL, 0)


def _limit_memory() -> None:
    # Data rather than addresses: allocators reserve far more of these than they use.
    used = int(Path("/proc/self/statm").read_text().split()[5]) * mmap.PAGESIZE
    resource.setrlimit(resource.RLIMIT_DATA, (used + MEMORY_BYTES,) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
