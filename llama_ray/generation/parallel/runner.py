"""The runners of a model that is divided between ranks."""

from __future__ import annotations

import traceback
from dataclasses import dataclass

import torch
from torch import Tensor

from llama_ray.generation.backends.backend import Backend
from llama_ray.generation.backends.batch import StepBatch
from llama_ray.generation.backends.runner import Runner, RunnerError, StepLogits
from llama_ray.generation.parallel.calls import Step
from llama_ray.generation.parallel.ranks import TIMEOUT_S, Ranks
from llama_ray.generation.parallel.workers import Workers
from llama_ray.generation.scheduling.step_plan import StepPlan
from llama_ray.utils.panics import panics_as_errors


@dataclass(frozen=True)
class RankResult:
    """The result of one rank's part of a step: logits [R, vocab_size], complete on rank 0, or an error."""

    logits: Tensor | None = None
    error: Exception | None = None


class RankRunner(Runner):
    """Runs one rank's share of the model on its share of the cache, in step with the other ranks."""

    def __init__(self, backend: Backend, num_blocks: int, ranks: Ranks) -> None:
        super().__init__(backend.model, backend.make_cache(num_blocks))
        self.ranks = ranks
        backend.join_ranks(ranks.sum, ranks.gather)

    @torch.inference_mode()
    def compute(self, batch: StepBatch, copies: list[tuple[int, int]]) -> RankResult:
        """Copy blocks, then run a batch that is in host memory.

        After an error this rank still takes part in the collectives that the other ranks wait for, so that all ranks
        are ready for the next step; the error is then returned. Raises RunnerError if the ranks lost contact.
        """
        self.ranks.sums = self.ranks.gathers = 0
        try:
            with panics_as_errors():
                for source, target in copies:
                    self.cache.copy_block(source, target)
                return RankResult(logits=super().forward(batch))
        except RunnerError:
            raise
        except Exception as error:
            # The frames hold the tensors of the step, and memory may be what ran out.
            traceback.clear_frames(error.__traceback__)
            failure = error
        self._complete_collectives(len(batch.tokens), len(batch.logit_rows))
        return RankResult(error=failure)

    def _complete_collectives(self, tokens: int, rows: int) -> None:
        """Contribute zeros to the collectives that are missing in this step."""
        weight, config = self.model.embed_tokens.weight, self.model.config
        for _ in range(2 * config.num_layers - self.ranks.sums):
            self.ranks.sum(weight.new_zeros((1, tokens, config.hidden_size)))
        if not self.ranks.gathers:
            self.ranks.gather(weight.new_zeros((rows, config.vocab_size // self.ranks.size)))


class TensorParallelRunner(RankRunner):
    """The runner of rank 0, which the engine calls: sends each step to the workers and computes its own share.

    Raises RunnerError once a worker is gone. Also after a step was interrupted, because the ranks would no longer agree
    on the current step; the workers are ended then.
    """

    def __init__(self, backend: Backend, num_blocks: int, ranks: Ranks, workers: Workers) -> None:
        super().__init__(backend, num_blocks, ranks)
        self._workers = workers
        self._copies: list[tuple[int, int]] = []

    def run(self, plan: StepPlan) -> StepLogits:
        """See `Runner`."""
        self._copies += plan.copies
        return super().run(StepPlan(plan.chunks))

    def forward(self, batch: StepBatch) -> Tensor:
        """See `Runner`."""
        workers = self._workers
        copies, self._copies = self._copies, []
        try:
            pending = workers.ask(Step.of(batch, copies))
            result = self.compute(batch, copies)
            answers = pending.answers(TIMEOUT_S)
        except RunnerError as error:
            raise workers.lost(str(error)) from error
        except BaseException:
            workers.close("a step was interrupted, which ended the engine's workers")
            raise
        for failure in (result.error, *answers):
            if failure is not None:
                raise failure
        assert result.logits is not None
        return result.logits
