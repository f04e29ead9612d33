"""Requests with different adapters share steps, and each gets what its merged model gives it."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from llama_ray.generation.backends.backend import Backend
from llama_ray.generation.backends.prepare import plain_backend, prepare
from llama_ray.generation.backends.quantize import Quantization
from llama_ray.generation.completion import Completion
from llama_ray.generation.engine import Engine
from llama_ray.generation.sampling.params import SamplingParams
from llama_ray.generation.speculation.draft_model import DraftModel
from llama_ray.generation.speculation.prompt_lookup import PromptLookup
from llama_ray.generation.speculation.proposer import Proposer
from llama_ray.model.llama import Llama
from tests.generation.adapters.helpers import merged, save_random_adapter
from tests.small_models import random_model, small_config

GREEDY = SamplingParams(max_tokens=12, temperature=0, logprobs=0, prompt_logprobs=0, ignore_eos=True)
SHAPES = {
    "usual": {},
    # Its products take an odd number of inputs, so the blocks run one by one.
    "odd": {"hidden_size": 33, "num_heads": 3, "num_kv_heads": 1, "head_dim": 14, "intermediate_size": 101},
}
PROMPTS = [[7, 3, 9, 11, 30], [50, 51, 52], [7, 3, 9, 11, 31], [80], list(range(40)), [7, 3, 9, 11, 30]]
NAMES = ["all", None, "some", "deep", "all", "some"]


@pytest.fixture(scope="module", params=SHAPES)
def model(request: pytest.FixtureRequest) -> Llama:
    return random_model(small_config(120, **SHAPES[request.param]))


@pytest.fixture(scope="module")
def adapters(model: Llama, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("adapters")
    return {
        "all": save_random_adapter(root / "all", model.config, 1),
        "some": save_random_adapter(root / "some", model.config, 2, rank=3, targets=("k_proj", "up_proj")),
        "deep": save_random_adapter(root / "deep", model.config, 3, rank=17, layers=[1]),
    }


def with_adapters(
    backend: Backend, adapters: dict[str, Path], proposer: Proposer | None = None, **options: int
) -> Engine:
    engine = Engine(backend, None, proposer=proposer, **options)
    for name, directory in adapters.items():
        engine.add_adapter(name, directory)
    return engine


def logprobs(completion: Completion) -> torch.Tensor:
    assert completion.logprobs is not None
    entries = [*(completion.prompt_logprobs or ()), *completion.logprobs]
    return torch.tensor([entry.logprob for entry in entries])


@pytest.mark.parametrize("kind", [plain_backend, prepare])
def test_a_mixed_batch_gives_each_request_what_its_merged_model_gives(
    model: Llama, adapters: dict[str, Path], kind: Callable[[Llama], Backend]
) -> None:
    engine = with_adapters(kind(copy.deepcopy(model)), adapters)
    together = engine.generate(PROMPTS, GREEDY, adapter=NAMES)
    for prompt, name, completion in zip(PROMPTS, NAMES, together, strict=True):
        whole = model if name is None else merged(model, adapters[name])
        alone = Engine(copy.deepcopy(whole), None).generate([prompt], GREEDY)[0]
        assert completion.token_ids == alone.token_ids
        torch.testing.assert_close(logprobs(completion), logprobs(alone), atol=1e-3, rtol=1e-4)
    assert len({tuple(completion.token_ids) for completion in (together[0], together[2], together[5])}) == 3


@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_a_quantised_base_takes_adapters_in_full_precision(
    model: Llama, adapters: dict[str, Path], quantization: Quantization
) -> None:
    """Close, not equal: an adapter's merged weights would be rounded with it."""
    engine = with_adapters(prepare(copy.deepcopy(model), quantization), adapters)
    prompt = list(range(60))
    params = dataclasses.replace(GREEDY, max_tokens=1)
    plain, adapted, whole = (
        logprobs(engine.generate([prompt], params)[0]),
        logprobs(engine.generate([prompt], params, adapter="all")[0]),
        logprobs(Engine(merged(model, adapters["all"]), None).generate([prompt], params)[0]),
    )
    assert (adapted - whole).norm() < 0.4 * (adapted - plain).norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_request_has_the_same_bits_whatever_adapters_the_others_have(
    model: Llama, adapters: dict[str, Path], dtype: torch.dtype
) -> None:
    engine = with_adapters(
        prepare(copy.deepcopy(model).to(dtype)), adapters, max_num_seqs=6, enable_prefix_caching=False
    )
    together = engine.generate(PROMPTS, GREEDY, adapter=NAMES)
    for prompt, name, completion in zip(PROMPTS, NAMES, together, strict=True):
        alone = engine.generate([prompt], GREEDY, adapter=name)[0]
        assert logprobs(completion).equal(logprobs(alone))


