"""Random requests for engines with few blocks, each of which must get what it gets alone.

`benchmarks/fuzz.py` runs this for minutes, the suite for seconds.
"""

from __future__ import annotations

import gc
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from hypothesis import strategies as st

from llama_ray.data.tokenizing.tokenizer import Tokenizer
from llama_ray.generation.backends.prepare import prepare
from llama_ray.generation.engine import Engine
from llama_ray.generation.sampling.params import SamplingParams
from llama_ray.generation.scheduling.sequence import Delta, SequenceState
from llama_ray.generation.speculation.prompt_lookup import PromptLookup
from tests.small_models import random_model, small_config, small_tokenizer

TEXTS = (
    "def add(a, b):\n    return a + b\n",
    "The quick brown fox jumps, and the dog sleeps on.",
    "漢字 🙂🙃 Zwölf",
)
MAX_SEQ_LEN = 160
SILENCE_S = 120.0
"""Without a token for so long, an engine that has work hangs."""
BUSY = "processor time", "process was lost"
"""In the reason of a request that ended because its grammar exceeded a limit, which depends on the machine."""


@dataclass(frozen=True)
class Asked:
    """A request, the step that it is submitted before, and the number of steps after which it is aborted.

    With `begun_steps` another engine has computed so many steps of it before it is submitted.
    """

    prompt: str | list[int]
    params: SamplingParams
    at_step: int = 0
    abort_after: int | None = None
    begun_steps: int | None = None


@dataclass(frozen=True)
class Outcome:
    """What a request got: the deltas of each candidate, joined, or why it was refused."""

    candidates: tuple[Delta, ...] = ()
    refusal: str = ""
    aborted: bool = False

    @property
    def depends_on_the_machine(self) -> bool:
        """Whether a limit on a grammar's time ended it."""
        reasons = (self.refusal, *(delta.error or "" for delta in self.candidates))
        return any(text in reason for reason in reasons for text in BUSY)


@dataclass
class Report:
    """What was asked and what happened."""

    counts: Counter[str] = field(default_factory=Counter)
    slowest_step_s: float = 0.0
    """Elapsed time."""
    slowest_step_cpu_s: float = 0.0
    """Processor time of the whole process, which other processes of the machine do not lengthen."""


def requests(tokenizer: Tokenizer) -> st.SearchStrategy[list[Asked]]:
    """Return a strategy for requests that arrive while others run."""
    return st.lists(
        st.builds(
            Asked,
            prompt=_prompts(tokenizer.vocab_size),
            params=_params(tokenizer),
            at_step=st.integers(0, 12),
            abort_after=st.none() | st.none() | st.integers(0, 30),
            begun_steps=st.none() | st.none() | st.none() | st.integers(0, 25),
        ),
        min_size=4,
        max_size=14,
    )


def _prompts(vocab_size: int) -> st.SearchStrategy[str | list[int]]:
    """Text, or ids that often begin as those of another prompt."""
    ids = st.lists(st.integers(0, vocab_size - 1), min_size=1, max_size=60)
    shared = st.tuples(st.integers(30, 70), ids).map(lambda pair: [*range(3, 3 + pair[0]), *pair[1][:20]])
    return ids | shared | st.text(max_size=30) | st.sampled_from(TEXTS).map(lambda text: text * 2)


def _params(tokenizer: Tokenizer) -> st.SearchStrategy[SamplingParams]:
    tokens = st.integers(0, tokenizer.vocab_size - 1)
    always = {
        "max_tokens": st.sampled_from([0, 1, 2, 3, 10, 33, 40, 60, 60]),
        "seed": st.integers(-(2**63), 2**64 - 1),
    }
    sometimes: dict[str, st.SearchStrategy[Any]] = {
        "min_tokens": st.integers(0, 10),
        "temperature": st.sampled_from([0.0, 1e-30, 0.7, 1.5, 1e30]),
        "top_k": st.sampled_from([1, 5, 100, 2**31 - 1]),
        "top_p": st.sampled_from([1e-20, 0.5, 0.95]),
        "min_p": st.sampled_from([0.01, 0.5, 1.0]),
        "stop": st.lists(
            st.sampled_from(["e", " the", "\n", "a b", "🙂", "\ufffd", "ne"]), min_size=1, max_size=4
        ),
        "stop_token_ids": st.lists(tokens, max_size=4).map(tuple),
        "repetition_penalty": st.sampled_from([0.001, 0.8, 1.3, 1000.0]),
        "presence_penalty": st.sampled_from([-2.0, 0.5]),
        "frequency_penalty": st.sampled_from([-2.0, 0.5]),
        "logit_bias": st.dictionaries(
            tokens | st.just(tokenizer.eos_id), st.sampled_from([-1e30, 2.0, 9.0, 1e30])
        ),
        "include_stop_str_in_output": st.booleans(),
        "allowed_token_ids": st.sets(tokens | st.just(tokenizer.eos_id), min_size=1).map(tuple),
        "bad_words": st.lists(st.sampled_from(["e", "the", "quick", "🙂", "a b"]), max_size=3).map(tuple),
        "logprobs": st.integers(0, 20),
        "prompt_logprobs": st.integers(0, 20),
        "n": st.integers(1, 5),
        "ignore_eos": st.booleans(),
    }
    values = st.fixed_dictionaries(always, optional=sometimes)
    return st.tuples(values, st.none() | st.none() | _grammars()).map(lambda pair: _allowed(*pair))


