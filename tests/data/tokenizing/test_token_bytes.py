from __future__ import annotations

import unicodedata
from collections.abc import Callable

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, normalizers, pre_tokenizers

from llama_ray.data.tokenizing.token_bytes import keeps_all_text
from llama_ray.data.tokenizing.tokenizer import Tokenizer
from tests.data.helpers import KINDS, OURS

BOUNDED = {name: tokenizer for name, tokenizer in KINDS.items() if name != "word_piece"}
# One token and many of the longest, what normal forms shorten, and anything.
TEXTS = st.text() | st.sampled_from(
    [
        part * 50
        for part in (
            "return a + b",
            " ",
            "\n",
            "\u212a",
            "a\u0302\u0301",
            "\u1100\u1161\u11a8",
            "\U0001d400",
            "``",
        )
    ]
)


def changed(change: Callable[[tokenizers.Tokenizer], None], of: Tokenizer = OURS) -> Tokenizer:
    """Return another tokenizer, to whose `tokenizers` object `change` was applied."""
    backend = tokenizers.Tokenizer.from_str(of.to_json())
    change(backend)
    return Tokenizer(backend, {})


def with_normalizer(*steps: normalizers.Normalizer) -> Tokenizer:
    return changed(lambda backend: setattr(backend, "normalizer", normalizers.Sequence([*steps])))


BOUNDED |= {
    "nfc": with_normalizer(normalizers.NFC()),
    "nfkc": with_normalizer(normalizers.NFKC(), normalizers.Lowercase()),
    "shorter": with_normalizer(normalizers.Replace("``", "x")),
}


@pytest.mark.parametrize("tokenizer", BOUNDED.values(), ids=BOUNDED)
@given(text=TEXTS)
@settings(deadline=None)
def test_no_token_stands_for_more_bytes(tokenizer: Tokenizer, text: str) -> None:
    bound = tokenizer.max_token_bytes()
    assert bound is not None
    assert len(text.encode()) <= bound * len(tokenizer.encode(text))


def test_the_bound_is_the_longest_token() -> None:
    assert Tokenizer.train(iter([]), 258).max_token_bytes() == 1
    assert Tokenizer.train(iter(["aaaa"] * 5), 260).max_token_bytes() == 4


def test_normal_forms_shorten_no_character_by_more_than_the_bound() -> None:
    for code in range(0x110000):
        if not 0xD800 <= code < 0xE000:
            character = chr(code)
            assert 4 * len(unicodedata.normalize("NFD", character)) <= 6 * len(character.encode())


@pytest.mark.parametrize(
    "tokenizer",
    [
        KINDS["word_piece"],
        with_normalizer(normalizers.Strip()),
        with_normalizer(normalizers.Replace("x", "")),
        with_normalizer(normalizers.Replace(Regex(" +"), " ")),
        changed(lambda backend: setattr(backend, "pre_tokenizer", pre_tokenizers.WhitespaceSplit())),
        changed(lambda backend: setattr(backend, "pre_tokenizer", pre_tokenizers.Split(" ", "removed"))),
        changed(lambda backend: setattr(backend, "pre_tokenizer", None)),
        changed(lambda backend: backend.add_tokens([tokenizers.AddedToken("<x>", lstrip=True)])),
    ],
    ids=["words", "strip", "nothing", "spaces", "whitespace", "removed", "unknown", "added"],
)
def test_there_is_no_bound_where_text_may_vanish(tokenizer: Tokenizer) -> None:
    assert tokenizer.max_token_bytes() is None


def test_tokenizers_with_all_bytes_keep_all_text() -> None:
    assert [name for name in KINDS if not keeps_all_text(KINDS[name].to_json())] == ["word_piece"]


@pytest.mark.parametrize(
    "tokenizer",
    [
        with_normalizer(normalizers.NFC()),
        changed(
            lambda backend: setattr(backend, "pre_tokenizer", pre_tokenizers.ByteLevel(add_prefix_space=True))
        ),
        changed(lambda backend: backend.add_tokens([tokenizers.AddedToken("<x>", rstrip=True)])),
    ],
    ids=["normalizer", "prefix", "added"],
)
def test_a_tokenizer_that_changes_text_does_not_keep_it(tokenizer: Tokenizer) -> None:
    assert not keeps_all_text(tokenizer.to_json())
