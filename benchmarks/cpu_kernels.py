"""The CPU kernels beside plain torch on the same numbers: bandwidth, operations/s, microseconds.

    python benchmarks/cpu_kernels.py --threads 2                     # 3 minutes on 2 cores
    python benchmarks/cpu_kernels.py --threads 2 --only attention    # one part

Needs a C++ compiler and 4 GB of memory. Products run through all matrices of a 134M model in turn, as a step does, so
that weights come from memory and not from a cache. Each line alternates between the kernels and torch, and prints
medians. The first line is the bandwidth of a plain sum, for comparison.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from jsonargparse import auto_cli
from torch import Tensor

from llama_ray.generation.backends.backend import BLOCK_SIZE
from llama_ray.generation.backends.batch import StepBatch
from llama_ray.generation.backends.cpu import ops
from llama_ray.generation.backends.cpu.cache import CpuCache
from llama_ray.generation.backends.cpu.linear import Format, PackedLinear
from llama_ray.generation.backends.cpu.modules import accelerate
from llama_ray.model.attention.causal import Attend
from llama_ray.model.config import LlamaConfig
from llama_ray.model.llama import Llama
from llama_ray.utils.integers import ceil_div

CONFIG = LlamaConfig.preset("llama-110m")

FORMATS: list[tuple[Format, torch.dtype]] = [
    ("float32", torch.float32),
    ("bfloat16", torch.bfloat16),
    ("int8", torch.bfloat16),
    ("int4", torch.bfloat16),
]


def main(threads: int = 2, seconds: float = 1.0, only: str = "") -> None:
    """Print the rate of every kernel.

    Args:
        threads: Threads of torch and of the kernels.
        seconds: Measuring time of each line.
        only: Run only parts whose name contains this: memory, products, attention, rows, step.
    """
    torch.set_num_threads(threads)
    parts = {"memory": memory, "products": products, "attention": attention, "rows": rows, "step": step}
    with torch.inference_mode():
        for name, part in parts.items():
            if only in name:
                part(seconds)


def memory(seconds: float) -> None:
    """Measure the bandwidth at which this machine reads memory."""
    data = torch.ones(64 * 2**20, dtype=torch.int64)
    (took,) = alternate(seconds, data.sum)
    print(f"memory: a sum reads {data.nbytes / took / 1e9:.1f} GB/s")


def products(seconds: float) -> None:
    """Measure all matrix products of the model, with 1 to 512 rows."""
    c = CONFIG
    layer = [(3 * c.hidden_size, c.hidden_size), (c.hidden_size, c.hidden_size)]
    mlp = [(2 * c.intermediate_size, c.hidden_size), (c.hidden_size, c.intermediate_size)]
    shapes = (layer + mlp) * c.num_layers + [(c.vocab_size, c.hidden_size)]
    flops_per_row = 2 * sum(n * k for n, k in shapes)
    for format, dtype in FORMATS:
        weights = [torch.randn(shape).to(dtype) for shape in shapes]
        packed = [PackedLinear(w, format) for w in weights]
        nbytes = sum(p.nbytes for p in packed)
        for count in (1, 4, 8, 32, 128, 512):
            inputs = {k: torch.randn(count, k).to(dtype) for k in {shape[1] for shape in shapes}}

            def ours(packed: list[PackedLinear] = packed, inputs: dict[int, Tensor] = inputs) -> None:
                for p in packed:
                    p(inputs[p.in_features])

            def plain(weights: list[Tensor] = weights, inputs: dict[int, Tensor] = inputs) -> None:
                for w in weights:
                    F.linear(inputs[w.shape[1]], w)

            took, torchs = alternate(seconds, ours, plain)
            print(
                f"products {format:8} {count:3} rows: {took * 1e3:7.2f} ms {nbytes / took / 1e9:5.1f} GB/s "
                f"{flops_per_row * count / took / 1e9:5.0f} GFLOP/s; torch {dtype} {torchs * 1e3:7.2f} ms, "
                f"{torchs / took:.2f}x"
            )


def attention(seconds: float) -> None:
    """Measure one layer's attention, for single tokens of many sequences and for whole prompts; torch has no cache."""
    c, dtype = CONFIG, torch.bfloat16
    for sequences, context, new in (
        (1, 256, 1),
        (1, 1000, 1),
        (32, 96, 1),
        (32, 256, 1),
        (1, 512, 512),
        (4, 128, 128),
    ):
        q, k, v = heads(sequences * new)
        attend = paged(sequences, context, new)
        full = [torch.randn(sequences, c.num_heads, n, c.head_dim).to(dtype) for n in (new, context, context)]

        def ours(attend: Attend = attend, q: Tensor = q, k: Tensor = k, v: Tensor = v) -> None:
            for layer in range(c.num_layers):
                attend(layer, q, k, v)

        def plain(full: list[Tensor] = full, causal: bool = new > 1) -> None:
            F.scaled_dot_product_attention(*full, is_causal=causal)

        took, torchs = alternate(seconds, ours, plain)
        took /= c.num_layers
        nbytes = sequences * context * 4 * c.num_heads * c.head_dim
        print(
            f"attention {sequences:2} x {new:3} tokens at {context:4}: {took * 1e6:6.0f} us "
            f"{nbytes / took / 1e9:5.1f} GB/s; torch {torchs * 1e6:6.0f} us, {torchs / took:.1f}x"
        )


