from __future__ import annotations

import pytest

from llama_ray.data.tokenizing.comparison import compare_tokenizers, table
from tests.data.helpers import BYTE_FALLBACK, KINDS, OURS, TEXTS


def test_fit_counts_bytes_words_single_bytes_and_used_entries() -> None:
    text = "the é"
    ours, fallback = compare_tokenizers([text, ""], {"ours": OURS, "fallback": BYTE_FALLBACK})
    # "▁the", "▁" and "é"; of the 268 entries these are 3, and none is a byte.
    assert (fallback.bytes_per_token, fallback.tokens_per_word) == (6 / 3, 3 / 2)
    assert (fallback.single_bytes, fallback.used) == (0, 3 / BYTE_FALLBACK.vocab_size)
    ids = OURS.encode(text)
    assert ours.bytes_per_token == 6 / len(ids)
    assert ours.used == len(set(ids)) / OURS.vocab_size


def test_bytes_of_both_kinds_of_vocabulary_are_single_bytes() -> None:
    fits = compare_tokenizers(["\x01"], {"ours": OURS, "fallback": BYTE_FALLBACK})
    # SentencePiece puts a space before the text, which is no byte of it.
    assert [fit.single_bytes for fit in fits] == [1, 1 / 2]


def test_a_text_without_tokens_divides_by_no_zero() -> None:
    (fit,) = compare_tokenizers([], {"ours": OURS})
    assert (fit.bytes_per_token, fit.tokens_per_word, fit.single_bytes, fit.used) == (0, 0, 0, 0)


@pytest.mark.parametrize("name", KINDS)
def test_any_kind_of_tokenizer_is_compared(name: str) -> None:
    (fit,) = compare_tokenizers(TEXTS, {name: KINDS[name]})
    assert fit.bytes_per_token > 0
    assert 0 < fit.used <= 1


def test_a_table_has_a_line_for_each_tokenizer() -> None:
    lines = table(compare_tokenizers(TEXTS, {"ours": OURS, "another, with a long name": BYTE_FALLBACK}))
    assert [line.split()[0] for line in lines] == ["tokenizer", "ours", "another,"]
    assert len({len(line) for line in lines}) == 1
