"""A request moves to another engine after any step: its client sees what an undisturbed run would have given it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest

from llama_ray.data.tokenizing.tokenizer import Tokenizer
from llama_ray.generation.backends.backend import Backend
from llama_ray.generation.backends.prepare import prepare
from llama_ray.generation.engine import Engine
from llama_ray.generation.sampling.params import SamplingParams
from llama_ray.generation.scheduling.sequence import Delta
from llama_ray.generation.speculation.draft_model import DraftModel
from llama_ray.generation.speculation.prompt_lookup import PromptLookup
from tests.data.helpers import BYTE_FALLBACK
from tests.fuzzing import done_by
from tests.small_models import random_model, small_config

PROMPT = "The quick brown fox 🙂 and the dog"
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 6}, "age": {"type": "integer", "maximum": 150}},
    "required": ["name", "age"],
}
CASES: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0},
    "sampled": {"top_p": 0.9, "top_k": 50},
    "penalties": {"repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": 0.7},
    "repeating": {"temperature": 0, "repetition_penalty": 0.8, "logit_bias": {70: 3.0}},
    "logprobs": {"logprobs": 3, "prompt_logprobs": 2},
    "candidates": {"n": 3, "ignore_eos": False, "logit_bias": {0: 3.0, 1: 3.0, 2: 3.0}, "logprobs": 0},
    "min_tokens": {"min_tokens": 9, "ignore_eos": False, "logit_bias": {0: 50.0, 1: 50.0, 2: 50.0}},
    "schema": {"json_schema": PERSON, "ignore_eos": False, "max_tokens": 60, "n": 2},
    "emojis": {"regex": "[🙂🙃漢]{3,7}", "stop": "🙃", "ignore_eos": False, "n": 2, "logprobs": 1},
    "words": {"bad_words": ("e", "th"), "allowed_token_ids": tuple(range(60, 150)), "logprobs": 1},
    "stop_included": {"temperature": 0, "stop": ("e", "a"), "include_stop_str_in_output": True, "n": 2},
    "cut_off": {"regex": "[a-z🙂]{40}", "ignore_eos": False, "max_tokens": 11},
}


@dataclasses.dataclass
class Pair:
    """Two engines, the second of which is short of everything, and what the first one gives a request."""

    first: Engine
    second: Engine

    def undisturbed(self, prompt: str, params: SamplingParams) -> list[list[Delta]]:
        """Return the deltas of each candidate in the first engine."""
        request = self.first.submit(prompt, params)
        deltas: list[list[Delta]] = [[] for _ in range(params.n)]
        while self.first.has_work:
            for delta in self.first.step():
                assert delta.request_id == request
                deltas[delta.index].append(delta)
        return deltas

    def check_every_cut(self, prompt: str, params: SamplingParams) -> list[Delta]:
        """Compare what a client gets that loses the first engine after any step; return what it gets undisturbed."""
        deltas = self.undisturbed(prompt, params)
        cuts: dict[int, list[list[Delta]]] = {}
        for steps in range(max(map(len, deltas)) + 1):
            got = [candidate[:steps] for candidate in deltas]
            done = {i: done_by(candidate) for i, candidate in enumerate(got)}
            cuts[self.second.add(self.second.prepare(prompt, params, done))] = got
        while self.second.has_work:
            for delta in self.second.step():
                cuts[delta.request_id][delta.index].append(delta)
        whole = [plain(Delta.joined(candidate)) for candidate in deltas]
        for got in cuts.values():
            assert [plain(Delta.joined(candidate)) for candidate in got] == whole
        assert self.second.stats.blocks_in_use == 0
        return whole


def plain(delta: Delta) -> Delta:
    return dataclasses.replace(delta, request_id=0, stats=None, cached_tokens=0)


def make_backend(tokenizer: Tokenizer) -> Backend:
    return prepare(random_model(small_config(tokenizer.vocab_size, max_seq_len=160)))


def make_pair(backend: Backend, tokenizer: Tokenizer, **second: Any) -> Pair:
    options = {"max_num_seqs": 5, "max_num_batched_tokens": 40, **second}
    blocks = 12 * (backend.block_bytes + (second["proposer"].block_bytes if "proposer" in second else 0))
    return Pair(
        Engine(backend, tokenizer, seed=1),
        Engine(backend, tokenizer, seed=2, kv_cache_memory_bytes=blocks, **options),
    )


@pytest.fixture(scope="module")
def pair(tokenizer: Tokenizer) -> Iterator[Pair]:
    pair = make_pair(make_backend(tokenizer), tokenizer)
    yield pair
    pair.first.close()
    pair.second.close()


def make_params(**fields: Any) -> SamplingParams:
    return SamplingParams(**{"max_tokens": 24, "seed": 5, "ignore_eos": True, **fields})


@pytest.mark.parametrize("case", CASES)
def test_a_client_gets_the_same_whenever_the_engine_is_lost(pair: Pair, case: str) -> None:
    whole = pair.check_every_cut(PROMPT, make_params(**CASES[case]))
    assert all(delta.error is None and delta.token_ids for delta in whole)


@pytest.mark.parametrize("min_tokens", [0, 12])
def test_a_stop_string_counts_wherever_the_engine_is_lost_within_it(pair: Pair, min_tokens: int) -> None:
    [[*deltas]] = pair.undisturbed(PROMPT, make_params())
    text = "".join(delta.text for delta in deltas)
    stop = (text[4:9], text[-6:-2], text[-4:] + "?")
    [whole] = pair.check_every_cut(PROMPT, make_params(stop=stop, min_tokens=min_tokens))
    assert whole.text == text[: 4 if not min_tokens else -6]
    assert whole.finish_reason == "stop"


@pytest.mark.parametrize("fields", [{}, {"stop": ("\ufffd\ufffd",)}, {"n": 2}], ids=str)
def test_characters_of_byte_tokens_are_neither_torn_nor_repeated(fields: dict[str, Any]) -> None:
    pair = make_pair(make_backend(BYTE_FALLBACK), BYTE_FALLBACK)
    for seed in range(3):
        whole = pair.check_every_cut(PROMPT, make_params(seed=seed, **fields))
        assert any("\ufffd" in delta.text or "stop" in fields for delta in whole)


@pytest.mark.parametrize("kind", ["prompt_lookup", "draft_model"])
def test_drafts_change_nothing(tokenizer: Tokenizer, kind: str) -> None:
    backend = make_backend(tokenizer)
    proposer = PromptLookup() if kind == "prompt_lookup" else DraftModel(make_backend(tokenizer))
    pair = make_pair(backend, tokenizer, proposer=proposer)
    for case in ("repeating", "candidates"):
        pair.check_every_cut(PROMPT, make_params(**CASES[case]))
    assert pair.second.stats.accepted_tokens > 20


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({}, "length"),
        ({"stop": "z"}, "stop"),
        ({"ignore_eos": False, "stop_token_ids": tuple(range(100, 220))}, "stop"),
        ({"regex": "[ab]{5}", "ignore_eos": False}, "stop"),
        ({"regex": "[ab]{500}", "ignore_eos": False, "logprobs": 1}, "length"),
    ],
    ids=["max_tokens", "stop", "stop_token_ids", "complete_regex", "regex"],
)
def test_a_candidate_that_only_lacks_its_end_gets_it(pair: Pair, fields: dict[str, Any], reason: str) -> None:
    if "stop" in fields:
        [[*deltas]] = pair.undisturbed(PROMPT, make_params())
        fields = {"stop": "".join(delta.text for delta in deltas)[8:11]}
    params = make_params(**fields)
    [deltas] = pair.undisturbed(PROMPT, params)
    whole = Delta.joined(deltas)
    pair.second.add(pair.second.prepare(PROMPT, params, {0: whole.token_ids}))
    got: list[Delta] = []
    while pair.second.has_work:
        got += pair.second.step()
    [end] = got
    assert (end.finish_reason, end.token_ids, end.text) == (reason, [], "")
    assert end.finish_reason == whole.finish_reason
    assert end.stats is not None


def test_an_end_that_nobody_waits_for_is_dropped(pair: Pair) -> None:
    params = make_params(max_tokens=2)
    request = pair.second.add(pair.second.prepare(PROMPT, params, {0: [5, 6]}))
    assert pair.second.has_work
    pair.second.abort(request)
    assert not pair.second.has_work
    assert pair.second.step() == []


def test_a_request_whose_candidates_are_complete_has_nothing_to_do(pair: Pair) -> None:
    pair.second.add(pair.second.prepare(PROMPT, make_params(n=2), {0: None, 1: None}))
    assert not pair.second.has_work


def test_candidates_that_have_not_begun_share_the_prompt(pair: Pair) -> None:
    params = make_params(n=4, max_tokens=3)
    before = pair.first.stats.prompt_tokens
    pair.first.add(pair.first.prepare(PROMPT * 3, params, {0: None, 2: [], 3: None}))
    while pair.first.has_work:
        pair.first.step()
    assert pair.first.stats.prompt_tokens - before <= len(pair.first.encode(PROMPT * 3))


@pytest.mark.parametrize(
    ("done", "message"),
    [
        ({2: [1]}, "done has candidate 2; it must be from 0 to 1, as n is 2"),
        ({-1: None}, "done has candidate -1; it must be from 0 to 1"),
        ({0: [1, 100_000]}, "token id 100000 is outside the model's vocabulary"),
        ({0: [1, -1]}, "token id -1 is outside the model's vocabulary"),
        ({0: [9] * 11}, "done has 11 tokens of candidate 0; it must have at most max_tokens, 10"),
        ({1: [9, 77, 9]}, "candidate 1 is done to token 3; it must be at most 2, which ends it"),
    ],
)
def test_an_output_that_cannot_be_of_the_request_is_refused(
    pair: Pair, done: dict[int, list[int] | None], message: str
) -> None:
    params = make_params(n=2, max_tokens=10, stop_token_ids=(77,))
    with pytest.raises(ValueError, match=message):
        pair.second.prepare(PROMPT, params, done)


def test_the_rest_of_a_request_needs_the_seed_it_began_with(pair: Pair) -> None:
    with pytest.raises(ValueError, match="seed is None"):
        pair.second.prepare(PROMPT, make_params(seed=None), {0: [9]})
    pair.second.prepare(PROMPT, make_params(seed=None, temperature=0), {0: [9]})
