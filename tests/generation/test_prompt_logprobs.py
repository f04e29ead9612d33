"""Log-probabilities of a prompt's own tokens, however the prompt is computed."""

from __future__ import annotations

import copy
import dataclasses
import random

import pytest

from llama_ray.data.tokenizing.tokenizer import Tokenizer
from llama_ray.generation.backends.prepare import prepare
from llama_ray.generation.engine import Engine
from llama_ray.generation.sampling.params import SamplingParams
from llama_ray.model.llama import Llama
from tests.generation.helpers import random_prompts


def wanted(n: int = 1, seed: int = 0) -> SamplingParams:
    return SamplingParams(max_tokens=30, seed=seed, prompt_logprobs=2, n=n, ignore_eos=True)


@pytest.mark.parametrize("n", [1, 3])
def test_chunks_and_preemption_report_each_token_of_a_prompt_once(
    model: Llama, tokenizer: Tokenizer, n: int
) -> None:
    prompts = random_prompts(model, 40)
    backend = prepare(copy.deepcopy(model))
    alone = Engine(backend, tokenizer)
    expected = [c for i, prompt in enumerate(prompts) for c in alone.generate([prompt], wanted(n, i))]
    few_blocks = 8 * backend.block_bytes
    engine = Engine(
        backend, tokenizer, max_num_seqs=6, max_num_batched_tokens=8, kv_cache_memory_bytes=few_blocks
    )
    got = engine.generate(prompts, [wanted(n, i) for i in range(len(prompts))])
    assert engine.stats.preemptions > 3
    assert got == expected
    for completion in got:
        assert completion.prompt_logprobs is not None
        assert [p.token_id for p in completion.prompt_logprobs] == completion.prompt_token_ids[1:]


def test_candidates_that_start_later_report_the_prompt_too_but_compute_it_once(
    model: Llama, tokenizer: Tokenizer
) -> None:
    prompt = [random.Random(0).randrange(300) for _ in range(100)]
    engine = Engine(model, tokenizer, max_num_seqs=2)
    first, *others = engine.generate([prompt], wanted(n=6))
    assert engine.stats.prompt_tokens == 100 + 4 * (100 - 96)
    assert all(c.prompt_logprobs == first.prompt_logprobs for c in others)


def test_a_prompt_of_one_token_has_an_empty_report(engine: Engine) -> None:
    assert engine.generate([[1]], wanted())[0].prompt_logprobs == []
    assert engine.generate([[1]])[0].prompt_logprobs is None


def test_a_report_from_a_position_on_is_the_end_of_the_whole_one_and_its_context_is_computed_once(
    model: Llama, tokenizer: Tokenizer
) -> None:
    rng = random.Random(1)
    context = [rng.randrange(300) for _ in range(100)]
    prompts = [[*context, *(rng.randrange(300) for _ in range(length))] for length in (1, 5, 40)]
    params = SamplingParams(max_tokens=0, prompt_logprobs=0)
    backend = prepare(copy.deepcopy(model))
    whole = Engine(backend, tokenizer).generate(prompts, params)
    engine = Engine(backend, tokenizer)
    params = dataclasses.replace(params, prompt_logprobs_start=100)
    # The first one publishes the context.
    ends = [*engine.generate(prompts[:1], params), *engine.generate(prompts[1:], params)]
    assert [c.prompt_logprobs for c in ends] == [(c.prompt_logprobs or [])[99:] for c in whole]
    assert engine.stats.prompt_tokens == 101 + (105 - 96) + (140 - 96)


def test_tokens_that_would_follow_a_prompt_are_reported_as_if_each_had_been_its_last(
    model: Llama, tokenizer: Tokenizer
) -> None:
    rng = random.Random(2)
    prompts = [[rng.randrange(300) for _ in range(length)] for length in (1, 33, 70)]
    engine = Engine(prepare(copy.deepcopy(model)), tokenizer, max_num_seqs=2, max_num_batched_tokens=32)
    params = SamplingParams(max_tokens=0, prompt_logprobs=1)
    for start in (1, 20, 500):
        wanted = dataclasses.replace(params, prompt_logprobs_next=(7, 8, 7), prompt_logprobs_start=start)
        for prompt, completion in zip(prompts, engine.generate(prompts, wanted), strict=True):
            seven, eight = (
                c.prompt_logprobs or [] for c in engine.generate([[*prompt, 7], [*prompt, 8]], params)
            )
            expected = [*seven[:-1], seven[-1], eight[-1], seven[-1]][min(start, len(prompt)) - 1 :]
            assert completion.prompt_logprobs == expected


def test_a_report_that_begins_behind_the_prompt_is_empty(engine: Engine) -> None:
    params = SamplingParams(max_tokens=0, prompt_logprobs=0, prompt_logprobs_start=3)
    assert engine.generate([[1, 2, 3]], params)[0].prompt_logprobs == []
