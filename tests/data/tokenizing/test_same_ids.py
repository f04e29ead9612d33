from __future__ import annotations

import json
from pathlib import Path

import pytest

from llama_ray.data.tokenizing.same_ids import first_difference
from llama_ray.data.tokenizing.tokenizer import Tokenizer
from tests.small_models import small_tokenizer
from tests.token_data import TEXTS


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return small_tokenizer()


def changed(tokenizer: Tokenizer, directory: Path, change: str) -> Tokenizer:
    tokenizer.save(directory)
    file = directory / "tokenizer.json"
    content = json.loads(file.read_text())
    vocabulary = content["model"]["vocab"]
    match change:
        case "bos is added":
            content["post_processor"] = None
        case "an entry is another":
            last = max(vocabulary, key=vocabulary.__getitem__)
            content["model"]["merges"].pop()
            vocabulary["another"] = vocabulary.pop(last)
        case "digits are split":
            content["pre_tokenizer"] = {
                "type": "Sequence",
                "pretokenizers": [{"type": "Digits", "individual_digits": True}, content["pre_tokenizer"]],
            }
        case "a special token is new":
            content["added_tokens"].append(
                {
                    "id": tokenizer.vocab_size,
                    "content": "<|new|>",
                    "single_word": False,
                    "lstrip": False,
                    "rstrip": False,
                    "normalized": False,
                    "special": True,
                }
            )
    file.write_text(json.dumps(content))
    return Tokenizer.load(directory)


@pytest.mark.parametrize("change", ["nothing", "bos is added", "a special token is new"])
def test_the_same_ids_are_found_in_another_form(tokenizer: Tokenizer, tmp_path: Path, change: str) -> None:
    other = changed(tokenizer, tmp_path, change)
    assert (other.fingerprint == tokenizer.fingerprint) == (change == "nothing")
    assert first_difference(tokenizer, other) is None
    assert first_difference(tokenizer, tokenizer.for_documents()) is None


def test_another_entry_is_named(tokenizer: Tokenizer, tmp_path: Path) -> None:
    difference = first_difference(tokenizer, changed(tokenizer, tmp_path, "an entry is another"))
    assert difference is not None
    assert difference.endswith("there and 'another' here")
    assert difference.startswith(f"token {tokenizer.vocab_size - 1} is ")


def test_another_split_of_texts_is_found(tmp_path: Path) -> None:
    tokenizer = Tokenizer.train(iter([*TEXTS, "0123456789 " * 50]), 400)
    difference = first_difference(tokenizer, changed(tokenizer, tmp_path, "digits are split"))
    assert difference is not None
    assert difference.endswith("becomes other tokens")
