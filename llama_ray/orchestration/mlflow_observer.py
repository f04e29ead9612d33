"""Reports a training run to MLflow and to the console."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llama_ray.data.dataset.locations import DEFAULT_CACHE_BYTES, load_tokenizer
from llama_ray.data.dataset.token_dataset import TokenDataset
from llama_ray.data.mixtures.mixture import Mixture
from llama_ray.data.mixtures.opening import open_mixture
from llama_ray.data.mixtures.sources import DataSource
from llama_ray.generation.engine import Engine
from llama_ray.generation.sampling.params import SamplingParams
from llama_ray.model.llama import Llama
from llama_ray.storage import store
from llama_ray.tracking.buffer import BufferedRun
from llama_ray.training.checkpointing.checkpointer import CheckpointResult
from llama_ray.training.checkpointing.progress import Progress
from llama_ray.training.config import Schedule
from llama_ray.training.parallel.process_group import world_size
from llama_ray.training.reporting.observer import Console, Metrics
from llama_ray.utils.targets import IGNORE_INDEX

_STARTS_FILE = "starts.json"
"""A list of (MLflow run, last step before, number of workers), one for each time that workers started."""
_NUM_PROMPTS, _PROMPT_TOKENS, _SAMPLE_TOKENS = 3, 16, 64


class MLflowObserver(Console):
    """Logs metrics, a figure of the loss and samples of text to `run`, which is None except on rank 0.

    Nothing here waits for the tracking server. After a restart from a checkpoint some steps are trained again; points
    that the run already has are not logged twice.
    """

    def __init__(
        self,
        run: BufferedRun | None,
        sources: Sequence[DataSource],
        directory: str,
        cache_bytes: int = DEFAULT_CACHE_BYTES,
    ) -> None:
        """Read the tokenizer of `sources`, and a few prompts; for `cache_bytes` see `open_files`."""
        super().__init__()
        self.run, self._starts = run, store.join(directory, _STARTS_FILE)
        self._tokenizer = load_tokenizer(sources[0].location)
        self._prompts = _validation_prompts(open_mixture(sources, "validation", cache_bytes=cache_bytes))

    def started(self, schedule: Schedule, progress: Progress, layout: str) -> None:
        """See `Observer`."""
        super().started(schedule, progress, layout)
        if self.run:
            self.run.restore(progress.unsent)
            starts = self._record_start(self.run.run_id, progress.step)
            tags = {"total_steps": str(schedule.total_steps), "layout": layout}
            for n, (step, workers) in enumerate(starts[1:], 1):
                tags |= {"restarts": str(n), f"restart.{n}": f"after step {step}, {workers} workers"}
            self.run.do("started", lambda run: run.set_tags(tags))

    def _record_start(self, run_id: str, step: int) -> list[tuple[int, int]]:
        """Return (last step before, number of workers) of each start that belongs to the MLflow run.

        The directory may also know starts of an attempt of the same name that died before its first checkpoint.
        """
        # Stored beside the checkpoints, because these workers may die before MLflow has the tags.
        starts = [*json.loads(store.read_text(self._starts) or "[]"), (run_id, step, world_size())]
        store.write_text(self._starts, json.dumps(starts))
        return [start[1:] for start in starts if start[0] == run_id]

    def logged(self, step: int, metrics: Metrics) -> None:
        """See `Observer`."""
        super().logged(step, metrics)
        if self.run:
            self.run.log_metrics(metrics, step)

    def validated(self, step: int, metrics: Metrics, model: Llama | None) -> None:
        """See `Observer`."""
        super().validated(step, metrics, model)
        if self.run:
            self.run.log_metrics(metrics, step)
            self.run.do("loss curve", lambda run: run.log_loss_curve())
            if model is not None:
                samples = self._samples(model)
                self.run.do(f"samples {step}", lambda run: run.log_samples(samples, step))

    def checkpointed(self, result: CheckpointResult) -> None:
        """See `Observer`."""
        super().checkpointed(result)
        if self.run:
            metrics = {"saving/stall_s": result.stall_s, "saving/write_s": result.write_s}
            failed = {"saving/failed": 1.0}
            self.run.log_metrics(failed if result.error else metrics, result.step)

    def profiled(self, trace: Path) -> None:
        """See `Observer`."""
        super().profiled(trace)
        if self.run:
            self.run.do("profile", lambda run: run.log_file(trace, "profile"))

    def unsent(self) -> list[Any]:
        """See `Observer`."""
        return self.run.unsent() if self.run else []

    def _samples(self, model: Llama) -> list[tuple[str, str]]:
        """Return (prompt, continuation) for a few positions in the validation text."""
        room = model.config.max_seq_len
        prompts = [p[: room // 2] for p in self._prompts]
        engine = Engine(model, self._tokenizer, max_num_seqs=len(prompts))
        length = min(_SAMPLE_TOKENS, room - max(map(len, prompts)))
        params = SamplingParams(max_tokens=length, temperature=0.8, top_k=40, top_p=0.9, seed=0)
        completions = engine.generate(prompts, params)
        return [
            (self._tokenizer.decode(prompt), completion.text)
            for prompt, completion in zip(prompts, completions, strict=True)
        ]


def _validation_prompts(mixture: Mixture) -> list[list[int]]:
    """Return the beginnings of windows at even distances, of all sources in turn."""
    sources = [n % len(mixture.datasets) for n in range(_NUM_PROMPTS)]
    prompts: dict[tuple[int, int], list[int]] = {}
    for n, source in enumerate(sources):
        dataset = list(mixture.datasets.values())[source]
        if (row_tokens := dataset.info.row_tokens) is not None:
            window = dataset.num_windows(row_tokens) * n // _NUM_PROMPTS
            prompts[source, window] = _first_prompt(dataset, window, row_tokens)
            continue
        # A run of short sequences may have fewer.
        length = min(_PROMPT_TOKENS, len(dataset) - 1)
        window = dataset.num_windows(length) * n // _NUM_PROMPTS
        batch = dataset.windows(np.array([window]), length, documents=False)
        prompts[source, window] = batch.inputs[0].tolist()
    return list(prompts.values())


def _first_prompt(dataset: TokenDataset, window: int, row_tokens: int) -> list[int]:
    """Return what stands before the first answer in a row."""
    batch = dataset.windows(np.array([window]), row_tokens)
    first = int((batch.targets[0] != IGNORE_INDEX).int().argmax())
    return batch.inputs[0, : first + 1].tolist()
