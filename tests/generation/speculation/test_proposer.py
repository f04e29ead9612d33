from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch

from llama_ray.data.tokenizing.tokenizer import Tokenizer
from llama_ray.generation.backends.prepare import as_backend
from llama_ray.generation.engine import Engine
from llama_ray.generation.sampling.params import SamplingParams
from llama_ray.generation.speculation.draft_model import DraftModel
from llama_ray.generation.speculation.prompt_lookup import PromptLookup
from llama_ray.generation.speculation.proposer import Proposer
from llama_ray.model.llama import Llama
from tests.generation.helpers import random_prompts, run_together
from tests.small_models import random_model

GREEDY = SamplingParams(max_tokens=60, temperature=0, ignore_eos=True)


def similar(model: Llama) -> Llama:
    """Return a model that often, but not always, samples the same token."""
    other = Llama(model.config)
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        for parameter in other.layers[1].parameters():
            parameter.mul_(0.999)
    return other


PROPOSERS: dict[str, Callable[[Llama], Proposer]] = {
    "lookup": lambda model: PromptLookup(longest=2, shortest=1),
    "same": DraftModel,
    "similar": lambda model: DraftModel(similar(model)),
    "stranger": lambda model: DraftModel(random_model(model.config, seed=9)),
}


@pytest.mark.parametrize("kind", PROPOSERS)
def test_drafts_never_change_the_output(model: Llama, tokenizer: Tokenizer, kind: str) -> None:
    many = random_prompts(model, 16)
    plain = run_together(Engine(model, tokenizer), many)
    engine = Engine(model, tokenizer, proposer=PROPOSERS[kind](model), max_num_seqs=5)
    assert run_together(engine, many) == plain
    stats = engine.stats
    assert stats.draft_tokens > 0
    if kind in ("same", "similar"):
        assert stats.accepted_tokens > 0.3 * stats.draft_tokens
        assert stats.steps < 0.8 * sum(len(t) for [t] in plain)
    greedy = Engine(model, tokenizer).generate(many, GREEDY)
    assert engine.generate(many, GREEDY) == greedy


@pytest.mark.parametrize("kind", PROPOSERS)
def test_drafts_never_change_the_output_with_penalties_candidates_stops_and_few_blocks(
    model: Llama, tokenizer: Tokenizer, kind: str
) -> None:
    params = SamplingParams(
        max_tokens=50, temperature=1.0, seed=3, n=3, repetition_penalty=1.3, frequency_penalty=0.5,
        presence_penalty=0.2, logprobs=2, stop="the",
    )  # fmt: skip
    texts = ["The quick brown fox jumps over the lazy dog, the", "def add(a, b):\n    return"] * 3
    plain = Engine(model, tokenizer).generate(texts, params)
    per_block = 2 * as_backend(model).block_bytes
    engine = Engine(
        model,
        tokenizer,
        proposer=PROPOSERS[kind](model),
        num_draft_tokens=7,
        max_num_seqs=4,
        kv_cache_memory_bytes=8 * per_block,
    )
    for got, expected in zip(engine.generate(texts, params), plain, strict=True):
        assert (got.text, got.token_ids, got.finish_reason) == (
            expected.text,
            expected.token_ids,
            expected.finish_reason,
        )
        assert got.logprobs is not None
        assert expected.logprobs is not None
        assert [p.logprob for p in got.logprobs] == pytest.approx(
            [p.logprob for p in expected.logprobs], abs=1e-4
        )
    assert engine.stats.blocks_in_use == 0


def test_all_drafts_of_the_model_itself_are_accepted(model: Llama, tokenizer: Tokenizer) -> None:
    engine = Engine(model, tokenizer, proposer=DraftModel(model), num_draft_tokens=4)
    params = dataclasses.replace(GREEDY, temperature=1.0, seed=5, max_tokens=51)
    engine.generate(["The quick"], params)
    stats = engine.stats
    assert stats.accepted_tokens == stats.draft_tokens == 40
    # The first token, then five in each step.
    assert stats.steps == 1 + 10


def test_prompt_lookup_drafts_repetitions(model: Llama, tokenizer: Tokenizer) -> None:
    engine = Engine(model, tokenizer, proposer=PromptLookup(), num_draft_tokens=5)
    # The bias makes the model repeat one token.
    engine.generate([[1]], dataclasses.replace(GREEDY, logit_bias={9: 1e4}))
    stats = engine.stats
    assert stats.accepted_tokens > 40
    assert stats.steps < 20


def test_a_draft_model_that_does_not_fit_is_refused(model: Llama, tokenizer: Tokenizer) -> None:
    other = Llama(dataclasses.replace(model.config, vocab_size=300))
    with pytest.raises(ValueError, match=r"draft model's vocab_size is 300, the model's 320"):
        Engine(model, tokenizer, proposer=DraftModel(other))
    short = Llama(dataclasses.replace(model.config, max_seq_len=50))
    with pytest.raises(ValueError, match=r"max_seq_len is 50, below the engine's 160; give max_seq_len 50"):
        Engine(model, tokenizer, proposer=DraftModel(short))
