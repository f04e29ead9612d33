"""The engine on a GPU beside the engine on a CPU: the same tokens, whatever the order, the cache and the format."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from llama_ray.data.tokenizing.tokenizer import Tokenizer
from llama_ray.generation.backends.prepare import plain_backend, prepare
from llama_ray.generation.engine import Engine
from llama_ray.generation.sampling.params import SamplingParams
from llama_ray.generation.sampling.sampler import Sampler
from llama_ray.model.llama import Llama
from llama_ray.pretrained import save_pretrained
from tests.generation.helpers import Row, random_prompts, run_together
from tests.small_models import random_model, small_config

pytestmark = pytest.mark.cuda
CUDA = torch.device("cuda")
CACHE_OF_FEW_BLOCKS = 14


def on_gpu(model: Llama, dtype: torch.dtype = torch.float32) -> Llama:
    return copy.deepcopy(model).to(CUDA, dtype)


def few_blocks(model: Llama, dtype: torch.dtype = torch.float32) -> int:
    """Return the bytes of a cache that a handful of requests fill, so that some are preempted."""
    c = model.config
    block = 2 * c.num_layers * c.num_kv_heads * c.head_dim * 32 * dtype.itemsize
    return CACHE_OF_FEW_BLOCKS * block


@pytest.mark.parametrize("prefix_caching", [False, True])
@pytest.mark.parametrize("n", [1, 3])
def test_many_requests_in_a_small_cache_give_the_tokens_of_a_cpu(
    n: int, prefix_caching: bool, model: Llama
) -> None:
    """Sampled with seeds, in fp32, in batches that change at every step, with preemption."""
    prompts = random_prompts(model, 24)
    options: dict[str, Any] = {
        "max_num_seqs": 12,
        "max_num_batched_tokens": 96,
        "enable_prefix_caching": prefix_caching,
        "kv_cache_memory_bytes": few_blocks(model),
    }
    expected = run_together(Engine(plain_backend(model), None, **options), prompts, n)
    got = run_together(Engine(prepare(on_gpu(model)), None, **options), prompts, n)
    same = sum(a == b for a, b in zip(got, expected, strict=True))
    # Where two tokens are almost equally likely, other rounding may draw the other one.
    assert same >= len(prompts) - 1


def test_greedy_tokens_of_fused_and_of_plain_layers_are_those_of_a_cpu(model: Llama) -> None:
    prompts = random_prompts(model, 8)
    greedy = SamplingParams(max_tokens=30, temperature=0.0, ignore_eos=True)
    expected = [c.token_ids for c in Engine(plain_backend(model), None).generate(prompts, greedy)]
    for backend in (prepare(on_gpu(model)), plain_backend(on_gpu(model))):
        assert [c.token_ids for c in Engine(backend, None).generate(prompts, greedy)] == expected


@pytest.mark.parametrize("quantization", [None, "int8", "int4"])
def test_with_batch_invariance_tokens_do_not_depend_on_the_company(quantization: Any, wide: Llama) -> None:
    prompts = random_prompts(wide, 20)
    backend = prepare(on_gpu(wide, torch.bfloat16), quantization, batch_invariant=True)
    engine = Engine(backend, None, max_num_seqs=16, max_num_batched_tokens=200)
    together = run_together(engine, prompts)
    params = SamplingParams(max_tokens=40, temperature=0.9, top_p=0.95, ignore_eos=True)
    for i, prompt in enumerate(prompts):
        alone = engine.generate([prompt], dataclasses.replace(params, seed=i, max_tokens=10 + i % 31))
        assert alone[0].token_ids == together[i][0], i


@pytest.mark.parametrize(("quantization", "tolerance"), [(None, 0.1), ("int8", 0.3), ("int4", 0.3)])
def test_a_checkpoint_of_a_cpu_gives_its_log_probabilities_on_a_gpu(
    quantization: Any, tolerance: float, wide: Llama, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    save_pretrained(copy.deepcopy(wide), tokenizer, tmp_path)
    params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0)
    text = "The quick brown fox jumps over the lazy dog, and the dog sleeps on."

    def logprobs(device: str, **options: Any) -> torch.Tensor:
        with Engine.from_pretrained(tmp_path, dtype=torch.bfloat16, device=device, **options) as engine:
            [completion] = engine.generate([text], params)
        reports = completion.prompt_logprobs
        assert reports is not None
        return torch.tensor([r.logprob for r in reports if r is not None])

    # With 8 and 4 bits a CPU rounds the inputs of products, too.
    expected, got = (logprobs(device, quantization=quantization) for device in ("cpu", "cuda"))
    assert (got - expected).abs().mean() < tolerance


def test_the_sampler_draws_the_tokens_that_it_draws_on_a_cpu() -> None:
    logits = torch.randn(64, 5000, generator=torch.Generator().manual_seed(0)) * 3
    kinds = (
        SamplingParams(temperature=0.0),
        SamplingParams(temperature=0.8, top_k=40, top_p=0.9),
        SamplingParams(temperature=1.0),
        SamplingParams(temperature=1.2, top_p=0.95, min_p=0.01),
        SamplingParams(temperature=0.7, repetition_penalty=1.3, frequency_penalty=0.5, presence_penalty=0.2),
        SamplingParams(temperature=0.9, logit_bias={7: 5.0, 11: -100.0}, top_k=1000),
        SamplingParams(temperature=0.9, allowed_token_ids=tuple(range(0, 5000, 7))),
    )
    rows = [Row(kinds[i % len(kinds)], prompt=[1, 2, 3, i], output=[5, 5, 9], seed=i) for i in range(64)]
    expected = Sampler().sample(logits.clone(), rows)
    got = Sampler().sample(logits.to(CUDA), rows)
    same = sum(a.token_id == b.token_id for a, b in zip(got, expected, strict=True))
    assert same >= 63


@pytest.fixture(scope="module")
def wide(tokenizer: Tokenizer) -> Llama:
    """A model whose products are divided into several tiles."""
    return random_model(
        small_config(tokenizer.vocab_size, hidden_size=256, num_layers=3, num_heads=8, intermediate_size=640)
    )
