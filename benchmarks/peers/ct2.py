"""CTranslate2 as a contestant."""

from __future__ import annotations

from pathlib import Path

import ctranslate2
import numpy as np
import torch

from peers.workload import Sampling


class CTranslate2:
    """`ctranslate2.Generator` in fp32 or int8 (weights and activations, scales per row)."""

    def __init__(self, directory: Path, kind: str, *, threads: int) -> None:
        compute_type = {"fp32": "float32", "int8": "int8"}[kind]
        self.generator = ctranslate2.Generator(
            str(directory), device="cpu", compute_type=compute_type, intra_threads=threads, inter_threads=1
        )

    def logprobs(self, prompt: list[int]) -> dict[int, float]:
        """Return the log-probability of every token as the next one."""
        logits = np.array(self.generator.forward_batch([prompt]))[0, -1]
        return dict(enumerate(torch.from_numpy(logits).log_softmax(-1).tolist()))

    def generate(self, prompts: list[list[int]], new_tokens: int, sampling: Sampling) -> list[list[int]]:
        """Return the new tokens of every prompt; all prompts are one batch."""
        results = self.generator.generate_batch(
            [[str(token) for token in prompt] for prompt in prompts],
            max_batch_size=len(prompts),
            max_length=new_tokens,
            min_length=new_tokens,
            include_prompt_in_result=False,
            sampling_topk=sampling.top_k,
            sampling_topp=sampling.top_p,
            sampling_temperature=sampling.temperature or 1.0,
        )
        return [r.sequences_ids[0] for r in results]
