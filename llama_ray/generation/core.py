"""One step of the engine, from the plan to the new tokens, and how a step that fails is retried."""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from llama_ray.generation.backends.runner import Runner, RunnerError, StepLogits
from llama_ray.generation.constraints.grammar import Constraint
from llama_ray.generation.constraints.waiting import ask
from llama_ray.generation.sampling.logprobs import token_logprobs
from llama_ray.generation.sampling.row import DraftRow, Row
from llama_ray.generation.sampling.sampler import Sample, Sampler
from llama_ray.generation.scheduling.scheduler import Scheduler
from llama_ray.generation.scheduling.sequence import Delta, SequenceState
from llama_ray.generation.scheduling.step_plan import Chunk, StepPlan
from llama_ray.generation.speculation.proposer import Proposer, accepted
from llama_ray.generation.stats import StepStats
from llama_ray.utils.errors import first_line
from llama_ray.utils.memory import is_out_of_memory, release_memory
from llama_ray.utils.panics import panics_as_errors

_log = logging.getLogger(__name__)

COUNTS = (
    "steps",
    "prompt_tokens",
    "reused_tokens",
    "generated_tokens",
    "draft_tokens",
    "accepted_tokens",
)


@dataclass(slots=True)
class _Computed:
    """A plan with its logits, and the samples of its complete chunks."""

    plan: StepPlan
    logits: StepLogits
    samples: list[Sample]


@dataclass(slots=True)
class _Outcome:
    """What came of a plan, which a failure splits into one plan for each sequence."""

    computed: list[_Computed]
    failed: list[tuple[SequenceState, str]] = field(default_factory=list)
    """Sequences that could not be computed even alone, and why."""


