"""One worker's part of a training run, and what happens in and after each step."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from llama_ray.data.mixtures.loader import Loader
from llama_ray.data.mixtures.mixture import Mixture
from llama_ray.data.mixtures.validation import validation_batches
from llama_ray.model.config import LlamaConfig
from llama_ray.storage.attempts import Superseded
from llama_ray.training.checkpointing.checkpointer import Checkpointer, NoCheckpointer
from llama_ray.training.checkpointing.progress import Progress
from llama_ray.training.config import Schedule, TrainConfig
from llama_ray.training.dropout import seed_dropout
from llama_ray.training.errors import TrainingError, out_of_memory_at
from llama_ray.training.hosts.interrupt import Interrupt, InterruptAgreement, Stopped
from llama_ray.training.optimizers.build import learning_rate, set_learning_rate
from llama_ray.training.parallel.parallelize import gather_model
from llama_ray.training.reporting.metrics import Throughput, peak_memory_bytes, perplexity
from llama_ray.training.reporting.observer import Observer
from llama_ray.training.reporting.skipped_steps import SkippedSteps
from llama_ray.training.step import Stepper, StepResult


@dataclass
class TrainingRun:
    """A run that `prepare_run` has built; `train` calls its methods, in the same order on every worker."""

    model_config: LlamaConfig
    config: TrainConfig
    schedule: Schedule
    description: str
    """How the workers share the model and whether its blocks are compiled, with the reasons, in one line."""
    seq_len: int
    """The longest of the run."""
    loader: Loader
    validation: Mixture
    stepper: Stepper
    progress: Progress
    skipped_steps: SkippedSteps
    throughput: Throughput
    checkpointer: Checkpointer | NoCheckpointer
    interrupts: InterruptAgreement
    observer: Observer

    def start(self) -> None:
        """Tell the observer that the run begins, and start the clock."""
        self.observer.started(self.schedule, self.progress, self.description)
        self.throughput.resume()

    def measure_finished_run(self) -> None:
        """Validate the weights of a run that has no steps left, unless its validation loss is theirs."""
        if self.remaining_steps() or self.progress.validation_step == self.progress.step:
            return
        self._validate(self.progress.step)
        self.checkpointer.save_progress(self.progress)

    def remaining_steps(self) -> range:
        """Return the steps that are still to be taken, counted from 1."""
        return range(self.progress.step + 1, self.schedule.total_steps + 1)

    def take_step(self, step: int) -> StepResult:
        """Train on the next global batch. Raises OutOfMemory."""
        set_learning_rate(self.stepper.optimizer, self._learning_rate(step))
        if self.config.lora_dropout:
            seed_dropout(self.config.seed, step, self.stepper.layout.data_rank)
        with out_of_memory_at(step):
            result = self.stepper.step(self.loader.next_global_batch())
        segment = self.loader.timetable.segment(step)
        tokens = segment.windows * self.seq_len
        self.skipped_steps.count(result.skipped)
        self.progress.step = step
        self.progress.tokens += tokens
        self.throughput.count(tokens, self.config.flops_per_token(self.model_config, segment.seq_len))
        return result

    def stop_if_diverged(self, step: int) -> None:
        """Read the counter of skipped steps, if `step` logs or saves. Raises TrainingError after too many in a row."""
        if self.schedule.logs(step) or self.schedule.saves(step):
            self._count_skipped_steps(step)

    def log(self, step: int, epoch: int, result: StepResult) -> None:
        """Hand a point of the training curve to the observer, where `step` logs. It waits for the device."""
        if not self.schedule.logs(step):
            return
        tokens_per_s, mfu = self.throughput.read()
        self.observer.logged(
            step,
            {
                "loss/train": result.loss.item(),
                "train/learning_rate": self._learning_rate(step),
                "train/gradient_norm": result.grad_norm.item(),
                "train/skipped_steps": self.progress.skipped_steps,
                "throughput/tokens_per_s": tokens_per_s,
                "throughput/mfu": mfu,
                "memory/peak_bytes": peak_memory_bytes(self.stepper.device),
                "progress/tokens": self.progress.tokens,
                "progress/epoch": epoch,
                **dict(zip(self.stepper.objective.measures, result.measures.tolist(), strict=True)),
                **self._by_source("loss/train", result.source_losses.tolist()),
                **self._by_source("progress/epoch", self._epochs_of_sources()),
            },
        )

    def validate_and_save(self, step: int) -> None:
        """Validate and save a checkpoint, where the schedule says so; neither counts as training time."""
        if not (self.schedule.validates(step) or self.schedule.saves(step)):
            return
        if self.stepper.device.type == "cuda":
            # Work that is still queued belongs to the steps, not to what follows.
            torch.cuda.synchronize(self.stepper.device)
        self.throughput.pause()
        if self.schedule.validates(step):
            self._validate(step)
        if self.schedule.saves(step):
            self._save()
        self.throughput.resume()

    def answer_interrupt(self, step: int) -> None:
        """Save, and raise Stopped or Superseded where asked to, if any worker was interrupted a step ago."""
        interrupt = self.interrupts.next_interrupt()
        if interrupt is Interrupt.SUPERSEDED:
            self.checkpointer.wait()
            raise Superseded("a newer attempt goes on with this run")
        if interrupt and not self.schedule.saves(step):
            self._count_skipped_steps(step)
            self._save()
        if interrupt is Interrupt.STOP and step < self.schedule.total_steps:
            self.finish()
            raise Stopped(step)

    def report_checkpoints(self) -> None:
        """Tell the observer which checkpoints have been written, or have failed, since the last call."""
        for result in self.checkpointer.take_results():
            self.observer.checkpointed(result)

    def finish(self) -> None:
        """Wait for the last checkpoint and report it. Raises TrainingError if it could not be stored."""
        self.checkpointer.wait()
        self.report_checkpoints()
        self.checkpointer.close()

    def check_success(self) -> None:
        """Raise TrainingError if the run has ended, but with a model that is of no use."""
        step, loss = self.progress.step, self.progress.validation_loss
        if 0 < step == self.progress.skipped_steps:
            raise TrainingError(
                f"all {step} steps had a loss or gradient that is not finite, so the weights are the initial ones; "
                f"{self._remedies()}, and start a new run"
            )
        if loss is not None and not math.isfinite(loss):
            raise TrainingError(
                f"the validation loss after step {step} is {loss}, so the model is of no use; the checkpoint with the "
                f"best loss is kept; {self._remedies()}, and start a new run"
            )

    def _count_skipped_steps(self, step: int) -> None:
        self.progress.skipped_steps, self.progress.skipped_in_a_row, most = self.skipped_steps.read()
        if most >= self.config.max_skipped_steps:
            raise TrainingError(
                f"{most} steps in a row up to step {step} had a loss or gradient that is not finite; "
                f"{self._remedies()}, and --resume"
            )

    def _remedies(self) -> str:
        return (
            f"lower learning_rate ({self.config.peak_learning_rate}) or max_grad_norm ({self.config.max_grad_norm}), "
            "or use precision bf16 or fp32"
        )

    def _learning_rate(self, step: int) -> float:
        return learning_rate(step, self.config, self.schedule)

    def _validate(self, step: int) -> None:
        layout = self.stepper.layout
        batches = validation_batches(
            self.validation,
            self.seq_len,
            self.config.batch_size,
            layout.data_rank,
            layout.data_world,
            self.config.validation_batches or None,
        )
        found = self.stepper.validate(batches)
        self.progress.validation_loss, self.progress.validation_step = found.loss, step
        names = self.stepper.objective.measures
        metrics = {
            "loss/validation": found.loss,
            # That of pairs is not the loss of a text.
            **({} if names else {"validation/perplexity": perplexity(found.loss)}),
            **{f"validation/{n}": value for n, value in zip(names, found.measures, strict=True)},
            **self._by_source("loss/validation", found.source_losses),
        }
        self.observer.validated(step, metrics, gather_model(self.stepper.model))

    def _by_source(self, metric: str, values: Iterable[float]) -> dict[str, float]:
        """Return `metric/SOURCE` for each source of a mixture; one without a target in a step has no loss."""
        names = self.loader.mixture.names
        if len(names) == 1:
            return {}
        return {
            f"{metric}/{name}": value for name, value in zip(names, values, strict=True) if value == value
        }

    def _epochs_of_sources(self) -> list[float]:
        return list(self.loader.epochs_by_source(self.loader.position).values())

    def _save(self) -> None:
        self.progress.loader = self.loader.state_dict()
        self.progress.scaler = self.stepper.scaler.state_dict()
        self.progress.unsent = self.observer.unsent()
        self.checkpointer.save(self.progress)
