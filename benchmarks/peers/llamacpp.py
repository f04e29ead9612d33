"""llama.cpp as a contestant, through the C interface that llama-cpp-python exposes."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import llama_cpp as ll
import numpy as np
import torch

from peers.workload import Sampling

# Tokens that one llama_decode takes, by default.
N_BATCH = 2048


class LlamaCpp:
    """Decodes up to `max_requests` sequences together, each with its own chain of llama.cpp's samplers."""

    def __init__(self, file: Path, *, threads: int, max_requests: int = 1, tokens: int = 512) -> None:
        ll.llama_log_set(_silent, ctypes.c_void_p(0))
        ll.llama_backend_init()
        params = ll.llama_model_default_params()
        params.n_gpu_layers = 0
        self.model = ll.llama_model_load_from_file(str(file).encode(), params)
        if not self.model:
            raise RuntimeError(f"llama.cpp cannot load {file}")
        context = ll.llama_context_default_params()
        context.n_ctx, context.n_batch = tokens * max_requests, N_BATCH
        context.n_seq_max = max_requests
        context.n_threads = context.n_threads_batch = threads
        self.context = ll.llama_init_from_model(self.model, context)
        self.batch = ll.llama_batch_init(N_BATCH, 0, 1)
        self.vocab_size = ll.llama_vocab_n_tokens(ll.llama_model_get_vocab(self.model))

    def logprobs(self, prompt: list[int]) -> dict[int, float]:
        """Return the log-probability of every token as the next one."""
        self._clear()
        (row,) = self._decode([(0, i, token, i == len(prompt) - 1) for i, token in enumerate(prompt)])
        pointer = ll.llama_get_logits_ith(self.context, row)
        logits = np.ctypeslib.as_array(pointer, shape=(self.vocab_size,)).copy()
        return dict(enumerate(torch.from_numpy(logits).log_softmax(-1).tolist()))

    def generate(self, prompts: list[list[int]], new_tokens: int, sampling: Sampling) -> list[list[int]]:
        """Return the new tokens of every prompt: all prompts are prefilled first, then all sequences step together."""
        self._clear()
        samplers = [_sampler(sampling, seed) for seed in range(len(prompts))]
        outputs: list[list[int]] = [[] for _ in prompts]
        # One call takes as many whole prompts as fit.
        prompts_per_call = N_BATCH // max(map(len, prompts))
        for begin in range(0, len(prompts), prompts_per_call):
            group = range(begin, min(begin + prompts_per_call, len(prompts)))
            rows = self._decode(
                [(s, i, t, i == len(prompts[s]) - 1) for s in group for i, t in enumerate(prompts[s])]
            )
            for s, row in zip(group, rows, strict=True):
                outputs[s].append(ll.llama_sampler_sample(samplers[s], self.context, row))
        for step in range(new_tokens - 1):
            rows = self._decode([(s, len(p) + step, outputs[s][-1], True) for s, p in enumerate(prompts)])
            for s, row in enumerate(rows):
                outputs[s].append(ll.llama_sampler_sample(samplers[s], self.context, row))
        for sampler in samplers:
            ll.llama_sampler_free(sampler)
        return outputs

    def _clear(self) -> None:
        ll.llama_memory_clear(ll.llama_get_memory(self.context), True)

    def _decode(self, tokens: list[tuple[int, int, int, bool]]) -> list[int]:
        """Decode (sequence, position, token, whether to return logits) tuples; return the rows that have logits."""
        batch = self.batch
        batch.n_tokens = len(tokens)
        for i, (sequence, position, token, has_logits) in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.logits[i] = token, position, has_logits
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
        if (status := ll.llama_decode(self.context, batch)) != 0:
            raise RuntimeError(f"llama_decode returned {status}")
        return [i for i, token in enumerate(tokens) if token[3]]


def _sampler(sampling: Sampling, seed: int) -> Any:
    chain = ll.llama_sampler_chain_init(ll.llama_sampler_chain_default_params())
    if sampling.temperature == 0:
        ll.llama_sampler_chain_add(chain, ll.llama_sampler_init_greedy())
        return chain
    for sampler in (
        ll.llama_sampler_init_top_k(sampling.top_k),
        ll.llama_sampler_init_top_p(sampling.top_p, 1),
        ll.llama_sampler_init_temp(sampling.temperature),
        ll.llama_sampler_init_dist(seed),
    ):
        ll.llama_sampler_chain_add(chain, sampler)
    return chain


@ll.llama_log_callback
def _silent(level: int, text: bytes, data: Any) -> None:
    """Drop llama.cpp's log, a page for each loaded model."""
