"""One step of the engine, from the schedule to the new tokens; and what becomes of a step that fails."""

from __future__ import annotations

import gc
import itertools
import logging
import threading
import time
from collections import Counter
from collections.abc import Sequence

import torch

from llama_ray.generation.runner import Runner, RunnerError, StepLogits
from llama_ray.generation.sampling.logprobs import token_logprobs
from llama_ray.generation.sampling.row import DraftRow, Row
from llama_ray.generation.sampling.sampler import Sample, Sampler
from llama_ray.generation.scheduling.scheduler import Scheduler
from llama_ray.generation.scheduling.sequence import Delta, SequenceState
from llama_ray.generation.scheduling.step_plan import Chunk, StepPlan
from llama_ray.generation.speculation.proposer import Proposer, accepted
from llama_ray.generation.stats import StepStats
from llama_ray.utils.errors import first_line
from llama_ray.utils.memory import is_out_of_memory

_log = logging.getLogger(__name__)

COUNTS = (
    "steps", "prompt_tokens", "reused_tokens", "generated_tokens", "draft_tokens", "accepted_tokens"
)  # fmt: skip

Computed = tuple[StepPlan, StepLogits, list[Sample]]


class Core:
    """Runs the scheduler's plans. `lock` is held whenever scheduler or sequences change, never while computing."""

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

    @torch.inference_mode()
    def step(self) -> list[Delta]:
        """See `Engine.step`."""
        start = time.monotonic()
        while True:
            with self._lock:
                plan = self._scheduler.schedule(self._num_draft_tokens)
                for chunk in plan.chunks:
                    for sequence in (chunk.sequence, *chunk.forks):
                        if sequence.stats.started is None:
                            sequence.stats.started = start
                            self.counts["reused_tokens"] += min(sequence.reused, len(sequence.prompt))
            if not plan.chunks:
                return []
            failed: list[tuple[SequenceState, str]] = []
            try:
                done = [self._compute(plan)]
            except RunnerError:
                raise
            except Exception as e:
                with self._lock:
                    self._scheduler.undo(plan)
                    smaller = is_out_of_memory(e) and self._scheduler.shrink()
                if smaller:
                    _log.warning("a step ran out of memory and is tried with less: %s", first_line(e))
                    _release_memory()
                    continue
                done, failed = self._compute_each(plan)
            with self._lock:
                before = self.counts.copy()
                deltas = [delta for computed in done for delta in self._apply(*computed)]
                for sequence, reason in failed:
                    if self._scheduler.knows(sequence):
                        self._scheduler.finish(sequence)
                        deltas.append(sequence.fail(reason))
                self._scheduler.succeeded()
                self.counts["steps"] += 1
                self.last_step = self._stats(before, len(plan.chunks), time.monotonic() - start)
            return deltas

    def _compute(self, plan: StepPlan) -> Computed:
        if self._proposer is not None:
            self._proposer.propose(plan)
        logits = self._runner.run(plan)
        rows: list[Row] = []
        for chunk in plan.chunks:
            if chunk.complete:
                rows += (chunk.sequence, *chunk.forks)
                rows += [DraftRow(chunk.sequence, chunk.draft[:n]) for n in range(1, len(chunk.draft) + 1)]
        return plan, logits, self._sampler.sample(logits.next, rows) if rows else []

    def _compute_each(self, plan: StepPlan) -> tuple[list[Computed], list[tuple[SequenceState, str]]]:
        """A step failed: each of its sequences alone, so that whichever is the cause fails alone."""
        done, failed = [], []
        for chunk in plan.chunks:
            try:
                done.append(self._compute(StepPlan([Chunk(chunk.sequence, chunk.length)])))
            except RunnerError:
                raise
            except Exception as e:
                _log.exception("request %d fails", chunk.sequence.request_id)
                failed.append((chunk.sequence, f"{type(e).__name__}: {first_line(e)}"))
        return done, failed

    def _apply(self, plan: StepPlan, logits: StepLogits, samples: Sequence[Sample]) -> list[Delta]:
        """Give the sequences what was computed for them; those aborted meanwhile get nothing."""
        deltas: list[Delta] = []
        if logits.reported:
            self._report_prompts(logits)
        remaining = iter(samples)
        for chunk in plan.chunks:
            sequence, complete = chunk.sequence, chunk.complete
            computed = sequence.computed + chunk.length
            prompt_tokens = min(chunk.length, len(sequence.prompt) - sequence.computed)
            self.counts["prompt_tokens"] += max(prompt_tokens, 0)
            if not complete:
                self._advance(sequence, computed)
                continue
            first = next(remaining)
            forks = [(fork, next(remaining)) for fork in chunk.forks]
            taken = accepted(chunk.draft, [first, *itertools.islice(remaining, len(chunk.draft))])
            self.counts["draft_tokens"] += len(chunk.draft)
            self.counts["accepted_tokens"] += len(taken) - 1
            self._give(sequence, computed, taken, deltas)
            for fork, own in forks:
                self._give(fork, computed, [own], deltas)
        return deltas

    def _report_prompts(self, logits: StepLogits) -> None:
        tokens = [sequence.prompt[position] for sequence, position in logits.reported]
        numbers = [sequence.params.prompt_logprobs or 0 for sequence, _ in logits.reported]
        reports = token_logprobs(logits.prompt, tokens, numbers)
        for (sequence, _), report in zip(logits.reported, reports, strict=True):
            sequence.prompt_logprobs.append(report)

    def _give(
        self, sequence: SequenceState, computed: int, samples: Sequence[Sample], deltas: list[Delta]
    ) -> None:
        if not self._scheduler.knows(sequence):
            return
        try:
            delta = sequence.append(samples)
        except Exception as e:  # text that cannot be made of its tokens, or a grammar that refuses them
            _log.exception("request %d fails", sequence.request_id)
            delta = sequence.fail(f"{type(e).__name__}: {first_line(e)}")
        self.counts["generated_tokens"] += len(delta.token_ids)
        if delta.error is None:
            # The last token was sampled, not computed.
            self._advance(sequence, computed + len(delta.token_ids) - 1)
        if delta.finish_reason is not None:
            self._scheduler.finish(sequence)
        deltas.append(delta)

    def _advance(self, sequence: SequenceState, computed: int) -> None:
        """Keys and values of the first `computed` tokens are there: let others find the blocks that are full."""
        if not self._scheduler.knows(sequence):
            return
        sequence.computed = computed
        pool, digests = self._scheduler.pool, sequence.digests
        size = pool.block_size
        while (end := (len(digests) + 1) * size) <= computed:
            parent = digests[-1] if digests else b""
            digests.append(
                pool.publish(sequence.blocks[len(digests)], parent, sequence.tokens[end - size : end])
            )

    def _stats(self, before: Counter[str], sequences: int, seconds: float) -> StepStats:
        now = self.counts - before
        return StepStats(
            seconds=seconds,
            sequences=sequences,
            prompt_tokens=now["prompt_tokens"],
            generated_tokens=now["generated_tokens"],
            draft_tokens=now["draft_tokens"],
            accepted_tokens=now["accepted_tokens"],
        )


def _release_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
