from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama_ray.data.tokenizing.tokenizer import Tokenizer
from tests.data.helpers import ANY_TEXT, BYTE_FALLBACK, KINDS, OURS

ALL_KINDS = pytest.mark.parametrize("tokenizer", KINDS.values(), ids=KINDS)
WHOLE_TEXT = pytest.mark.parametrize("tokenizer", [OURS, BYTE_FALLBACK], ids=["byte_level", "byte_fallback"])


def completion(tokenizer: Tokenizer, ids: list[int], prompt_length: int) -> str:
    stream = tokenizer.stream(ids[:prompt_length])
    return "".join([stream.push(id) for id in ids[prompt_length:]]) + stream.flush()


@ALL_KINDS
@given(data=st.data())
def test_prompt_and_completion_are_the_text_of_all_ids(tokenizer: Tokenizer, data: st.DataObject) -> None:
    any_ids = st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=12)
    ids = data.draw(any_ids | st.text("the ab é日🎉", max_size=8).map(tokenizer.encode))
    whole = tokenizer.decode(ids)
    for length in range(len(ids) + 1):
        prompt, rest = tokenizer.decode(ids[:length]), completion(tokenizer, ids, length)
        # A character whose last bytes are new belongs to the completion.
        while prompt + rest != whole and prompt.endswith("\ufffd"):
            prompt = prompt[:-1]
        assert prompt + rest == whole


def test_a_completion_keeps_its_first_space() -> None:
    ids = BYTE_FALLBACK.encode("the ab")
    assert completion(BYTE_FALLBACK, ids, 1) == " ab"
    # At the start of a text the tokenizer has added that space.
    assert completion(BYTE_FALLBACK, ids[1:], 0) == "ab"


def test_a_text_that_must_be_whole_keeps_its_first_space() -> None:
    stream = BYTE_FALLBACK.stream([BYTE_FALLBACK.bos_id or 0], at_start=False)
    assert "".join(stream.push(id) for id in BYTE_FALLBACK.encode("ab")) == " ab"


BYTES_ONLY = Tokenizer.train(iter([]), 258)
ONE_TOKEN_A_BYTE = pytest.mark.parametrize(
    "tokenizer", [BYTES_ONLY, BYTE_FALLBACK], ids=["byte_level", "byte_fallback"]
)


@ONE_TOKEN_A_BYTE
@pytest.mark.parametrize("given", range(1, 5))
def test_a_character_that_the_prompt_begins_is_the_completions(tokenizer: Tokenizer, given: int) -> None:
    ids = tokenizer.encode("🎉")[-4:]
    assert completion(tokenizer, ids, given) == ("🎉" if given < 4 else "")
    # Bytes that stay incomplete are the prompt's.
    [letter] = tokenizer.encode("a")[-1:]
    whole = tokenizer.decode([*ids[:given], letter])
    assert tokenizer.decode(ids[:given]) + completion(tokenizer, [*ids[:given], letter], given) == whole


@ONE_TOKEN_A_BYTE
def test_a_character_of_several_tokens_is_emitted_with_its_last(tokenizer: Tokenizer) -> None:
    stream = tokenizer.stream()
    ids = tokenizer.encode("日本🎉")[-10:]
    assert [stream.push(id) for id in ids] == ["", "", "日", "", "", "本", "", "", "", "🎉"]


@ONE_TOKEN_A_BYTE
def test_a_wrong_byte_spoils_no_other_character(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("日本")[-6:]
    spoiled = [*ids[:3], ids[3], *ids[3:], ids[-1]]
    assert tokenizer.decode(spoiled) == "日\ufffd本\ufffd"
    assert completion(tokenizer, spoiled, 0) == "日\ufffd本\ufffd"


@ALL_KINDS
@given(data=st.data())
def test_names_of_whole_tokens_join_to_the_text(tokenizer: Tokenizer, data: st.DataObject) -> None:
    alphabet = "the ab. 1" if tokenizer is not KINDS["word_piece"] else "ab "
    ids = tokenizer.encode(data.draw(st.text(alphabet, max_size=12)))
    length = data.draw(st.integers(0, len(ids)))
    stream, names = tokenizer.stream(ids[:length]), []
    for id in ids[length:]:
        names.append(stream.name(id))
        stream.push(id)
    assert None not in names
    assert "".join(str(name) for name in names) == completion(tokenizer, ids, length)


def test_a_name_is_a_special_token_or_whole_characters() -> None:
    stream = BYTE_FALLBACK.stream(BYTE_FALLBACK.encode("the"))
    assert stream.name(BYTE_FALLBACK.eos_id or 0) == "</s>"
    assert stream.name(BYTE_FALLBACK.encode("a")[0]) == " a"
    assert [stream.name(id) for id in BYTE_FALLBACK.encode("日")[-3:]] == [None] * 3
    assert stream.name(BYTE_FALLBACK.encode("\n")[-1]) == "\n"
    assert stream.name(10**6) is None


@WHOLE_TEXT
@given(data=st.data())
def test_a_stream_gives_the_text_of_any_ids(tokenizer: Tokenizer, data: st.DataObject) -> None:
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1)))
    stream = tokenizer.stream()
    assert "".join([stream.push(id) for id in ids] + [stream.flush()]) == tokenizer.decode(ids)


@WHOLE_TEXT
@given(text=ANY_TEXT)
def test_a_stream_never_emits_part_of_a_character(tokenizer: Tokenizer, text: str) -> None:
    text = text.replace("▁", "").replace("\ufffd", "")
    stream = tokenizer.stream()
    emitted = "".join(stream.push(id) for id in tokenizer.encode(text))
    assert "\ufffd" not in emitted
    assert emitted + stream.flush() == text


def test_a_stream_delays_only_incomplete_characters() -> None:
    stream = BYTES_ONLY.stream()
    first, *rest = BYTES_ONLY.encode("🎉a")
    assert stream.push(first) == ""
    assert [stream.push(id) for id in rest] == ["", "", "🎉", "a"]
    assert stream.push(first) == ""
    assert stream.flush() == "\ufffd"
    assert stream.flush() == ""


@WHOLE_TEXT
def test_the_cost_of_a_push_does_not_grow_with_the_text(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("the ab 🎉 " * 4000)
    stream = tokenizer.stream()
    started = time.perf_counter()
    for id in ids:
        stream.push(id)
    assert (
        time.perf_counter() - started < 5
    )  # Decoding the whole text again for each token would take minutes.
