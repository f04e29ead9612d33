"""Compare accelerated models on a paged cache, in graphs, with the plain model on the plain cache."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed (the CPU build of torch comes without)")

from llama_ray.generation.backends.batch import StepBatch
from llama_ray.generation.backends.cuda.cache import PagedCache
from llama_ray.generation.backends.cuda.graphs import CudaCapture, GraphRunner, batch_sizes
from llama_ray.generation.backends.cuda.modules import accelerate
from llama_ray.generation.backends.kv_cache import TorchCache
from llama_ray.generation.backends.quantize import Quantization, quantize
from llama_ray.generation.backends.runner import Runner
from llama_ray.model.config import LlamaConfig
from llama_ray.model.llama import Llama
from tests.generation.backends.cuda.helpers import BLOCK_SIZE, step
from tests.generation.helpers import dequantize
from tests.small_models import random_model

CHUNKS = [(17, 17), (1, 33), (1, 1), (4, 20)]
DECODES = [(1, 18), (1, 34), (1, 2), (1, 21), (1, 16)]


def make_model(device: torch.device, *, tied: bool = False) -> Llama:
    config = LlamaConfig(
        vocab_size=80,
        hidden_size=64,
        num_layers=2,
        num_heads=8,
        num_kv_heads=2,
        head_dim=16,
        intermediate_size=192,
        tie_embeddings=tied,
    )
    return random_model(config).to(device)


def make_batch(chunks: list[tuple[int, int]], seed: int = 0) -> StepBatch:
    """Return a step of random tokens; logits for each last token, and for row 0 twice, as prompt logprobs would."""
    batch = step(chunks, torch.device("cpu"), seed)
    tokens = torch.randint(80, batch.tokens.shape, generator=torch.Generator().manual_seed(seed))
    rows = torch.cat([batch.query_start[1:].long() - 1, torch.tensor([0, 0])])
    return StepBatch(
        tokens, batch.positions, batch.slots, batch.query_start, batch.context_len, batch.block_table, rows
    )


def eager(function: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, Callable[[], None]]:
    """Replace a CUDA graph without a GPU: a replay runs the same function again."""
    result = function()

    def replay() -> None:
        result.copy_(function())

    return result, replay


def graph_runner(model: Llama, *, batch_invariant: bool = False) -> GraphRunner:
    weight = model.embed_tokens.weight
    cache = PagedCache(
        model.config, 66, weight.dtype, weight.device, BLOCK_SIZE, batch_invariant=batch_invariant
    )
    return GraphRunner(model, cache, 8, 96, CudaCapture() if weight.is_cuda else eager)


def plain_runner(model: Llama) -> Runner:
    weight = model.embed_tokens.weight
    return Runner(model, TorchCache(model.config, 66, weight.dtype, weight.device, BLOCK_SIZE))


def prompts_of(chunks: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return chunks of the whole contexts, to be computed first, so that the caches hold them."""
    return [(context, context) for _, context in chunks]


@torch.inference_mode()
@pytest.mark.parametrize("tied", [False, True])
def test_an_accelerated_model_gives_the_logits_of_the_plain_one(device: torch.device, tied: bool) -> None:
    model = make_model(device, tied=tied)
    fast = accelerate(copy.deepcopy(model), None, False)
    reference, ours = plain_runner(model), graph_runner(fast)
    for chunks in (prompts_of(CHUNKS), CHUNKS, DECODES, DECODES[:3], DECODES[1:2]):
        batch = make_batch(chunks)
        torch.testing.assert_close(ours.forward(batch), reference.forward(batch), atol=2e-4, rtol=2e-4)
    assert sorted(ours.graphs) == [1, 4, 8]
    assert sum(p.nbytes for p in fast.parameters()) == sum(p.nbytes for p in model.parameters())


@torch.inference_mode()
def test_a_plain_model_reads_the_paged_cache_too(device: torch.device) -> None:
    model = make_model(device)
    reference, ours = plain_runner(model), graph_runner(model)
    for chunks in (prompts_of(CHUNKS), CHUNKS, DECODES, DECODES[:1]):
        batch = make_batch(chunks)
        torch.testing.assert_close(ours.forward(batch), reference.forward(batch), atol=2e-4, rtol=2e-4)


