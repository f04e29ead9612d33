from __future__ import annotations

import pytest
import torch

from llama_ray.generation.backends.kv_cache import TorchCache, count_blocks
from llama_ray.generation.backends.runner import Runner
from llama_ray.generation.sampling.params import SamplingParams
from llama_ray.generation.scheduling.sequence import SequenceState
from llama_ray.generation.scheduling.step_plan import Chunk, StepPlan
from llama_ray.generation.scheduling.text import TextOutput
from llama_ray.model.config import LlamaConfig
from llama_ray.model.llama import Llama
from llama_ray.utils.integers import ceil_div

SIZE = 8
CPU = torch.device("cpu")


def placed(tokens: list[int], blocks: list[int]) -> SequenceState:
    s = SequenceState(0, tokens, SamplingParams(max_tokens=1), TextOutput(None, ()), ())
    s.blocks = blocks
    return s


def run(runner: Runner, work: list[tuple[SequenceState, int]]) -> torch.Tensor:
    """Compute that number of tokens of each sequence; return the logits of those that are complete."""
    chunks = [Chunk(s, n) for s, n in work]
    logits = runner.run(StepPlan(chunks)).next
    for s, n in work:
        s.computed += n
    return logits


def make(model: Llama, dtype: torch.dtype = torch.float32) -> Runner:
    cache = TorchCache(model.config, 40, dtype, "cpu", SIZE)
    for tensor in (*cache.keys, *cache.values):
        # Entries that were never written must not be read.
        tensor.fill_(torch.nan)
    return Runner(model, cache)


@torch.no_grad()
def test_logits_equal_those_of_the_whole_sequence_for_any_chunks(model: Llama) -> None:
    """Chunks of prompts and decoding sequences share steps; blocks are scattered over the cache."""
    generator = torch.Generator().manual_seed(0)
    texts = [torch.randint(model.config.vocab_size, (n,), generator=generator).tolist() for n in (50, 33, 9)]
    whole = [model(torch.tensor([t]))[0, -1] for t in texts]
    order = (1 + torch.randperm(39, generator=generator)).tolist()
    sequences = []
    for text in texts:
        sequences.append(placed(text, [order.pop() for _ in range(ceil_div(len(text), SIZE))]))
    runner = make(model)
    a, b, c = sequences
    assert len(run(runner, [(a, 20), (b, 3)])) == 0
    [got_c] = run(runner, [(a, 29), (b, 29), (c, 9)])
    got_a, got_b = run(runner, [(a, 1), (b, 1)])
    torch.testing.assert_close(torch.stack([got_a, got_b, got_c]), torch.stack(whole), atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_a_copied_block_does_not_change_when_its_source_is_overwritten(model: Llama) -> None:
    runner = make(model)
    expected = run(runner, [(first := placed([1, 2, 3, 4], [5]), 4)])
    again = placed([1, 2, 3, 4], [9])
    again.computed = 3
    runner.cache.copy_block(5, 9)
    run(runner, [(placed([7] * 8, [5]), 8)])
    torch.testing.assert_close(run(runner, [(again, 1)]), expected)
    assert first.computed == 4


@torch.no_grad()
def test_bfloat16_is_close_to_one_forward_pass_without_a_cache() -> None:
    config = LlamaConfig(
        vocab_size=100, hidden_size=64, num_layers=2, num_heads=4, num_kv_heads=1, intermediate_size=96
    )
    model = Llama(config, seed=0, dtype=torch.bfloat16)
    tokens = list(range(40))
    runner = make(model, torch.bfloat16)
    s = placed(tokens, [3, 1, 4, 2, 5])
    run(runner, [(s, 30)])
    for _ in range(9):
        run(runner, [(s, 1)])
    torch.testing.assert_close(
        run(runner, [(s, 1)]), model(torch.tensor([tokens]))[0, -1:], atol=0.02, rtol=0.02
    )


def test_block_bytes_equal_the_memory_of_the_cache() -> None:
    config = LlamaConfig(vocab_size=8, hidden_size=12, num_layers=3, num_heads=3, intermediate_size=8)
    cache = TorchCache(config, 5, torch.float32, "cpu", SIZE)
    total = sum(t.nbytes for t in (*cache.keys, *cache.values))
    assert total == 5 * TorchCache.block_bytes(config, SIZE, torch.float32)


def test_count_blocks_fills_the_memory_up_to_what_sequences_can_use() -> None:
    assert count_blocks(1000, 32, 4, 100, CPU, 10_000) == 10
    assert count_blocks(1000, 32, 4, 100, CPU, 10_000_000) == 1 + 4 * 4
    with pytest.raises(ValueError, match=r"max_seq_len is 100; .* lower max_seq_len, or raise kv_cache"):
        count_blocks(1000, 32, 4, 100, CPU, 4_999)
    with pytest.raises(ValueError, match=r"kv_cache_memory_bytes is 9.09e\+08 GiB; .* are free on cpu"):
        count_blocks(1000, 32, 4, 100, CPU, 10**18 - 24 * 10**15)
