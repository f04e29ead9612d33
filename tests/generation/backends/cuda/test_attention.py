"""Compare attention over pages with the plain torch cache on the same batches."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed (the CPU build of torch comes without)")

from llama_ray.generation.backends.batch import StepBatch
from llama_ray.generation.backends.cuda.attention import attend
from llama_ray.generation.backends.cuda.tiles import decode_tile
from llama_ray.model.layers import rotate
from tests.generation.backends.cuda.helpers import filled, inputs, make_config, step

CHUNKS = [(40, 40), (1, 70), (1, 1), (5, 48), (17, 33), (1, 32), (64, 64)]
"""(queries, context length) of whole prompts, later chunks of prompts, and decoding sequences."""


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
    ours, _ = filled(config, dtype, device, batch_invariant=True)
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


@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "splits"),
    [(2, 2, 64, 2), (4, 1, 128, 3), (8, 1, 12, 4), (8, 1, 64, 7), (3, 1, 16, 8), (20, 1, 16, 2)],
)
def test_a_context_that_programs_share_equals_the_plain_cache(
    heads: int, kv_heads: int, dim: int, splits: int, device: torch.device
) -> None:
    """Contexts end before, at and after the borders of parts; the table's other entries are of no block."""
    config = make_config(heads, kv_heads, dim)
    ours, reference = filled(config, torch.float32, device)
    batch = step([(1, context) for context in (1, 31, 32, 33, 64, 65, 130, 250)], device)
    qkv = inputs(config, 8, torch.float32, device)
    expected = reference.attend(batch)(0, *qkv)[0].transpose(0, 1)
    for name in ("keys", "values"):
        getattr(ours, name)[0].copy_(getattr(reference, name)[0])
    used = torch.arange(batch.block_table.shape[1], device=device) * 16 < batch.context_len[:, None]
    table = torch.where(used, batch.block_table, 1 << 30)
    arrived = torch.zeros(8 * kv_heads, dtype=torch.int32, device=device)
    query, steps = qkv[0][0].transpose(0, 1), (batch.query_start, batch.context_len, table)
    tile = decode_tile(dim, torch.float32)
    for _ in range(2):
        got = attend(query, ours.keys[0], ours.values[0], *steps, tile, splits=splits, arrived=arrived)
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)
        assert not arrived.any()


@pytest.mark.parametrize("context", [1, 300, 1000])
def test_the_cache_lets_programs_share_the_context_of_a_single_sequence(
    context: int, device: torch.device, half: torch.dtype
) -> None:
    config = make_config(4, 2, 16)
    ours, reference = filled(config, half, device)
    batch = step([(1, context)], device)
    qkv = inputs(config, 1, half, device)
    torch.testing.assert_close(
        ours.attend(batch)(0, *qkv), reference.attend(batch)(0, *qkv), atol=0.005, rtol=0.02
    )


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
