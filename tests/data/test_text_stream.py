from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama_ray.data.tokenizer import Tokenizer
from tests.data.helpers import ANY_TEXT, BYTE_FALLBACK, OURS

KINDS = pytest.mark.parametrize("tokenizer", [OURS, BYTE_FALLBACK], ids=["byte_level", "byte_fallback"])


@KINDS
@given(data=st.data())
def test_a_stream_gives_the_text_of_any_ids(tokenizer: Tokenizer, data: st.DataObject) -> None:
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1)))
    stream = tokenizer.stream()
    assert "".join([stream.push(id) for id in ids] + [stream.flush()]) == tokenizer.decode(ids)


@KINDS
@given(text=ANY_TEXT)
def test_a_stream_never_emits_part_of_a_character(tokenizer: Tokenizer, text: str) -> None:
    text = text.replace("▁", "").replace("\ufffd", "")
    stream = tokenizer.stream()
    emitted = "".join(stream.push(id) for id in tokenizer.encode(text))
    assert "\ufffd" not in emitted
    assert emitted + stream.flush() == text


def test_a_stream_delays_only_incomplete_characters() -> None:
    bytes_only = Tokenizer.train(iter([]), 258)
    stream = bytes_only.stream()
    first, *rest = bytes_only.encode("🎉a")
    assert stream.push(first) == ""
    assert [stream.push(id) for id in rest] == ["", "", "🎉", "a"]
    assert stream.push(first) == ""
    assert stream.flush() == "\ufffd"
    assert stream.flush() == ""


@KINDS
def test_the_cost_of_a_push_does_not_grow_with_the_text(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("the ab 🎉 " * 4000)
    stream = tokenizer.stream()
    started = time.perf_counter()
    for id in ids:
        stream.push(id)
    assert (
        time.perf_counter() - started < 5
    )  # Decoding the whole text again for each token would take minutes.