def _allowed(values: dict[str, Any], grammar: dict[str, Any] | None) -> SamplingParams:
    values["min_tokens"] = min(values.get("min_tokens", 0), values["max_tokens"])
    if grammar:
        values |= grammar | {"ignore_eos": False}
    return SamplingParams(**values | {"stop": tuple(values.get("stop", ()))})


def _grammars() -> st.SearchStrategy[dict[str, Any]]:
    plain = st.sampled_from(
        [
            {"type": "boolean"},
            {"type": "integer", "minimum": -5, "maximum": 500},
            {"type": "string", "maxLength": 6},
            {"enum": ["a", "bc", "🙂", 1, None]},
        ]
    )
    schemas = st.recursive(
        plain,
        lambda inner: (
            st.dictionaries(st.sampled_from("abc"), inner, max_size=3).map(
                lambda fields: {"type": "object", "properties": fields, "required": [*fields]}
            )
            | inner.map(lambda items: {"type": "array", "items": items, "maxItems": 3})
            | st.lists(inner, min_size=1, max_size=2).map(lambda options: {"anyOf": options})
        ),
        max_leaves=4,
    )
    atoms = st.sampled_from(["a", "[a-f]", r"\d", "(foo|ba)", ".", " ", "é", r"\w", "[^x]", "(", "(a|b)*c"])
    expressions = st.lists(
        st.tuples(atoms, st.sampled_from(["", "?", "+", "{2}", "{1,3}", "*"])), min_size=1, max_size=4
    )
    return schemas.map(lambda schema: {"json_schema": schema}) | expressions.map(
        lambda parts: {"regex": "".join(atom + count for atom, count in parts)}
    )


