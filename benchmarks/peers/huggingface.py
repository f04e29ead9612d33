"""transformers as a contestant: `generate` in batches, and its continuous batching."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    ContinuousBatchingConfig,
    GenerationConfig,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.utils import logging

from peers.workload import Request, Sampling

logging.set_verbosity_error()
logging.disable_progress_bar()


class HuggingFace:
    """LlamaForCausalLM with torch's attention (`sdpa`), in bf16 or fp32."""

    def __init__(self, directory: Path, kind: str, **options: Any) -> None:
        dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[kind]
        self.model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, attn_implementation="sdpa")
        self.options = options

    @torch.inference_mode()
    def logprobs(self, prompt: list[int]) -> dict[int, float]:
        """Return the log-probability of every token as the next one."""
        ids = torch.tensor([prompt], device=self.model.device)
        logits = self.model(ids, logits_to_keep=1).logits[0, -1].float()
        return dict(enumerate(logits.log_softmax(-1).tolist()))

    def generate(self, prompts: list[list[int]], new_tokens: int, sampling: Sampling) -> list[list[int]]:
        """Return the new tokens of every prompt; all prompts are one batch, shorter ones padded on the left."""
        return self._generate(prompts, new_tokens, sampling)

    def _generate(
        self, prompts: list[list[int]], new_tokens: int, sampling: Sampling, timer: _StepTimer | None = None
    ) -> list[list[int]]:
        longest = max(map(len, prompts))
        ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts])
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
        output = self.model.generate(
            ids.to(self.model.device),
            attention_mask=mask.to(self.model.device),
            generation_config=_config(sampling, max_new_tokens=new_tokens),
            stopping_criteria=StoppingCriteriaList([timer] if timer else []),
        )
        rows: list[list[int]] = output[:, longest:].tolist()
        return rows


class Static(HuggingFace):
    """`generate` on up to `batch_size` (16) waiting requests, oldest first; the next batch starts when all are done."""

    def serve(self, requests: list[Request], sampling: Sampling) -> list[list[float]]:
        """Serve requests as `Ours.serve` does; a batch ends with its longest output."""
        times: list[list[float]] = []
        start = time.perf_counter()
        while len(times) < len(requests):
            now = time.perf_counter() - start
            waiting = [r for r in requests[len(times) :] if r.arrival_s <= now]
            if not waiting:
                time.sleep(requests[len(times)].arrival_s - now)
                continue
            batch = waiting[: self.options.get("batch_size", 16)]
            timer = _StepTimer([r.new_tokens for r in batch])
            self._generate([r.prompt for r in batch], max(timer.new_tokens), sampling, timer)
            times.extend([t - start for t in timer.times[:n]] for n in timer.new_tokens)
        return times


class _StepTimer(StoppingCriteria):  # type: ignore[misc]
    """Records when each step ends, and stops a row once it has its number of new tokens."""

    def __init__(self, new_tokens: list[int]) -> None:
        self.new_tokens, self.times = new_tokens, list[float]()

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
        self.times.append(time.perf_counter())
        return torch.tensor([len(self.times) >= n for n in self.new_tokens], device=input_ids.device)


class Continuous(HuggingFace):
    """transformers' continuous batching: a paged cache under torch's attention; `options` go to its config."""

    def serve(self, requests: list[Request], sampling: Sampling) -> list[list[float]]:
        """Serve requests as `Ours.serve` does; the times are those that transformers records."""
        manager = self.model.init_continuous_batching(
            generation_config=_config(sampling),
            continuous_batching_config=ContinuousBatchingConfig(**self.options),
        )
        manager.start()
        times: dict[str, list[float]] = {}
        start = time.perf_counter()
        try:
            for i, request in enumerate(requests):
                time.sleep(max(0.0, start + request.arrival_s - time.perf_counter()))
                manager.add_request(
                    request.prompt, str(i), max_new_tokens=request.new_tokens, record_timestamps=True
                )
            while len(times) < len(requests):
                result = manager.get_result(timeout=1)
                if result is None and not manager.is_running():
                    raise RuntimeError("transformers' generation thread has ended; see its log")
                if result is not None and result.is_finished():
                    if result.error is not None:
                        raise RuntimeError(f"transformers failed a request: {result.error}")
                    times[result.request_id] = [t - start for t in result.timestamps]
        finally:
            manager.stop(block=True)
            manager.destroy()
        return [times[str(i)] for i in range(len(requests))]


def _config(sampling: Sampling, **more: Any) -> GenerationConfig:
    if sampling.temperature == 0:
        return GenerationConfig(do_sample=False, eos_token_id=None, pad_token_id=0, **more)
    return GenerationConfig(
        do_sample=True,
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        eos_token_id=None,
        pad_token_id=0,
        **more,
    )