class Core:
    """Runs the scheduler's plans.

    `lock` is held whenever scheduler or sequences change, and never during a forward pass.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        runner: Runner,
        sampler: Sampler,
        lock: threading.Lock,
        proposer: Proposer | None,
        num_draft_tokens: int,
    ) -> None:
        self._scheduler, self._runner, self._sampler, self._lock = scheduler, runner, sampler, lock
        self._proposer, self._num_draft_tokens = proposer, num_draft_tokens
        self.counts = Counter(dict.fromkeys(COUNTS, 0))
        self.last_step: StepStats | None = None
        # Whether a step reads sequences, and the requests that were aborted meanwhile.
        self._computes, self._aborted = False, set[int]()

    def abort(self, request_id: int) -> None:
        """Drop a request, with the end of a step in progress: that counts on its sequences. `lock` is held."""
        if self._computes:
            self._aborted.add(request_id)
        else:
            self._scheduler.abort(request_id)

    @torch.inference_mode()
    def step(self) -> list[Delta]:
        """See `Engine.step`."""
        start = time.monotonic()
        try:
            while True:
                plan = self._schedule(start)
                if not plan.chunks:
                    return []
                outcome = self._attempt(plan)
                if outcome is not None:
                    return self._record(outcome, len(plan.chunks), start)
        finally:
            with self._lock:
                self._computes = False
                self._drop_aborted()

    def _drop_aborted(self) -> None:
        for request_id in self._aborted:
            self._scheduler.abort(request_id)
        self._aborted.clear()

    def _schedule(self, now: float) -> StepPlan:
        with self._lock:
            self._drop_aborted()
            self._computes = True
            plan = self._scheduler.schedule(self._num_draft_tokens)
            for chunk in plan.chunks:
                for sequence in (chunk.sequence, *chunk.forks):
                    if sequence.stats.started is None:
                        sequence.start(now)
                        self.counts["reused_tokens"] += sequence.stats.reused_tokens
        return plan

    def _attempt(self, plan: StepPlan) -> _Outcome | None:
        """Compute a plan, after an error each of its sequences alone.

        Return None if memory ran out and the scheduler has lowered its limits for another plan.
        """
        try:
            return _Outcome([self._compute(plan)])
        except RunnerError:
            raise
        except Exception as error:
            with self._lock:
                self._scheduler.undo(plan)
                shrunk = is_out_of_memory(error) and self._scheduler.shrink()
            if not shrunk:
                return self._compute_each(plan)
            _log.warning("a step ran out of memory and is repeated with less: %s", first_line(error))
        # The failed step's tensors are free only now that its traceback is gone.
        release_memory()
        return None

    @panics_as_errors()
    def _compute(self, plan: StepPlan) -> _Computed:
        if self._proposer is not None:
            self._proposer.propose(plan)
        _ask_for_masks(plan)
        logits = self._runner.run(plan)
        rows: list[Row] = []
        for chunk in plan.chunks:
            if chunk.complete:
                rows += (chunk.sequence, *chunk.forks)
                rows += [DraftRow(chunk.sequence, chunk.draft[:n]) for n in range(1, len(chunk.draft) + 1)]
        return _Computed(plan, logits, self._sampler.sample(logits.next, rows) if rows else [])

    def _compute_each(self, plan: StepPlan) -> _Outcome:
        """Compute the sequences of a failed plan one at a time, so that only the cause of the error fails."""
        outcome = _Outcome([])
        for chunk in plan.chunks:
            try:
                outcome.computed.append(self._compute(StepPlan([Chunk(chunk.sequence, chunk.length)])))
            except RunnerError:
                raise
            except Exception as error:
                _log.exception("request %d fails", chunk.sequence.request_id)
                outcome.failed.append((chunk.sequence, f"{type(error).__name__}: {first_line(error)}"))
        return outcome

    def _record(self, outcome: _Outcome, num_sequences: int, start: float) -> list[Delta]:
        """Update sequences, scheduler and counters; return the step's deltas."""
        with self._lock:
            before = self.counts.copy()
            deltas: list[Delta] = []
            for computed in outcome.computed:
                self._apply(computed, deltas)
            for sequence, reason in outcome.failed:
                if self._is_wanted(sequence):
                    self._scheduler.finish(sequence)
                    deltas.append(sequence.fail(reason))
            self._scheduler.succeeded()
            self.counts["steps"] += 1
            self.last_step = self._stats(before, num_sequences, time.monotonic() - start)
        return deltas

    def _apply(self, computed: _Computed, deltas: list[Delta]) -> None:
        """Give each sequence what was computed for it, unless it was aborted meanwhile."""
        if computed.logits.reported:
            _report_prompts(computed.logits)
        remaining = iter(computed.samples)
        for chunk in computed.plan.chunks:
            sequence, complete = chunk.sequence, chunk.complete
            end = sequence.computed + chunk.length
            prompt_tokens = min(chunk.length, len(sequence.prompt) - sequence.computed)
            self.counts["prompt_tokens"] += max(prompt_tokens, 0)
            if not complete:
                self._advance(sequence, end)
                continue
            first = next(remaining)
            forks = [(fork, next(remaining)) for fork in chunk.forks]
            samples = accepted(chunk.draft, [first, *itertools.islice(remaining, len(chunk.draft))])
            self.counts["draft_tokens"] += len(chunk.draft)
            self.counts["accepted_tokens"] += len(samples) - 1
            self._append(sequence, end, samples, deltas)
            for fork, sample in forks:
                self._append(fork, end, [sample], deltas)

    def _is_wanted(self, sequence: SequenceState) -> bool:
        return self._scheduler.knows(sequence) and sequence.request_id not in self._aborted

    def _append(
        self, sequence: SequenceState, computed: int, samples: Sequence[Sample], deltas: list[Delta]
    ) -> None:
        """Append sampled tokens to a sequence of which `computed` tokens are in the cache."""
        if not self._is_wanted(sequence):
            return
        if samples[0].pending:
            # The next step computes the last token again.
            self._advance(sequence, computed - 1)
            return
        try:
            with panics_as_errors():
                delta = sequence.append(samples)
        except Exception as error:
            # Its tokens give no text, or its grammar refuses them.
            _log.exception("request %d fails", sequence.request_id)
            delta = sequence.fail(f"{type(error).__name__}: {first_line(error)}")
        self.counts["generated_tokens"] += len(delta.token_ids)
        if delta.error is None:
            # The last token was sampled, not computed.
            self._advance(sequence, computed + len(delta.token_ids) - 1)
        if delta.finish_reason is not None:
            self._scheduler.finish(sequence)
        deltas.append(delta)

    def _advance(self, sequence: SequenceState, computed: int) -> None:
        """Record that keys and values of `computed` tokens are in the cache, and publish full blocks for reuse."""
        if not self._is_wanted(sequence):
            return
        sequence.computed = computed
        pool, digests = self._scheduler.pool, sequence.digests
        size = pool.block_size
        while (end := (len(digests) + 1) * size) <= computed:
            parent = digests[-1] if digests else sequence.cache_seed
            digests.append(
                pool.publish(sequence.blocks[len(digests)], parent, sequence.tokens[end - size : end])
            )

    def _stats(self, before: Counter[str], num_sequences: int, seconds: float) -> StepStats:
        now = self.counts - before
        return StepStats(
            seconds=seconds,
            sequences=num_sequences,
            prompt_tokens=now["prompt_tokens"],
            generated_tokens=now["generated_tokens"],
            draft_tokens=now["draft_tokens"],
            accepted_tokens=now["accepted_tokens"],
        )


def _ask_for_masks(plan: StepPlan) -> None:
    """Have the masks of constrained sequences computed while the model computes."""
    drafts: dict[Constraint, Sequence[int]] = {}
    for chunk in plan.chunks:
        if chunk.complete:
            if (constraint := chunk.sequence.constraint) is not None:
                chunk.draft = constraint.covered(chunk.draft)
                drafts[constraint] = chunk.draft
            drafts |= {fork.constraint: () for fork in chunk.forks if fork.constraint is not None}
    ask(drafts)


def _report_prompts(logits: StepLogits) -> None:
    tokens = [sequence.reported_token(position) for sequence, position in logits.reported]
    numbers = [sequence.params.prompt_logprobs or 0 for sequence, _ in logits.reported]
    reports = token_logprobs(logits.prompt, tokens, numbers, ranks=True)
    for (sequence, position), report in zip(logits.reported, reports, strict=True):
        sequence.prompt_report.add(position, report)
