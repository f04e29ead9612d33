"""Texts of tokenizers in which a token's text depends on what is before it, as in SentencePiece's."""

from __future__ import annotations

import pytest

from llama_ray.data.tokenizing.tokenizer import Tokenizer
from llama_ray.generation.completion import Completion
from llama_ray.generation.engine import Engine
from llama_ray.generation.sampling.params import SamplingParams
from tests.data.helpers import BYTE_FALLBACK, KINDS
from tests.generation.helpers import PARAMS
from tests.small_models import random_model, small_config

BOS = BYTE_FALLBACK.bos_id or 0


@pytest.fixture(scope="module", params=KINDS)
def engine(request: pytest.FixtureRequest) -> Engine:
    tokenizer = KINDS[request.param]
    return Engine(random_model(small_config(tokenizer.vocab_size)), tokenizer, eos_ids=[0])


@pytest.fixture(scope="module")
def space_engine() -> Engine:
    return Engine(random_model(small_config(BYTE_FALLBACK.vocab_size)), BYTE_FALLBACK)


def tokenizer_of(engine: Engine) -> Tokenizer:
    assert engine.tokenizer is not None
    return engine.tokenizer


def generate(engine: Engine, prompt: str | list[int], **params: object) -> Completion:
    [completion] = engine.generate([prompt], SamplingParams(**{"max_tokens": 40, "seed": 3, **params}))  # type: ignore[arg-type]
    return completion


@pytest.mark.parametrize("prompt", ["the ab", "é", "a b "])
def test_prompt_and_completion_are_the_text_of_all_tokens(engine: Engine, prompt: str) -> None:
    tokenizer = tokenizer_of(engine)
    for got in engine.generate([prompt] * 4, PARAMS):
        whole = tokenizer.decode(got.prompt_token_ids + got.token_ids)
        assert tokenizer.decode(got.prompt_token_ids) + got.text == whole


@pytest.mark.parametrize("prompt", ["the ab", [BOS], "ab "])
def test_a_constrained_text_has_the_space_that_its_expression_begins_with(
    space_engine: Engine, prompt: str | list[int]
) -> None:
    got = generate(space_engine, prompt, regex=" the (ab)+é")
    assert got.text.startswith(" the ab")
    assert got.text.endswith("é")
    assert generate(space_engine, prompt, regex="the").text == "the"


def test_a_stop_string_with_a_leading_space_ends_the_text(space_engine: Engine) -> None:
    [the] = BYTE_FALLBACK.encode("the")
    got = generate(space_engine, "ab", stop=" the", logit_bias={the: 100.0})
    assert (got.text, got.token_ids, got.finish_reason) == ("", [the], "stop")
    # The first token's space is what the tokenizer itself puts before a text.
    got = generate(space_engine, [BOS], stop=" the", logit_bias={the: 100.0})
    assert (got.text, got.token_ids) == ("the", [the, the])


def test_a_stop_string_of_byte_tokens_ends_the_text_at_once(space_engine: Engine) -> None:
    got = generate(space_engine, "ab", regex="(日本)+", stop="本日")
    assert (got.text, len(got.token_ids), got.finish_reason) == ("日", 9, "stop")


def test_a_prompt_gets_bos_only_if_the_tokenizer_adds_it(space_engine: Engine) -> None:
    assert BYTE_FALLBACK.bos_id is not None
    assert space_engine.encode("the") == BYTE_FALLBACK.encode("the")
    trained = BYTE_FALLBACK.for_documents()
    engine = Engine(random_model(small_config(trained.vocab_size)), trained)
    assert engine.encode("the") == [BOS, *BYTE_FALLBACK.encode("the")]
