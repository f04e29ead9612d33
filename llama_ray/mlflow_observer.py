"""A training run told to MLflow, and to the console."""

from __future__ import annotations

import numpy as np

from llama_ray.data.loader import TokenDataset
from llama_ray.data.tokenizer import Tokenizer
from llama_ray.generation.engine import Engine
from llama_ray.generation.sampling import SamplingParams
from llama_ray.model.llama import Llama
from llama_ray.tracking.runs import Run
from llama_ray.training.config import Schedule
from llama_ray.training.observer import Console, Metrics

_PROMPTS, _PROMPT_TOKENS, _SAMPLE_TOKENS = 3, 16, 64


class MLflowObserver(Console):
    """Logs what rank 0 observes to `run` (None on the other ranks): curves, a loss picture, samples of text.

    After a restart from a checkpoint some steps are trained again; those that the run has already are not logged
    twice.
    """

    def __init__(self, run: Run | None, data: str) -> None:
        super().__init__()
        self.run = run
        self._tokenizer = Tokenizer.load(data)
        self._prompts = _validation_prompts(data)
        self._logged = (run.last_step("train/loss") or 0) if run else 0
        self._validated = (run.last_step("validation/loss") or 0) if run else 0

    def started(self, schedule: Schedule, step: int) -> None:
        """See `Observer`."""
        super().started(schedule, step)
        if self.run:
            self.run.set_tags({"total_steps": str(schedule.total_steps)})

    def logged(self, step: int, metrics: Metrics) -> None:
        """See `Observer`."""
        super().logged(step, metrics)
        if self.run and step > self._logged:
            self.run.log_metrics(metrics, step)

    def validated(self, step: int, metrics: Metrics, model: Llama) -> None:
        """See `Observer`."""
        super().validated(step, metrics, model)
        if self.run and step > self._validated:
            self.run.log_metrics(metrics, step)
            self.run.log_loss_curve()
            self.run.log_samples(self._samples(model), step)

    def _samples(self, model: Llama) -> list[tuple[str, str]]:
        """(prompt, continuation) for a few places in the validation text."""
        room = model.config.max_seq_len
        prompts = [p[: room // 2] for p in self._prompts]
        engine = Engine(model, self._tokenizer, max_batch_size=len(prompts))
        length = min(_SAMPLE_TOKENS, room - max(map(len, prompts)))
        params = SamplingParams(max_tokens=length, temperature=0.8, top_k=40, top_p=0.9, seed=0)
        completions = engine.generate(prompts, params)
        return [
            (self._tokenizer.decode(prompt), completion.text)
            for prompt, completion in zip(prompts, completions, strict=True)
        ]


def _validation_prompts(data: str) -> list[list[int]]:
    dataset = TokenDataset(data, "validation")
    places = np.linspace(0, dataset.num_samples(_PROMPT_TOKENS), _PROMPTS, endpoint=False, dtype=np.int64)
    prompts: list[list[int]] = dataset.samples(np.unique(places), _PROMPT_TOKENS)[0].tolist()
    return prompts
