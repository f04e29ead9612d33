from __future__ import annotations

import pytest
import torch

from llama_ray.generation.kv_cache import KVCache
from llama_ray.generation.runner import Runner
from llama_ray.model.config import LlamaConfig
from llama_ray.model.llama import Llama


def make(model: Llama, slots: int) -> Runner:
    weight = model.embed_tokens.weight
    return Runner(model, KVCache(model.config, slots, model.config.max_seq_len, weight.dtype, weight.device))


@torch.no_grad()
def test_cached_logits_are_those_of_the_whole_sequence(model: Llama) -> None:
    """Prompts of different lengths in slots that are not neighbours, then decoding across a length step of 64."""
    generator = torch.Generator().manual_seed(0)
    vocab_size = model.config.vocab_size
    texts = [torch.randint(vocab_size, (n,), generator=generator).tolist() for n in (90, 75, 3)]
    starts, slots = (60, 70, 1), (1, 4, 5)
    runner = make(model, slots=6)
    whole = [model(torch.tensor([t]))[0] for t in texts]

    # The order of a prefill is free; slot 2 belongs to somebody who left.
    runner.prefill([2], [[1, 2, 3]])
    first = runner.prefill(slots[::-1], [t[:s] for t, s in zip(texts, starts, strict=True)][::-1])
    torch.testing.assert_close(
        first, torch.stack([w[s - 1] for w, s in zip(whole, starts, strict=True)][::-1]), atol=1e-4, rtol=1e-4
    )
    for step in range(30):
        active = [i for i in range(3) if starts[i] + step < len(texts[i])]
        positions = [starts[i] + step for i in active]
        tokens = [texts[i][p] for i, p in zip(active, positions, strict=True)]
        logits = runner.decode([slots[i] for i in active], tokens, positions)
        expected = torch.stack([whole[i][p] for i, p in zip(active, positions, strict=True)])
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)


def test_bfloat16_decodes_close_to_its_own_whole_forward() -> None:
    config = LlamaConfig(
        vocab_size=100, hidden_size=64, num_layers=2, num_heads=4, num_kv_heads=1, intermediate_size=96
    )
    model = Llama(config, seed=0, dtype=torch.bfloat16)
    tokens = list(range(40))
    runner = make(model, slots=2)
    runner.prefill([0], [tokens[:30]])
    for position in range(30, 40):
        logits = runner.decode([0], [tokens[position]], [position])
    with torch.no_grad():
        expected = model(torch.tensor([tokens]))[0, -1:]
    torch.testing.assert_close(logits, expected, atol=0.02, rtol=0.02)


def test_a_cleared_slot_carries_no_nan_into_its_next_sequence(model: Llama) -> None:
    runner = make(model, slots=1)
    expected = (runner.prefill([0], [[5, 6]]), runner.decode([0], [7], [2]))
    for tensor in (*runner.cache._keys, *runner.cache._values):
        tensor.fill_(torch.nan)
    runner.cache.clear(0)
    assert runner.prefill([0], [[5, 6]]).equal(expected[0])
    assert runner.decode([0], [7], [2]).equal(expected[1])


def test_a_cache_beyond_memory_is_refused_with_its_size() -> None:
    config = LlamaConfig.preset("llama-7b", max_seq_len=1_000_000)
    with pytest.raises(ValueError, match=r"max_batch_size 2 x max_seq_len 1000000 takes 976\.6 GiB"):
        KVCache(config, 2, 1_000_000, torch.bfloat16, "cpu")


def test_reported_bytes_are_those_of_the_tensors() -> None:
    config = LlamaConfig(vocab_size=8, hidden_size=12, num_layers=3, num_heads=3, intermediate_size=8)
    cache = KVCache(config, 5, 11, torch.float32, "cpu")
    assert cache.nbytes == 3 * 2 * (5 * 3 * 11 * 4) * 4
