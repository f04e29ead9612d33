from __future__ import annotations

import itertools

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, normalizers, pre_tokenizers

from llama_ray.data.tokenizing.hostile_texts import hostile_texts
from llama_ray.data.tokenizing.long_texts import can_be_cut, parts
from llama_ray.data.tokenizing.splits import DIGIT, GPT_2, TEKKEN
from llama_ray.data.tokenizing.tokenizer import Tokenizer
from llama_ray.data.tokenizing.training import TrainingOptions
from tests.data.helpers import BYTE_FALLBACK, OURS, TEXTS

LINES = [*TEXTS, "a\nb\n\nc \nd\r\ne\n\tf/\ng!\n\n\n  h\n1\ni'll\n's\n"] * 3


def with_splits(*splits: str) -> Tokenizer:
    backend = tokenizers.Tokenizer.from_str(OURS.to_json())
    steps = [pre_tokenizers.Split(Regex(split), "isolated") for split in splits]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*steps, byte_level])
    return Tokenizer(backend, {})


CUT = {
    f"{split}, {digits}": Tokenizer.train(iter(LINES), 400, TrainingOptions(split=split, split_digits=digits))
    for split, digits in itertools.product(("llama3", "gpt2", "o200k"), (None, 1, 3))
} | {"tekken": with_splits(TEKKEN), "smollm": with_splits(DIGIT, GPT_2)}
HOSTILE = "".join(f"{text}\nx" for text in list(hostile_texts())[1::8])


@pytest.mark.parametrize("tokenizer", CUT.values(), ids=CUT)
def test_the_ids_of_a_text_are_those_of_its_parts(tokenizer: Tokenizer) -> None:
    assert can_be_cut(tokenizer.to_json())
    cut = list(parts(HOSTILE, 20))
    assert len(cut) > 150
    assert [id for part in cut for id in tokenizer.encode(part)] == tokenizer.encode(HOSTILE)


@given(text=st.lists(st.sampled_from(["\n", "\r", " ", "a", "1", ".", "'s", "é", "/"])).map("".join))
def test_parts_are_the_text(text: str) -> None:
    cut = list(parts(text, 2))
    assert "".join(cut) == text
    assert all(len(part) >= 2 for part in cut[:-1])
    for tokenizer in CUT.values():
        assert [id for part in cut for id in tokenizer.encode(part)] == tokenizer.encode(text)


def changed(**parts: object) -> Tokenizer:
    backend = tokenizers.Tokenizer.from_str(OURS.to_json())
    for name, part in parts.items():
        setattr(backend, name, part)
    return Tokenizer(backend, {})


def with_added_token() -> Tokenizer:
    backend = tokenizers.Tokenizer.from_str(OURS.to_json())
    backend.add_tokens([AddedToken("a\nb", special=False)])
    return Tokenizer(backend, {})


@pytest.mark.parametrize(
    "tokenizer",
    [
        BYTE_FALLBACK,
        changed(normalizer=normalizers.NFC()),
        changed(pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=True)),
        changed(pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)),
        with_splits(r"\S+\s+\S+"),
        with_added_token(),
    ],
)
def test_where_words_may_cross_lines_texts_stay_whole(tokenizer: Tokenizer) -> None:
    assert not can_be_cut(tokenizer.to_json())
