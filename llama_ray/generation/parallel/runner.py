"""The runners of a model that is divided among ranks."""

from __future__ import annotations

import dataclasses
import logging
import traceback
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from llama_ray.generation.backend import Backend
from llama_ray.generation.batch import StepBatch
from llama_ray.generation.parallel.ranks import TIMEOUT_S, Ranks
from llama_ray.generation.parallel.workers import Workers
from llama_ray.generation.runner import Runner, RunnerError, StepLogits
from llama_ray.generation.scheduling.step_plan import StepPlan

_log = logging.getLogger(__name__)


class RankRunner(Runner):
    """What `Runner` does, for one rank's share of the model and of the cache, in step with the other ranks."""

    def __init__(self, backend: Backend, num_blocks: int, ranks: Ranks) -> None:
        super().__init__(backend.model, backend.make_cache(num_blocks))
        self.ranks = ranks
        backend.join_ranks(ranks.sum, ranks.gather)

    @torch.inference_mode()
    def compute(self, batch: StepBatch, copies: list[tuple[int, int]]) -> Tensor | Exception:
        """Copy blocks, then run a batch that lies in the host's memory -> its logits, whole on rank 0.

        An error is returned, not raised, once this rank has taken part in what the others still wait for: all are
        ready for the next step then. RunnerError is raised where the ranks have lost contact.
        """
        self.ranks.sums = self.ranks.gathers = 0
        try:
            for source, target in copies:
                self.cache.copy_block(source, target)
            device = self.model.embed_tokens.weight.device
            return super().forward(_mapped(batch, lambda tensor: tensor.to(device)))
        except RunnerError:
            raise
        except Exception as e:
            traceback.clear_frames(
                e.__traceback__
            )  # they hold the step's tensors, and memory may be what lacks
            failure = e
        self._make_up(len(batch.tokens), len(batch.logit_rows))
        return failure

    def _make_up(self, tokens: int, rows: int) -> None:
        weight, config = self.model.embed_tokens.weight, self.model.config
        for _ in range(2 * config.num_layers - self.ranks.sums):
            self.ranks.sum(weight.new_zeros((1, tokens, config.hidden_size)))
        if not self.ranks.gathers:
            self.ranks.gather(weight.new_zeros((rows, config.vocab_size // self.ranks.size)))


class TensorParallelRunner(RankRunner):
    """The runner of rank 0, whom the engine asks: tells the workers what each step is and computes its own share.

    Raises RunnerError once a worker is gone, or a step was interrupted, after which ranks would not agree on which
    step they are in; the workers are ended then.
    """

    def __init__(self, backend: Backend, num_blocks: int, ranks: Ranks, workers: Workers) -> None:
        super().__init__(backend, num_blocks, ranks)
        self.device = torch.device("cpu")  # batches are made for all ranks; each takes them to its own device
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
            workers.ask("step", _mapped(batch, Tensor.numpy), copies)
            logits = self.compute(batch, copies)
            answers = workers.answers(TIMEOUT_S)
        except RunnerError as e:
            raise workers.lost(str(e)) from e
        except BaseException:
            workers.close("a step was interrupted, which ended the engine's workers")
            raise
        for failure in (logits, *answers):
            if isinstance(failure, Exception):
                raise failure
        assert isinstance(logits, Tensor)
        return logits


def from_host(arrays: StepBatch) -> StepBatch:
    """A batch as it comes from rank 0, as tensors."""
    return _mapped(arrays, torch.from_numpy)


def _mapped(batch: StepBatch, function: Callable[[Any], Any]) -> StepBatch:
    return StepBatch(**{f.name: function(getattr(batch, f.name)) for f in dataclasses.fields(batch)})
