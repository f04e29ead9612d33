from __future__ import annotations

import ctypes
from dataclasses import dataclass, field
from itertools import pairwise

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from llama_ray.generation.backends.backend import BLOCK_SIZE
from llama_ray.generation.backends.batch import StepBatch
from llama_ray.generation.backends.cpu.cache import CpuCache
from llama_ray.model.attention.causal import causal_attention
from llama_ray.model.config import LlamaConfig
from llama_ray.utils.integers import ceil_div

BLOCKS = 40
SHAPES = [(4, 4, 64), (8, 2, 32), (3, 1, 14), (12, 4, 80)]
"""(heads, key-value heads, head_dim)."""


def shape(heads: int, kv_heads: int, head_dim: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=8,
        hidden_size=8,
        num_layers=2,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        intermediate_size=8,
    )


@dataclass
class Text:
    """Queries, keys and values of a sequence, [1, heads, length, head_dim], and its blocks."""

    query: Tensor
    key: Tensor
    value: Tensor
    blocks: list[int] = field(default_factory=list)

    @classmethod
    def draw(cls, config: LlamaConfig, length: int, dtype: torch.dtype, seed: int) -> Text:
        generator = torch.Generator().manual_seed(seed)
        heads, kv = config.num_heads, config.num_kv_heads
        drawn = torch.randn(1, heads + 2 * kv, length, config.head_dim, generator=generator).to(dtype)
        query, key, value = drawn.split([heads, kv, kv], 1)
        return cls(query * 2, key, value)


