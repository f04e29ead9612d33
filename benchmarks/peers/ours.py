"""Our engine as a contestant."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch

from llama_ray import Engine, SamplingParams
from peers.workload import GREEDY, Request, Sampling


class Ours:
    """`Engine` in bf16, fp32, int8 or int4; `options` go to `Engine.from_pretrained`."""

    def __init__(self, directory: Path, kind: str, **options: Any) -> None:
        if kind in ("int8", "int4"):
            options["quantization"] = kind
        dtype = torch.float32 if kind == "fp32" else torch.bfloat16
        self.engine = Engine.from_pretrained(directory, dtype=dtype, **options)

    def logprobs(self, prompt: list[int]) -> dict[int, float]:
        """Return the log-probabilities of the 20 most probable next tokens, the most that the engine reports."""
        completion = self.engine.generate([prompt], _params(1, GREEDY, logprobs=20))[0]
        assert completion.logprobs is not None
        return dict(completion.logprobs[0].top)

    def generate(self, prompts: list[list[int]], new_tokens: int, sampling: Sampling) -> list[list[int]]:
        """Return the new tokens of every prompt."""
        completions = self.engine.generate(prompts, _params(new_tokens, sampling))
        return [c.token_ids for c in completions]

    def serve(self, requests: list[Request], sampling: Sampling) -> list[list[float]]:
        """Serve requests as they arrive; return, for each, the times of its tokens in seconds since the start."""
        ids: dict[int, int] = {}
        times: list[list[float]] = [[] for _ in requests]
        arrived = 0
        start = time.perf_counter()
        while arrived < len(requests) or self.engine.has_work:
            now = time.perf_counter() - start
            while arrived < len(requests) and requests[arrived].arrival_s <= now:
                request = requests[arrived]
                ids[self.engine.submit(request.prompt, _params(request.new_tokens, sampling))] = arrived
                arrived += 1
            if not self.engine.has_work:
                time.sleep(requests[arrived].arrival_s - now)
                continue
            for delta in self.engine.step():
                now = time.perf_counter() - start
                times[ids[delta.request_id]].extend([now] * len(delta.token_ids))
        return times

    def first_token_s(self, prompt: list[int]) -> float:
        """Return the seconds from submitting a prompt to its first token."""
        start = time.perf_counter()
        self.engine.generate([prompt], _params(1, GREEDY))
        return time.perf_counter() - start


def _params(new_tokens: int, sampling: Sampling, **more: Any) -> SamplingParams:
    return SamplingParams(
        max_tokens=new_tokens,
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        ignore_eos=True,
        **more,
    )