def test_the_cache_of_one_adapter_is_never_read_by_another(model: Llama, adapters: dict[str, Path]) -> None:
    engine = with_adapters(prepare(copy.deepcopy(model)), {**adapters, "again": adapters["all"]})
    prompt = list(range(100))
    params = dataclasses.replace(GREEDY, prompt_logprobs=None, n=3)
    fresh = {
        name: with_adapters(prepare(copy.deepcopy(model)), adapters).generate([prompt], params, adapter=name)
        for name in (None, "all", "some")
    }
    for name in (None, "all", "some", "all", None):
        completions = engine.generate([prompt], params, adapter=name)
        assert [logprobs(c).tolist() for c in completions] == [logprobs(c).tolist() for c in fresh[name]]
    reused = engine.stats.reused_tokens
    engine.generate([prompt], params, adapter="again")
    assert engine.stats.reused_tokens > reused, "the same weights share their blocks, whatever their name"


@pytest.mark.parametrize("proposer", [PromptLookup, None])
def test_drafts_change_no_token_of_a_request_with_an_adapter(
    model: Llama, adapters: dict[str, Path], proposer: type[Proposer] | None
) -> None:
    params = dataclasses.replace(GREEDY, prompt_logprobs=None, max_tokens=30)
    expected = with_adapters(prepare(copy.deepcopy(model)), adapters).generate(PROMPTS, params, adapter=NAMES)
    drafts = proposer() if proposer else DraftModel(copy.deepcopy(model))
    engine = with_adapters(prepare(copy.deepcopy(model)), adapters, drafts)
    found = engine.generate(PROMPTS, params, adapter=NAMES)
    assert [c.token_ids for c in found] == [c.token_ids for c in expected]
    assert engine.stats.draft_tokens > 0


def test_more_adapters_than_max_loras_take_turns(model: Llama, adapters: dict[str, Path]) -> None:
    expected = with_adapters(plain_backend(copy.deepcopy(model)), adapters).generate(
        PROMPTS, GREEDY, adapter=NAMES
    )
    engine = with_adapters(plain_backend(copy.deepcopy(model)), adapters, max_loras=1)
    ids = [engine.submit(p, GREEDY, adapter=name) for p, name in zip(PROMPTS, NAMES, strict=True)]
    tokens: dict[int, list[int]] = {id: [] for id in ids}
    while engine.has_work:
        deltas = engine.step()
        assert len({NAMES[delta.request_id] for delta in deltas} - {None}) <= 1
        for delta in deltas:
            tokens[delta.request_id] += delta.token_ids
    assert [tokens[id] for id in ids] == [completion.token_ids for completion in expected]


def test_embeddings_are_those_of_the_merged_model(model: Llama, adapters: dict[str, Path]) -> None:
    engine = with_adapters(prepare(copy.deepcopy(model)), adapters)
    expected = Engine(merged(model, adapters["all"]), None).embed(PROMPTS[4])
    found = engine.embed(PROMPTS[4], adapter="all")
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), atol=1e-4, rtol=1e-4)
    assert engine.embed(PROMPTS[4]) != found


def test_preempted_requests_go_on_with_their_adapters(model: Llama, adapters: dict[str, Path]) -> None:
    params = dataclasses.replace(GREEDY, prompt_logprobs=None, max_tokens=60, n=2)
    roomy = with_adapters(prepare(copy.deepcopy(model)), adapters)
    expected = roomy.generate(PROMPTS, params, adapter=NAMES)
    backend = prepare(copy.deepcopy(model))
    tight = with_adapters(
        backend, adapters, max_seq_len=128, kv_cache_memory_bytes=11 * backend.block_bytes, max_loras=2
    )
    found = tight.generate(PROMPTS, params, adapter=NAMES)
    assert [logprobs(c).tolist() for c in found] == [logprobs(c).tolist() for c in expected]
    assert tight.stats.preemptions > 0