@torch.inference_mode()
def test_an_accelerated_model_works_without_a_cache(device: torch.device) -> None:
    model = make_model(device)
    tokens = torch.randint(80, (2, 20), generator=torch.Generator().manual_seed(0)).to(device)
    fast = accelerate(copy.deepcopy(model), None, False)
    torch.testing.assert_close(
        fast.head(fast.hidden(tokens)), model.head(model.hidden(tokens)), atol=2e-4, rtol=2e-4
    )


@torch.inference_mode()
@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_a_quantized_model_gives_the_logits_of_a_plain_one_with_rounded_weights(
    quantization: Quantization, device: torch.device
) -> None:
    model = make_model(device)
    fast = accelerate(copy.deepcopy(model), quantization, False)
    for name, weight in model.named_parameters():
        if weight.dim() == 2 and not name.startswith("embed_tokens"):
            rounded = quantize(weight, "int8" if name == "lm_head.weight" else quantization)
            weight.copy_(dequantize(rounded))
    reference, ours = plain_runner(model), graph_runner(fast)
    for chunks in (prompts_of(CHUNKS), DECODES, DECODES[1:2]):
        batch = make_batch(chunks)
        torch.testing.assert_close(ours.forward(batch), reference.forward(batch), atol=2e-4, rtol=2e-4)


@torch.inference_mode()
@pytest.mark.parametrize("quantization", [None, "int8", "int4"])
def test_with_batch_invariance_logits_have_the_same_bits_in_any_batch(
    quantization: Quantization | None, device: torch.device, half: torch.dtype
) -> None:
    """Compare whole prompts with prompts in chunks and with single tokens."""
    runner = graph_runner(accelerate(make_model(device).to(half), quantization, True), batch_invariant=True)
    whole = make_batch(prompts_of(CHUNKS))
    together = runner.forward(whole)[: len(CHUNKS)]
    for s, (_, context) in enumerate(CHUNKS):
        start = int(whole.query_start[s])
        for first in {context - 1, context // 2}:
            rows = slice(start + first, start + context)
            alone = StepBatch(
                whole.tokens[rows],
                whole.positions[rows],
                whole.slots[rows],
                torch.tensor([0, context - first], dtype=torch.int32),
                whole.context_len[s : s + 1],
                whole.block_table[s : s + 1],
                torch.tensor([context - first - 1]),
            )
            assert torch.equal(runner.forward(alone)[0], together[s])


def test_the_last_batch_size_is_at_least_the_largest_batch() -> None:
    assert batch_sizes(1)[0] == 1
    assert batch_sizes(24) == [1, 2, 4, 8, 16, 24]
    assert batch_sizes(25)[-1] == 32


@pytest.mark.cuda
@torch.inference_mode()
def test_a_replay_does_not_synchronise_and_takes_no_memory() -> None:
    """The host launches copies and replays without waiting; the device's memory stays the same."""
    device = torch.device("cuda")
    runner = graph_runner(accelerate(make_model(device), None, False))
    batch = make_batch(DECODES)
    runner.forward(batch)
    before = torch.cuda.memory_allocated()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(20):
            runner.forward(batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.cuda.memory_allocated() == before


@pytest.mark.cuda
@torch.inference_mode()
@pytest.mark.parametrize("preset", ["llama-3.2-1b", "tinyllama-1.1b"])
def test_a_large_model_in_bfloat16_is_as_precise_as_the_plain_one(preset: str) -> None:
    """Compare both with the model in fp32, for shapes of real models."""
    config = LlamaConfig.preset(preset, num_layers=4, max_seq_len=2048)
    exact = Llama(config, seed=0, device="cuda")
    model = copy.deepcopy(exact).to(torch.bfloat16)
    ours = graph_runner(accelerate(copy.deepcopy(model), None, False))
    precise, plain = plain_runner(exact), plain_runner(model)
    for chunks in (prompts_of(CHUNKS), CHUNKS, DECODES, DECODES[:1]):
        batch = make_batch(chunks)
        expected = precise.forward(batch)
        near = (plain.forward(batch).float() - expected).norm()
        assert (ours.forward(batch).float() - expected).norm() < 1.5 * near
