"""How the engine ends a completion: end-of-text and stop tokens, min_tokens, constraints."""

from __future__ import annotations

import dataclasses
import json
import re
from typing import Any

import jsonschema
import pytest
import tokenizers
from tokenizers import AddedToken, decoders, models

from llama_ray.data.tokenizing.tokenizer import Tokenizer
from llama_ray.generation.engine import Engine
from llama_ray.generation.sampling.params import SamplingParams
from llama_ray.model.llama import Llama

SCHEMA = {
    "type": "object",
    "properties": {"ok": {"type": "boolean"}, "n": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["ok", "n"],
    "additionalProperties": False,
}


def test_a_stop_token_ends_the_text_before_it(engine: Engine, tokenizer: Tokenizer) -> None:
    params = SamplingParams(max_tokens=20, seed=1, ignore_eos=True)
    whole = engine.generate("The", params)[0]
    stop = whole.token_ids[7]
    first = whole.token_ids.index(stop)
    cut = engine.generate(
        "The", SamplingParams(max_tokens=20, seed=1, ignore_eos=True, stop_token_ids=(stop,))
    )[0]
    assert cut.token_ids == whole.token_ids[: first + 1]
    assert cut.finish_reason == "stop"
    assert cut.text == tokenizer.decode(cut.token_ids[:-1])
    with pytest.raises(ValueError, match="token id 320 is outside the model's vocabulary of 320"):
        engine.generate("The", SamplingParams(stop_token_ids=(320,)))


@pytest.mark.parametrize("include", [False, True])
def test_what_ended_a_text_is_named_and_may_be_part_of_it(
    engine: Engine, tokenizer: Tokenizer, include: bool
) -> None:
    assert tokenizer.eos_id is not None
    params = SamplingParams(max_tokens=20, seed=1, ignore_eos=True, include_stop_str_in_output=include)
    whole = engine.generate("The", params)[0]
    assert (whole.finish_reason, whole.stop_reason) == ("length", None)
    word, token = whole.text[8:11], whole.token_ids[7]
    by_word = engine.generate("The", dataclasses.replace(params, stop=("never", word)))[0]
    assert (by_word.finish_reason, by_word.stop_reason) == ("stop", word)
    assert by_word.text == whole.text.partition(word)[0] + word * include
    by_token = engine.generate("The", dataclasses.replace(params, stop_token_ids=(token,)))[0]
    assert (by_token.finish_reason, by_token.stop_reason) == ("stop", token)
    end = len(by_token.token_ids) - (not include)
    assert by_token.text == tokenizer.decode(by_token.token_ids[:end])
    by_end = dataclasses.replace(params, logit_bias={tokenizer.eos_id: 100.0}, ignore_eos=False)
    got = engine.generate("The", by_end)[0]
    assert (got.finish_reason, got.stop_reason, got.text) == ("stop", None, "")


@pytest.mark.parametrize("limit", [{}, {"regex": "[a-z]+"}, {"logprobs": 1, "n": 2}])
def test_without_tokens_to_generate_only_the_prompt_is_computed(
    engine: Engine, limit: dict[str, Any]
) -> None:
    prompt = list(range(20))
    params = SamplingParams(max_tokens=0, prompt_logprobs=3, **limit)
    generated = dataclasses.replace(params, max_tokens=1, n=1)
    [want] = engine.generate([prompt], generated)
    before = engine.stats.generated_tokens
    for got in engine.generate([prompt], params):
        assert (got.token_ids, got.text, got.finish_reason) == ([], "", "length")
        assert got.prompt_logprobs == want.prompt_logprobs
    assert engine.stats.generated_tokens == before
    longest = [1] * engine.max_seq_len
    assert engine.generate([longest], SamplingParams(max_tokens=0))[0].finish_reason == "length"


def test_only_allowed_tokens_are_generated(engine: Engine) -> None:
    allowed = (70, 71, 90)
    limit = SamplingParams(max_tokens=30, seed=1, allowed_token_ids=allowed, ignore_eos=True)
    free = SamplingParams(max_tokens=30, seed=1, ignore_eos=True)
    limited, other = engine.generate(["The", "The"], [limit, free])
    assert set(limited.token_ids) == set(allowed)
    assert other == engine.generate("The", free)[0]
    with pytest.raises(ValueError, match="allowed_token_ids: token id 320 is outside the model's vocabulary"):
        engine.generate("The", SamplingParams(allowed_token_ids=(320,)))


def test_bad_words_are_never_completed(engine: Engine, tokenizer: Tokenizer) -> None:
    words = ("quick", "zq")
    pushed = {token: 30.0 for word in words for token in tokenizer.encode(word)}
    params = SamplingParams(max_tokens=60, seed=2, logit_bias=pushed, ignore_eos=True)
    assert any(word in engine.generate("The", params)[0].text for word in words)
    got = engine.generate("The", dataclasses.replace(params, bad_words=words))[0]
    for word in words:
        tokens = tokenizer.encode(word)
        size = len(tokens)
        assert tokens not in [got.token_ids[i : i + size] for i in range(len(got.token_ids))]


def test_a_text_for_which_no_token_is_left_ends_with_a_reason(engine: Engine, tokenizer: Tokenizer) -> None:
    [a], [b] = tokenizer.encode("a"), tokenizer.encode("b")
    for seed in range(5):
        params = SamplingParams(seed=seed, allowed_token_ids=(a, b), bad_words=("a", "bb"), ignore_eos=True)
        got = engine.generate("The", params)[0]
        assert (got.text, got.finish_reason) == ("b", "constraint")


def test_no_completion_ends_before_min_tokens(engine: Engine, tokenizer: Tokenizer) -> None:
    eos = tokenizer.eos_id
    assert eos is not None
    eager = {eos: 60.0}
    assert engine.generate("a", SamplingParams(logit_bias=eager))[0].token_ids == [eos]
    got = engine.generate("a", SamplingParams(logit_bias=eager, min_tokens=5))[0]
    assert got.token_ids[-1] == eos
    assert eos not in got.token_ids[:-1]
    assert len(got.token_ids) == 6
    every = tuple(" abcdehilmnorstu")
    got = engine.generate("a", SamplingParams(max_tokens=40, min_tokens=12, stop=every, seed=3))[0]
    assert len(got.token_ids) >= 12


def test_each_of_several_candidates_ends_where_its_own_output_is_complete(engine: Engine) -> None:
    # All of them follow one grammar, and nothing but the end may come after the last letter.
    params = SamplingParams(regex="[a-f]{1,3}z", max_tokens=30, seed=2, n=4)
    for completion in engine.generate("x", params):
        assert re.fullmatch("[a-f]{1,3}z", completion.text), completion
        assert completion.finish_reason == "stop"


def test_constrained_and_free_requests_share_a_batch(engine: Engine) -> None:
    schema = SamplingParams(json_schema=SCHEMA, max_tokens=120, seed=5, n=3)
    regex = SamplingParams(regex="[a-f]{3}", max_tokens=20, seed=6)
    free = SamplingParams(max_tokens=30, seed=7, ignore_eos=True)
    alone = [engine.generate("x", params) for params in (schema, regex, free)]
    for completion in alone[0]:
        jsonschema.validate(json.loads(completion.text), SCHEMA)
        assert completion.finish_reason == "stop"
    assert len(alone[1][0].text) == 3
    assert alone[1][0].finish_reason == "stop"

    ids = [engine.submit("x", params) for params in (schema, regex, free)]
    texts: dict[tuple[int, int], str] = {}
    while engine.has_work:
        for delta in engine.step():
            key = (delta.request_id, delta.index)
            texts[key] = texts.get(key, "") + delta.text
    assert texts == {
        (i, c): done.text for i, many in zip(ids, alone, strict=True) for c, done in enumerate(many)
    }


@pytest.mark.parametrize(
    ("regex", "max_tokens", "text", "finish_reason"),
    [
        ("zqzq", 4, "zqzq", "stop"),
        ("zqzq", 3, "zqz", "length"),
        ("(zq)*", 4, "zqzq", "length"),
    ],
)
def test_a_constrained_output_stops_where_it_is_complete(
    engine: Engine, tokenizer: Tokenizer, regex: str, max_tokens: int, text: str, finish_reason: str
) -> None:
    eos = tokenizer.eos_id
    assert eos is not None
    params = SamplingParams(regex=regex, max_tokens=max_tokens, logit_bias={eos: -100.0}, logprobs=0)
    done = engine.generate("a", params)[0]
    assert (done.text, done.finish_reason) == (text, finish_reason)
    assert len(done.token_ids) == len(done.logprobs or ()) == len(text)


def test_an_output_that_cannot_go_on_ends_with_what_it_has(model: Llama) -> None:
    backend = tokenizers.Tokenizer(models.BPE(vocab={"a": 0, "</s>": 1}, merges=[]))
    backend.add_special_tokens([AddedToken("</s>", special=True)])
    backend.decoder = decoders.ByteLevel()
    with Engine(model, Tokenizer(backend, {"eos_token": "</s>"})) as engine:
        # No token spells b.
        done = engine.generate([[0]], SamplingParams(regex="aaab", max_tokens=9))[0]
    assert (done.text, done.finish_reason) == ("aaa", "constraint")


def test_a_schema_that_cannot_be_enforced_is_refused_at_once(engine: Engine) -> None:
    with pytest.raises(ValueError, match="json_schema cannot be enforced"):
        engine.submit("x", SamplingParams(json_schema={"type": "nothing"}))
    assert not engine.has_work