class Fuzzer:
    """Engines that share one model and are always short of something, and one that answers each request alone."""

    def __init__(self, max_step_cpu_s: float) -> None:
        self.tokenizer = small_tokenizer(TEXTS, 320)
        self.report = Report()
        self._max_step_cpu_s = max_step_cpu_s
        # Those of other tests in this process.
        self._others = {id(sequence) for sequence in _sequences()}
        config = small_config(
            self.tokenizer.vocab_size, hidden_size=48, intermediate_size=96, max_seq_len=MAX_SEQ_LEN
        )
        backend = prepare(random_model(config))

        def engine(blocks: int, **options: Any) -> Engine:
            nbytes = (blocks + 1) * backend.block_bytes
            return Engine(backend, self.tokenizer, kv_cache_memory_bytes=nbytes, **options)

        self._alone = engine(60, max_num_seqs=5, max_num_batched_tokens=400, enable_prefix_caching=False)
        self._crowded = [
            engine(6, max_num_seqs=4, max_num_batched_tokens=16),
            engine(7, max_num_seqs=12, max_num_batched_tokens=40),
            engine(9, max_num_seqs=7, max_num_batched_tokens=64, proposer=PromptLookup()),
            engine(6, max_num_seqs=5, max_num_batched_tokens=9, enable_prefix_caching=False),
        ]

    def check(self, asked: Sequence[Asked], which: int) -> None:
        """Run requests together on one of the engines, and each alone. Raises AssertionError for any difference."""
        together = self._run(self._crowded[which % len(self._crowded)], asked)
        for one, got in zip(asked, together, strict=True):
            [expected] = self._run(self._alone, [Asked(one.prompt, one.params)])
            self._count(one, got)
            if got.depends_on_the_machine or expected.depends_on_the_machine:
                self.report.counts["limits of grammars"] += 1
            elif got.aborted:
                check_beginning(one, got, expected)
            else:
                assert got == expected, f"{one}\ngot {got}\nalone {expected}"

    def finish(self) -> Report:
        """Close the engines and return the report. Raises AssertionError if they hold sequences."""
        for engine in self._crowded:
            self.report.counts["preemptions"] += engine.stats.preemptions
            self.report.counts["evictions"] += engine.stats.evictions
        for engine in (self._alone, *self._crowded):
            engine.close()
        gc.collect()
        left = [sequence for sequence in _sequences() if id(sequence) not in self._others]
        assert not left, f"{len(left)} sequences are still held"
        return self.report

    def _count(self, asked: Asked, got: Outcome) -> None:
        self.report.counts.update(
            {
                "requests": 1,
                "candidates": len(got.candidates),
                "tokens": sum(len(delta.token_ids) for delta in got.candidates),
                "aborts": got.aborted,
                "resumed": asked.begun_steps is not None and not got.refusal,
                "refusals": bool(got.refusal),
                "grammars": asked.params.constrained,
                "errors": sum(delta.error is not None for delta in got.candidates),
            }
        )

    def _run(self, engine: Engine, asked: Sequence[Asked]) -> list[Outcome]:
        """Return the outcome of each request; at the end the engine must hold nothing."""
        waiting = sorted(range(len(asked)), key=lambda i: -asked[i].at_step)
        refusals: dict[int, str] = {}
        ids: dict[int, int] = {}
        due: dict[int, int] = {}
        deltas: dict[tuple[int, int], list[Delta]] = defaultdict(list)
        aborted: set[int] = set()
        step, last = 0, time.monotonic()
        while waiting or engine.has_work:
            while waiting and (asked[waiting[-1]].at_step <= step or not engine.has_work):
                number = waiting.pop()
                try:
                    begun = self._begin(asked[number])
                    done = {index: done_by(candidate) for index, candidate in begun.items()}
                    request = engine.prepare(asked[number].prompt, asked[number].params, done)
                except ValueError as error:
                    refusals[number] = str(error)
                    continue
                ids[number] = engine.add(request)
                deltas |= {(ids[number], index): candidate for index, candidate in begun.items()}
                if (after := asked[number].abort_after) is not None:
                    due[number] = step + after
            for number in [number for number, when in due.items() if when <= step]:
                del due[number]
                if self._unfinished(asked[number], ids[number], deltas):
                    engine.abort(ids[number])
                    aborted.add(number)
            new = self._step(engine)
            for delta in new:
                deltas[delta.request_id, delta.index].append(delta)
            last = time.monotonic() if new else last
            assert time.monotonic() - last < SILENCE_S, f"no token for {SILENCE_S:g} s: {asked}"
            step += 1
        stats = engine.stats
        assert (stats.blocks_in_use, stats.running, stats.waiting) == (0, 0, 0), asked
        return [
            Outcome(
                tuple(
                    _plain(Delta.joined(found))
                    for index in range(asked[i].params.n)
                    if i in ids and (found := deltas.get((ids[i], index)))
                ),
                refusals.get(i, ""),
                i in aborted,
            )
            for i in range(len(asked))
        ]

    def _begin(self, asked: Asked) -> dict[int, list[Delta]]:
        """Return what the first steps of a request give each of its candidates, in an engine that is then lost."""
        if asked.begun_steps is None:
            return {}
        begun: dict[int, list[Delta]] = defaultdict(list)
        request_id = self._alone.submit(asked.prompt, asked.params)
        for _ in range(asked.begun_steps):
            for delta in self._alone.step():
                begun[delta.index].append(delta)
        self._alone.abort(request_id)
        return begun

    def _unfinished(self, asked: Asked, request_id: int, deltas: dict[tuple[int, int], list[Delta]]) -> bool:
        candidates = [deltas.get((request_id, index)) for index in range(asked.params.n)]
        return any(not found or found[-1].finish_reason is None for found in candidates)

    def _step(self, engine: Engine) -> list[Delta]:
        start, cpu_start = time.monotonic(), time.process_time()
        deltas = engine.step()
        seconds, cpu = time.monotonic() - start, time.process_time() - cpu_start
        report = self.report
        report.counts["steps"] += 1
        report.slowest_step_s = max(report.slowest_step_s, seconds)
        report.slowest_step_cpu_s = max(report.slowest_step_cpu_s, cpu)
        assert cpu <= self._max_step_cpu_s, f"a step took {cpu:.2f} s of processor time"
        stats = engine.stats
        assert 0 <= stats.blocks_in_use <= stats.blocks
        return deltas


def done_by(deltas: Sequence[Delta]) -> list[int] | None:
    """Return the tokens of a candidate that has begun, for `Engine.prepare`; None if it is complete."""
    if deltas and deltas[-1].finish_reason is not None:
        return None
    return [token for delta in deltas for token in delta.token_ids]


def check_beginning(asked: Asked, got: Outcome, expected: Outcome) -> None:
    """Raise AssertionError unless what an aborted request got is the beginning of what it gets alone."""
    whole = {delta.index: delta for delta in expected.candidates}
    for delta in got.candidates:
        full = whole[delta.index]
        assert full.token_ids[: len(delta.token_ids)] == delta.token_ids, (asked, delta, full)
        assert full.text.startswith(delta.text), (asked, delta, full)
        assert delta.prompt_logprobs == full.prompt_logprobs, (asked, delta, full)
        if delta.logprobs is not None:
            assert full.logprobs is not None
            assert full.logprobs[: len(delta.logprobs)] == delta.logprobs, (asked, delta, full)


def _plain(delta: Delta) -> Delta:
    """Return a delta without what differs between runs: the request's number and its times."""
    return Delta(
        0,
        delta.index,
        delta.text,
        delta.token_ids,
        delta.logprobs,
        delta.finish_reason,
        delta.error,
        delta.prompt_logprobs,
        stop_reason=delta.stop_reason,
    )


def _sequences() -> list[SequenceState]:
    return [thing for thing in gc.get_objects() if type(thing) is SequenceState]
