from __future__ import annotations

import json
import sys

import numpy as np
import psutil
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, normalizers, pre_tokenizers

from llama_ray.data.tokenizing.encoder import DocumentEncoder, choose_encoder
from llama_ray.data.tokenizing.errors import TokenizerError
from llama_ray.data.tokenizing.fast import FastBackend, Unsupported
from llama_ray.data.tokenizing.hostile_texts import hostile_texts
from llama_ray.data.tokenizing.tokenizer import Tokenizer
from tests.data.helpers import ANY_TEXT, BYTE_FALLBACK, OURS, TEXTS, word_piece
from tests.processes import fresh_processes

KINDS = pytest.mark.parametrize("tokenizer", [OURS, BYTE_FALLBACK], ids=["byte_level", "byte_fallback"])
ENOUGH = ["text enough for a check " * 50]


def changed(**parts: object) -> Tokenizer:
    """Our byte-level tokenizer with another normalizer, pre-tokenizer or model option."""
    content = json.loads(OURS.to_json())
    content["model"] |= {key: parts.pop(key) for key in [*parts] if key in content["model"]}
    backend = tokenizers.Tokenizer.from_str(json.dumps(content))
    for name, part in parts.items():
        setattr(backend, name, part)
    return Tokenizer(backend, {})


@KINDS
@pytest.mark.parametrize("fast", [False, True])
@given(texts=st.lists(ANY_TEXT, max_size=5))
def test_documents_stand_one_after_the_other_between_bos_and_eos(
    tokenizer: Tokenizer, fast: bool, texts: list[str]
) -> None:
    ids, lengths = DocumentEncoder(tokenizer, fast).encode(texts)
    assert (ids.dtype, lengths.dtype) == (np.uint32, np.int64)
    documents = [document.tolist() for document in np.split(ids, np.cumsum(lengths))[:-1]]
    assert documents == [tokenizer.encode(text, bos=True, eos=True) for text in texts]


@pytest.mark.parametrize("fast", [False, True])
def test_a_lone_surrogate_is_refused(fast: bool) -> None:
    with pytest.raises(TokenizerError, match=r"lone surrogate \(U\+D83C\) at character 2"):
        DocumentEncoder(OURS, fast).encode(["ab\ud83c"])


def test_a_tokenizer_without_bos_or_eos_has_no_documents() -> None:
    with pytest.raises(TokenizerError, match="has no bos_token"):
        DocumentEncoder(word_piece())


def test_gigatoken_is_chosen_where_it_gives_the_same_ids() -> None:
    choice = choose_encoder(OURS, ENOUGH, sample_bytes=1000)
    assert choice.fast
    assert choice.name.startswith("gigatoken ")


def without_split() -> Tokenizer:
    """A tokenizer without the split that gigatoken takes for granted: it differs for some spaces only."""
    return changed(pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))


@pytest.mark.parametrize(
    ("tokenizer", "sample", "reason"),
    [
        (
            changed(normalizer=normalizers.Lowercase()),
            ENOUGH,
            "it refuses this tokenizer (Unsupported normali",
        ),
        (without_split(), ["own  text " * 200], "gigatoken gives other ids for 'own  text"),
        (without_split(), ENOUGH, "gigatoken gives other ids for 'x  y'"),
    ],
    ids=["refused", "the user's text", "a hostile text"],
)
def test_tokenizers_stays_where_gigatoken_differs(
    tokenizer: Tokenizer, sample: list[str], reason: str
) -> None:
    choice = choose_encoder(tokenizer, sample, sample_bytes=1000)
    assert (choice.fast, choice.name) == (False, "tokenizers")
    assert reason in choice.reason


def test_added_tokens_that_are_not_special_are_tokens_in_a_text_too() -> None:
    backend = tokenizers.Tokenizer.from_str(OURS.to_json())
    backend.add_tokens([AddedToken("<plain>", special=False)])
    with pytest.raises(Unsupported, match="its added token '<plain>' is not special"):
        FastBackend(backend.to_str())


def test_a_little_text_is_not_worth_a_check() -> None:
    assert "so little text" in choose_encoder(OURS, TEXTS).reason


def test_without_gigatoken_its_name_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gigatoken.gigatoken_rs", None)
    choice = choose_encoder(OURS, ENOUGH, sample_bytes=1000)
    assert not choice.fast
    assert "pip install 'llama-ray[fast]'" in choice.reason


def test_the_words_that_gigatoken_has_seen_take_a_bounded_amount_of_memory() -> None:
    """Without a bound, these 42 MB of words, none of them twice, take 340 MB."""
    # In a process of its own: in one that has run other tests, memory that is freed stays with it.
    with fresh_processes().Pool(1) as pool:
        assert pool.apply(bytes_of_seen_words) < 150 << 20


def bytes_of_seen_words() -> int:
    backend = FastBackend(OURS.to_json(), cache_bytes=16 << 20)
    random, process = np.random.default_rng(0), psutil.Process()
    before = process.memory_info().rss
    for _ in range(40):
        letters = random.integers(97, 123, size=(80_000, 13), dtype=np.uint8)
        letters[:, -1] = ord(" ")
        backend.encode(letters.tobytes().decode())
    return int(process.memory_info().rss - before)


def test_hostile_texts_are_the_same_each_time_and_hold_every_character_of_two_planes() -> None:
    texts = list(hostile_texts())
    assert texts == list(hostile_texts())
    every = {chr(code) for code in range(0x20000) if not 0xD800 <= code < 0xE000}
    assert every <= {character for text in texts for character in text}


def test_characters_that_only_gigatoken_knows_are_encoded_by_tokenizers() -> None:
    """U+088F, U+A7CE and U+323B0 are letters since Unicode 17; emoji and other letters are nothing new."""
    backend = FastBackend(OURS.to_json())
    assert all(backend.encode(f"a{new}b") is None for new in "\u088f\ua7ce\U000323b0")
    assert all(backend.encode(f"a{old}b") is not None for old in ("’", "हिन्दी", "한국어", "👩\u200d👧"))


def test_a_long_text_is_encoded_in_parts_with_the_same_ids() -> None:
    """A character that only `tokenizers` encodes is in one of them."""
    text = "def add(a, b):\n    return a + b\nprint(add(1, 2))\n" * 23_000 + "\ua7ce"
    ids, (length,) = DocumentEncoder(OURS, fast=True).encode([text])
    assert len(text) > 2**20
    assert length == len(ids)
    assert ids.tolist() == OURS.encode(text, bos=True, eos=True)