def run(cache: CpuCache, layer: int, parts: list[tuple[Text, int, int]]) -> list[Tensor]:
    """Run one step: rows `start` to `end` of each text; return their outputs [1, heads, rows, head_dim]."""
    size = cache.block_size
    positions = [torch.arange(start, end) for _, start, end in parts]
    slots = [
        torch.tensor(t.blocks)[p // size] * size + p % size
        for (t, _, _), p in zip(parts, positions, strict=True)
    ]
    widest = max(len(t.blocks) for t, _, _ in parts)
    counts = torch.tensor([0, *(end - start for _, start, end in parts)])
    total = int(counts.sum())
    batch = StepBatch(
        tokens=torch.zeros(total, dtype=torch.int64),
        positions=torch.cat(positions),
        slots=torch.cat(slots),
        query_start=counts.cumsum(0).int(),
        context_len=torch.tensor([end for _, _, end in parts], dtype=torch.int32),
        block_table=torch.tensor(
            [t.blocks + [0] * (widest - len(t.blocks)) for t, _, _ in parts], dtype=torch.int32
        ),
        logit_rows=torch.zeros(0, dtype=torch.int64),
    )
    # As in the model: slices of one tensor [tokens, (heads + 2 kv) * head_dim], transposed to heads before tokens.
    rows = [
        torch.cat([getattr(t, name)[:, :, s:e] for name in ("query", "key", "value")], 1) for t, s, e in parts
    ]
    together = torch.cat(rows, 2).transpose(1, 2).contiguous().transpose(1, 2)
    heads, kv = parts[0][0].query.shape[1], parts[0][0].key.shape[1]
    out = cache.attend(batch)(layer, *together.split([heads, kv, kv], 1))
    return list(out.split([e - s for _, s, e in parts], 2))


def give_blocks(texts: list[Text], size: int, seed: int) -> None:
    free = torch.randperm(BLOCKS, generator=torch.Generator().manual_seed(seed)).tolist()
    for text in texts:
        text.blocks = [free.pop() for _ in range(ceil_div(text.query.shape[2], size))]


@pytest.mark.parametrize("numbers", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_equals_the_exact_one_for_prompts_chunks_and_single_tokens(
    kernels: ctypes.CDLL, dtype: torch.dtype, numbers: tuple[int, int, int]
) -> None:
    """Blocks are scattered, and their previous owner left NaN in them."""
    config = shape(*numbers)
    cache = CpuCache(config, BLOCKS, dtype, BLOCK_SIZE)
    cache.blocks.fill_(torch.nan)
    texts = [Text.draw(config, n, dtype, n) for n in (100, 33, 1, 32, 70)]
    give_blocks(texts, cache.block_size, 0)
    ends = [
        [40, 41, 42, 100],
        [31, 32, 33, 33],
        [0, 0, 1, 1],
        [32, 32, 32, 32],
        [1, 2, 69, 70],
    ]
    results: list[list[Tensor]] = [[] for _ in texts]
    starts = [0] * len(texts)
    for step in range(4):
        active = [i for i in range(len(texts)) if ends[i][step] > starts[i]]
        out = run(cache, 1, [(texts[i], starts[i], ends[i][step]) for i in active])
        for i, rows in zip(active, out, strict=True):
            results[i].append(rows)
            starts[i] = ends[i][step]
    for text, result in zip(texts, results, strict=True):
        exact = causal_attention(text.query.double(), text.key.double(), text.value.double())
        bound = 1e-5 if dtype == torch.float32 else 1e-2
        torch.testing.assert_close(torch.cat(result, 2).double(), exact, atol=bound, rtol=bound)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    numbers=st.sampled_from(SHAPES),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    cuts=st.lists(st.integers(1, 199), max_size=6),
    others=st.lists(st.integers(1, 150), max_size=3),
    seed=st.integers(0, 2**32),
)
def test_results_have_the_same_bits_in_any_chunks_and_batch(
    kernels: ctypes.CDLL,
    numbers: tuple[int, int, int],
    dtype: torch.dtype,
    cuts: list[int],
    others: list[int],
    seed: int,
) -> None:
    config = shape(*numbers)
    texts = [Text.draw(config, n, dtype, seed + i) for i, n in enumerate([200, *others])]
    cache = CpuCache(config, BLOCKS, dtype, BLOCK_SIZE)
    give_blocks(texts, cache.block_size, seed)
    (whole,) = run(cache, 0, [(texts[0], 0, 200)])

    cache = CpuCache(config, BLOCKS, dtype, BLOCK_SIZE)
    give_blocks(texts, cache.block_size, seed + 1)
    edges = [0, *sorted(set(cuts)), 200]
    chunks = []
    for start, end in pairwise(edges):
        other_parts = [(t, 0, t.query.shape[2]) for t in texts[1:]]
        chunks.append(run(cache, 0, [*other_parts, (texts[0], start, end)])[-1])
    assert torch.cat(chunks, 2).equal(whole)


def test_a_block_is_copied_in_all_layers(kernels: ctypes.CDLL) -> None:
    config = shape(4, 2, 16)
    cache = CpuCache(config, BLOCKS, torch.bfloat16, BLOCK_SIZE)
    text = Text.draw(config, 40, torch.bfloat16, 0)
    text.blocks = [3, 7]
    expected = []
    for layer in range(2):
        run(cache, layer, [(text, 0, 39)])
    cache.copy_block(7, 11)
    for layer in range(2):
        expected.append(run(cache, layer, [(text, 39, 40)])[0])
    text.blocks = [3, 11]
    for layer in range(2):
        assert run(cache, layer, [(text, 39, 40)])[0].equal(expected[layer])


def test_large_scores_do_not_overflow(kernels: ctypes.CDLL) -> None:
    """Scores grow into the thousands, so each block shrinks the sums of all earlier blocks to zero."""
    config = shape(1, 1, 16)
    text = Text.draw(config, 130, torch.float32, 0)
    text.query[:] = 100
    text.key[:] = torch.arange(130.0)[:, None]
    text.blocks = [4, 2, 9, 1, 0]
    (out,) = run(CpuCache(config, BLOCKS, torch.float32, BLOCK_SIZE), 0, [(text, 0, 130)])
    torch.testing.assert_close(out, text.value)


def test_block_bytes_are_those_of_the_tensors() -> None:
    config = shape(12, 4, 80)
    for dtype in (torch.float32, torch.bfloat16):
        cache = CpuCache(config, BLOCKS, dtype, BLOCK_SIZE)
        total = cache.blocks.nbytes
        assert CpuCache.block_bytes(config, cache.block_size, dtype) * BLOCKS == total


def test_a_dtype_or_block_size_without_kernels_is_refused() -> None:
    config = shape(4, 2, 16)
    with pytest.raises(ValueError, match=r"dtype is torch\.float16; the CPU cache holds float32 or bfloat16"):
        CpuCache(config, BLOCKS, torch.float16, BLOCK_SIZE)
    with pytest.raises(ValueError, match="block_size is 24; it must be a multiple of 16"):
        CpuCache(config, BLOCKS, torch.float32, 24)


def test_a_tensor_of_another_layout_is_refused() -> None:
    config = shape(4, 2, 16)
    text = Text.draw(config, 5, torch.float32, 0)
    text.blocks = [0]
    cache = CpuCache(config, BLOCKS, torch.bfloat16, BLOCK_SIZE)
    with pytest.raises(ValueError, match=r"attention over 5 tokens of torch\.bfloat16"):
        run(cache, 0, [(text, 0, 5)])