def rows(seconds: float) -> None:
    """Measure the kernels that work row by row: norm, rotation, top candidates."""
    c = CONFIG
    for count in (1, 32, 512):
        x, weight = torch.randn(count, c.hidden_size).bfloat16(), torch.ones(c.hidden_size).bfloat16()
        qkv, cos = torch.randn(count, 3 * c.hidden_size).bfloat16(), torch.ones(count, c.head_dim // 2)
        norm, rope = alternate(
            seconds,
            lambda x=x, weight=weight: ops.rms_norm(x, weight, 1e-6),
            lambda qkv=qkv, cos=cos: ops.rope_(qkv, 2 * c.num_heads, c.head_dim, cos, cos),
        )
        print(f"rows {count:3}: rms_norm {norm * 1e6:.1f} us, rope {rope * 1e6:.1f} us")
    for count in (1, 32):
        logits = torch.randn(count, c.vocab_size)
        took, torchs = alternate(
            seconds, lambda x=logits: ops.top_candidates(x, 64), lambda x=logits: x.topk(64)
        )
        print(
            f"top_candidates {count} x {c.vocab_size}: {took * 1e6 / count:.1f} us a row; torch {torchs / took:.1f}x"
        )


def step(seconds: float) -> None:
    """Measure a whole decoding step, head included, at context 128, and the rate at which it reads weights."""
    for format, dtype in FORMATS:
        model = accelerate(Llama(CONFIG, dtype=dtype), format)
        nbytes = sum(m.nbytes for m in model.modules() if isinstance(m, PackedLinear))
        for sequences in (1, 32):
            attend = paged(sequences, 128, 1, dtype)
            tokens, positions = torch.zeros(1, sequences, dtype=torch.int64), torch.full((sequences,), 127)
            (took,) = alternate(
                seconds,
                lambda t=tokens, p=positions, a=attend, m=model: m.head(m.hidden(t, p, a)),
            )
            print(
                f"step {format:8} {sequences:2} sequences: {took * 1e3:6.2f} ms, {sequences / took:6.0f} tok/s, "
                f"weights at {nbytes / took / 1e9:.1f} GB/s"
            )


def heads(tokens: int, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor, Tensor]:
    """Return queries, keys and values of `tokens` tokens as the model passes them: [1, heads, tokens, head_dim]."""
    c = CONFIG
    qkv = torch.randn(1, tokens, c.num_heads + 2 * c.num_kv_heads, c.head_dim).to(dtype).transpose(1, 2)
    q, k, v = qkv.split([c.num_heads, c.num_kv_heads, c.num_kv_heads], 1)
    return q, k, v


def paged(sequences: int, context: int, new: int, dtype: torch.dtype = torch.bfloat16) -> Attend:
    """Return the attention of a step that adds `new` tokens to each sequence, in a full cache of scattered blocks."""
    width = ceil_div(context, BLOCK_SIZE)
    cache = CpuCache(CONFIG, sequences * width, dtype, BLOCK_SIZE)
    table = torch.randperm(sequences * width).view(sequences, width)

    def batch(new: int) -> StepBatch:
        positions = torch.arange(context - new, context).repeat(sequences)
        sequence = torch.arange(sequences).repeat_interleave(new)
        return StepBatch(
            tokens=positions,
            positions=positions,
            slots=table[sequence, positions // BLOCK_SIZE] * BLOCK_SIZE + positions % BLOCK_SIZE,
            query_start=torch.arange(0, sequences * new + 1, new, dtype=torch.int32),
            context_len=torch.full((sequences,), context, dtype=torch.int32),
            block_table=table.int(),
            logit_rows=positions[:0],
        )

    fill = cache.attend(batch(context))
    for layer in range(CONFIG.num_layers):
        fill(layer, *heads(sequences * context, dtype))
    return cache.attend(batch(new))


def alternate(seconds: float, *calls: Callable[[], object]) -> list[float]:
    """Return the median seconds of each call; the calls alternate, after one to warm up."""
    times: list[list[float]] = [[] for _ in calls]
    for call in calls:
        call()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times[0]) < 3:
        for call, seconds_of_call in zip(calls, times, strict=True):
            start = time.perf_counter()
            call()
            seconds_of_call.append(time.perf_counter() - start)
    return [statistics.median(t) for t in times]


if __name__ == "__main__":
    auto_cli(main)
