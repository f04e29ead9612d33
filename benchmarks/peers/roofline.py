"""The roofline: measured rates of the machine, and the least time that a task can take at these rates."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from llama_ray.model.config import LlamaConfig

# Bytes per weight: q8_0 has one 16-bit scale for 32 weights, int4 one of 32 bits for 64.
WEIGHT_BYTES = {"fp32": 4.0, "bf16": 2.0, "int8": 1.0, "q8_0": 34 / 32, "int4": 0.5 + 4 / 64}


@dataclass(frozen=True)
class Rates:
    """Memory bandwidth in bytes/s, and operations/s of a large matrix product by number format."""

    bandwidth: float
    product: dict[str, float]

    def of(self, kind: str) -> float:
        """Return the rate of matrix products with weights in `kind`; 8 bits and less multiply as int8."""
        return self.product[kind if kind in self.product else "int8"]

    def __str__(self) -> str:
        products = ", ".join(f"{kind} {value / 1e9:,.0f}" for kind, value in self.product.items())
        return f"memory {self.bandwidth / 1e9:,.1f} GB/s; matrix products {products} GOP/s"


def measure() -> Rates:
    """Measure the rates of a CPU: a sum of 256 MiB, and square products; those of a GPU are in `on_gpu.ceilings`."""
    size, product = 2048, {}
    for kind, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        a = torch.ones(size, size, dtype=dtype)
        product[kind] = 2 * size**3 / _best(lambda a=a: a @ a)
    a8 = torch.ones(size, size, dtype=torch.int8)
    product["int8"] = 2 * size**3 / _best(lambda: torch._int_mm(a8, a8))
    x = torch.ones(2**26)
    return Rates(x.nbytes / _best(lambda: x.sum()), product)


def median(rates: Sequence[Rates]) -> Rates:
    """Return the medians of several measurements."""
    product = {kind: statistics.median(r.product[kind] for r in rates) for kind in rates[0].product}
    return Rates(statistics.median(r.bandwidth for r in rates), product)


def _best(function: Callable[[], object], times: int = 5) -> float:
    best = float("inf")
    for _ in range(times):
        start = time.perf_counter()
        function()
        best = min(best, time.perf_counter() - start)
    return best


def matrix_weights(config: LlamaConfig) -> tuple[int, int]:
    """Return how many weights multiply every token: (in the blocks, in the head)."""
    head = config.vocab_size * config.hidden_size
    return config.flops_per_token(0) // 6 - head, head


def cache_bytes(config: LlamaConfig, itemsize: int = 2) -> int:
    """Return the bytes of one token's keys and values, all layers together."""
    return 2 * config.num_layers * config.num_kv_heads * config.head_dim * itemsize


def step_s(config: LlamaConfig, rates: Rates, kind: str, batch: int, context: float) -> float:
    """Return the least seconds of a step: one new token for each of `batch` sequences of `context` tokens.

    The weights and every sequence's cache are read once; reading and multiplying overlap.
    """
    blocks, head = matrix_weights(config)
    read = (blocks + head) * WEIGHT_BYTES[kind] + batch * context * cache_bytes(config)
    attention = 4 * config.num_layers * config.num_heads * config.head_dim * context
    operations = batch * (2 * (blocks + head) + attention)
    return max(read / rates.bandwidth, operations / rates.of(kind))


def prompts_s(config: LlamaConfig, rates: Rates, kind: str, lengths: Sequence[int]) -> float:
    """Return the least seconds to prefill prompts of these lengths; only their last tokens go through the head."""
    blocks, head = matrix_weights(config)
    # Causal attention needs half of the scores.
    attention = 2 * config.num_layers * config.num_heads * config.head_dim
    operations = sum(2 * blocks * n + 2 * head + attention * n * n for n in lengths)
    return max(operations / rates.of(kind), (blocks + head) * WEIGHT_BYTES[kind] / rates.bandwidth)


def batch_s(config: LlamaConfig, rates: Rates, kind: str, batch: int, length: int, new_tokens: int) -> float:
    """Return the least seconds for one batch: `batch` prompts of `length` tokens and `new_tokens` for each."""
    steps = (step_s(config, rates, kind, batch, length + i) for i in range(1, new_tokens))
    return prompts_s(config, rates, kind, [length] * batch) + sum(steps)


def served_s(config: LlamaConfig, rates: Rates, kind: str, lengths: Sequence[tuple[int, int]]) -> float:
    """Return the least seconds for (prompt, output) lengths under ideal batching: all operations or all reads."""
    blocks, head = matrix_weights(config)
    attention = 4 * config.num_layers * config.num_heads * config.head_dim
    operations = read = 0.0
    for prompt, new in lengths:
        contexts = new * (prompt + new / 2)
        operations += 2 * blocks * (prompt + new) + 2 * head * new + attention * (prompt**2 / 2 + contexts)
        read += contexts * cache_bytes(config)
    steps = max(new for _, new in lengths)
    read += steps * (blocks + head) * WEIGHT_BYTES[kind]
    return max(operations / rates.of(kind), read / rates.bandwidth)
