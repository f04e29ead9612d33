from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import GenerationConfig

from llama_ray.data.tokenizing.tokenizer import Tokenizer
from llama_ray.generation.engine import Engine
from llama_ray.generation.sampling.params import SamplingParams
from llama_ray.model.end_of_text import stored_eos_ids
from llama_ray.model.llama import Llama
from llama_ray.pretrained import load_pretrained, save_pretrained
from tests.small_models import random_model, small_config

FILES = ("generation_config.json", "config.json")


@pytest.fixture
def saved(model: Llama, tokenizer: Tokenizer, tmp_path: Path) -> Path:
    save_pretrained(model, tokenizer, tmp_path)
    return tmp_path


def write(directory: Path, file: str, **fields: object) -> None:
    path = directory / file
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def test_eos_ids_of_generation_config_end_a_completion_too(saved: Path, tokenizer: Tokenizer) -> None:
    write(saved, "generation_config.json", eos_token_id=[7, 9])
    assert Engine.from_pretrained(saved, device="cpu").eos_ids == {7, 9, tokenizer.eos_id}
    (saved / "generation_config.json").write_text("[")
    with pytest.raises(ValueError, match=r"generation_config\.json is not a JSON object"):
        Engine.from_pretrained(saved, device="cpu")
    (saved / "generation_config.json").write_text("[1]")
    with pytest.raises(ValueError, match="it holds a list"):
        Engine.from_pretrained(saved, device="cpu")


@pytest.mark.parametrize("generation", [None, {}, {"eos_token_id": None}, {"eos_token_id": []}])
@pytest.mark.parametrize(("stored", "expected"), [(7, [7]), ([7, 9], [7, 9]), (None, []), ([], [])])
def test_config_names_eos_where_generation_config_names_none(
    saved: Path, generation: dict[str, object] | None, stored: object, expected: list[int], model: Llama
) -> None:
    (saved / "generation_config.json").unlink()
    if generation is not None:
        (saved / "generation_config.json").write_text(json.dumps(generation))
    write(saved, "config.json", eos_token_id=stored)
    assert stored_eos_ids(saved, model.config.vocab_size) == expected


def test_generation_config_comes_first_as_in_transformers(saved: Path, model: Llama) -> None:
    write(saved, "generation_config.json", eos_token_id=5)
    # Not used, so not checked either.
    write(saved, "config.json", eos_token_id=-1)
    assert stored_eos_ids(saved, model.config.vocab_size) == [5]
    assert GenerationConfig.from_pretrained(saved).eos_token_id == 5


WRONG = [-1, 320, [2, 320], "1", True, 1.0, [None], [[1]], {"a": 1}]


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("wrong", WRONG, ids=str)
def test_an_eos_that_is_no_token_of_the_model_is_refused_when_it_is_loaded(
    saved: Path, file: str, wrong: object
) -> None:
    write(saved, "generation_config.json", eos_token_id=None)
    write(saved, file, eos_token_id=wrong)
    with pytest.raises(
        ValueError, match=rf"{file}: eos_token_id is .*; it must be a token id of the model, 0 to 319"
    ) as e:
        Engine.from_pretrained(saved, device="cpu")
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("wrong", [-1, 320, True, "1"], ids=str)
def test_an_engine_refuses_eos_ids_outside_the_vocabulary(
    model: Llama, tokenizer: Tokenizer, wrong: int
) -> None:
    with pytest.raises(ValueError, match=r"eos_ids is .*; it must be a token id of the model, 0 to 319"):
        Engine(model, tokenizer, eos_ids=[2, wrong])


def test_an_eos_of_the_tokenizer_that_the_model_lacks_never_occurs(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    eos = tokenizer.vocab_size
    config = {"added_tokens_decoder": {str(eos): {"content": "<end>", "special": True}}, "eos_token": "<end>"}
    tokenizer.save(tmp_path / "tokenizer")
    write(tmp_path / "tokenizer", "tokenizer_config.json", **config)
    larger = Tokenizer.load(tmp_path / "tokenizer")
    assert larger.eos_id == eos
    save_pretrained(random_model(small_config(eos)), larger, tmp_path / "model")
    model, loaded = load_pretrained(tmp_path / "model")
    engine = Engine(model, loaded, eos_ids=[3])
    assert engine.eos_ids == {3}
    params = SamplingParams(max_tokens=6, min_tokens=3, seed=1, logprobs=20)
    assert engine.generate(["The quick"], params)[0].text
    constrained = SamplingParams(max_tokens=40, regex="[a-z]{3} x")
    assert engine.generate(["The quick"], constrained)[0].text.endswith(" x")
    assert json.loads((tmp_path / "model" / "config.json").read_text())["eos_token_id"] is None
