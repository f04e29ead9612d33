"""Compare attention over pages with the plain torch cache on the same batches."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed (the CPU build of torch comes without)")

from llama_ray.generation.backends.batch import StepBatch
from llama_ray.generation.backends.cuda.attention import ROWS
from llama_ray.generation.backends.cuda.cache import PagedCache
from llama_ray.generation.backends.kv_cache import TorchCache
from llama_ray.model.config import LlamaConfig
from llama_ray.model.layers import rotate
from llama_ray.utils.integers import ceil_div

BLOCK_SIZE = 16
CHUNKS = [(40, 40), (1, 70), (1, 1), (5, 48), (17, 33), (1, 32), (64, 64)]
"""(queries, context length) of whole prompts, later chunks of prompts, and decoding sequences."""


def make_config(heads: int = 4, kv_heads: int = 2, dim: int = 16) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=8,
        hidden_size=heads * dim,
        num_layers=2,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=dim,
        intermediate_size=8,
    )


def step(chunks: list[tuple[int, int]], device: torch.device, seed: int = 0) -> StepBatch:
    """Return a step of sequences whose blocks are scattered over 64; the table has one more column than needed."""
    generator = torch.Generator().manual_seed(seed)
    free = (torch.randperm(63, generator=generator) + 1).tolist()
    width = max(ceil_div(context, BLOCK_SIZE) for _, context in chunks) + 1
    table = torch.zeros(len(chunks), width, dtype=torch.int32)
    positions = [torch.arange(context - queries, context) for queries, context in chunks]
    slots = []
    for row, (_, context), at in zip(table, chunks, positions, strict=True):
        count = ceil_div(context, BLOCK_SIZE)
        row[:count] = torch.tensor([free.pop() for _ in range(count)])
        slots.append(row[at // BLOCK_SIZE].long() * BLOCK_SIZE + at % BLOCK_SIZE)
    starts = torch.tensor([0, *(queries for queries, _ in chunks)]).cumsum(0).int()
    batch = (torch.zeros(int(starts[-1]), dtype=torch.long), torch.cat(positions), torch.cat(slots), starts)
    contexts = torch.tensor([context for _, context in chunks], dtype=torch.int32)
    return StepBatch(
        *(t.to(device) for t in (*batch, contexts, table, torch.arange(len(chunks)))),
    )


def filled(config: LlamaConfig, dtype: torch.dtype, device: torch.device) -> tuple[PagedCache, TorchCache]:
    """Return both caches with the same random contents, NaN in blocks that no sequence of `step` has."""
    caches = (
        PagedCache(config, 66, dtype, device, BLOCK_SIZE),
        TorchCache(config, 66, dtype, device, BLOCK_SIZE),
    )
    generator = torch.Generator().manual_seed(1)
    for layer in range(config.num_layers):
        for name in ("keys", "values"):
            content = torch.randn(getattr(caches[1], name)[0].shape, generator=generator)
            content[0] = content[64:] = torch.nan
            for cache in caches:
                getattr(cache, name)[layer].copy_(content)
    return caches


def inputs(config: LlamaConfig, tokens: int, dtype: torch.dtype, device: torch.device) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [
        torch.randn(1, heads, tokens, config.head_dim, generator=generator).to(device, dtype)
        for heads in (config.num_heads, config.num_kv_heads, config.num_kv_heads)
    ]


@pytest.mark.parametrize("chunks", [CHUNKS, CHUNKS[:1], [(1, 33)], [(1, c) for c in (1, 16, 17, 80, 3)]])
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(4, 2, 16), (3, 1, 12), (2, 2, 32), (20, 1, 16)])
def test_any_mix_of_chunks_equals_the_plain_cache(
    chunks: list[tuple[int, int]], heads: int, kv_heads: int, dim: int, device: torch.device
) -> None:
    config = make_config(heads, kv_heads, dim)
    ours, reference = filled(config, torch.float32, device)
    batch = step(chunks, device)
    qkv = inputs(config, len(batch.tokens), torch.float32, device)
    for layer in range(2):
        expected = reference.attend(batch)(layer, *qkv)
        torch.testing.assert_close(ours.attend(batch)(layer, *qkv), expected, atol=1e-5, rtol=1e-4)
    for name in ("keys", "values"):
        for layer in range(2):
            torch.testing.assert_close(
                getattr(ours, name)[layer], getattr(reference, name)[layer], equal_nan=True, atol=0, rtol=0
            )


def test_half_precision_is_close_to_the_plain_cache(device: torch.device, half: torch.dtype) -> None:
    config = make_config()
    ours, reference = filled(config, half, device)
    batch = step(CHUNKS, device)
    qkv = inputs(config, len(batch.tokens), half, device)
    torch.testing.assert_close(
        ours.attend(batch)(0, *qkv), reference.attend(batch)(0, *qkv), atol=0.02, rtol=0.02
    )


@pytest.mark.parametrize("precise", [True, False])
def test_a_query_gives_the_same_bits_in_a_mix_alone_and_as_a_decoded_token(
    device: torch.device, half: torch.dtype, precise: bool
) -> None:
    dtype = torch.float32 if precise else half
    config = make_config()
    ours, _ = filled(config, dtype, device)
    ours.prompt_rows = ROWS
    batch = step(CHUNKS, device)
    qkv = inputs(config, len(batch.tokens), dtype, device)
    mixed = ours.attend(batch)(0, *qkv)
    for s, (queries, context) in enumerate(CHUNKS):
        start = int(batch.query_start[s])
        for first in {0, queries // 2, queries - 1}:
            rows = slice(start + first, start + queries)
            alone = StepBatch(
                batch.tokens[rows],
                batch.positions[rows],
                batch.slots[rows],
                torch.tensor([0, queries - first], dtype=torch.int32, device=device),
                batch.context_len[s : s + 1],
                batch.block_table[s : s + 1],
                batch.logit_rows[:1],
            )
            again = ours.attend(alone)(0, *(t[:, :, rows] for t in qkv))
            assert torch.equal(again, mixed[:, :, rows])
        if queries > 1:
            row = slice(start + queries // 2, start + queries // 2 + 1)
            seen = torch.tensor([context - queries + queries // 2 + 1], dtype=torch.int32, device=device)
            decoded = StepBatch(
                batch.tokens[row],
                batch.positions[row],
                batch.slots[row],
                torch.tensor([0, 1], dtype=torch.int32, device=device),
                seen,
                batch.block_table[s : s + 1],
                batch.logit_rows[:1],
            )
            again = ours.attend(decoded)(0, *(t[:, :, row] for t in qkv))
            assert torch.equal(again, mixed[:, :, row])


def test_joined_projections_are_rotated_stored_and_attended(device: torch.device) -> None:
    config = make_config()
    ours, reference = filled(config, torch.float32, device)
    batch = step(CHUNKS, device)
    q, k, v = inputs(config, len(batch.tokens), torch.float32, device)
    angles = torch.outer(batch.positions.float(), torch.rand(config.head_dim // 2, device=device))
    rope = angles.cos(), angles.sin()
    expected = reference.attend(batch)(1, rotate(q, *rope), rotate(k, *rope), v)
    qkv = torch.cat([t[0].transpose(0, 1).flatten(1) for t in (q, k, v)], 1)
    got = ours.attend(batch).projected(1, qkv, rope)
    torch.testing.assert_close(got.transpose(0, 1)[None], expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(ours.keys[1], reference.keys[1], equal_nan=True)
    torch.testing.assert_close(ours.values[1], reference.values[1], equal_nan=True, atol=0, rtol=0)


def test_a_block_is_copied_in_all_layers(device: torch.device) -> None:
    ours, _ = filled(make_config(), torch.float32, device)
    ours.copy_block(3, 7)
    for tensor in (*ours.keys, *ours.values):
        assert torch.equal(tensor[7], tensor[3])
