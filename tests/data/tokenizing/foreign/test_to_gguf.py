"""What is said of a tokenizer that llama.cpp cannot have; `tests/exporting` has those that it can."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

from llama_ray.data.tokenizing.errors import TokenizerError
from llama_ray.data.tokenizing.foreign.pieces import SPACE, Kind, Piece, Spaces, bpe
from llama_ray.data.tokenizing.foreign.to_gguf import to_gguf
from llama_ray.data.tokenizing.splits import GPT_2, LLAMA_3, O200K
from tests.data.tokenizing.foreign.helpers import BYTE_LEVEL

Edit = Callable[[dict[str, Any]], object]
ROWS = BYTE_LEVEL.vocab_size


def edited(*edits: Edit) -> str:
    content = json.loads(BYTE_LEVEL.to_json())
    for edit in edits:
        edit(content)
    return json.dumps(content)


def split(*steps: pre_tokenizers.PreTokenizer) -> Edit:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(list(steps))
    return lambda content: content.update(pre_tokenizer=json.loads(backend.to_str())["pre_tokenizer"])


def by(regex: str, behavior: str = "isolated") -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Split(Regex(regex), behavior)


def normalize(normalizer: normalizers.Normalizer) -> Edit:
    backend = Tokenizer(models.BPE())
    backend.normalizer = normalizer
    return lambda content: content.update(normalizer=json.loads(backend.to_str())["normalizer"])


def model(**fields: Any) -> Edit:
    return lambda content: content["model"].update(fields)


def added(**fields: Any) -> Edit:
    flags = dict.fromkeys(("special", "lstrip", "rstrip", "single_word", "normalized"), False)
    token = {"id": ROWS, "content": "<x>", **flags, **fields}
    return lambda content: content["added_tokens"].append(token)


BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
WORDS = "llama.cpp does not know how it splits texts into words"


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (split(by(r"\p{L}+"), BYTES), WORDS),
        (split(by(LLAMA_3, "removed"), BYTES), rf"{WORDS} \(Split\)"),
        (split(pre_tokenizers.Whitespace(), BYTES), rf"{WORDS} \(Whitespace\)"),
        (split(pre_tokenizers.ByteLevel(add_prefix_space=True)), rf"{WORDS} \(ByteLevel\)"),
        (normalize(normalizers.Lowercase()), "its normalizer is Lowercase; llama.cpp has none"),
        (model(dropout=0.1), "its dropout is 0.1; it must have none"),
        (model(type="WordPiece"), "its model is WordPiece; it must be BPE"),
        (added(single_word=True), "its added token '<x>' takes spaces or whole words"),
        (added(rstrip=True), "its added token '<x>' takes spaces or whole words"),
        (added(content="a"), "two of its tokens have the same name"),
        (lambda content: content.update(pre_tokenizer=None), "its normalizer is not that of Llama 2"),
    ],
)
def test_a_tokenizer_that_llama_cpp_cannot_have_is_refused(edit: Edit, reason: str) -> None:
    with pytest.raises(TokenizerError, match=f"llama.cpp cannot have this tokenizer: {reason}"):
        to_gguf(edited(edit), {0, 1}, ROWS + 1)


def with_token_that_no_merge_makes(content: dict[str, Any]) -> None:
    content["model"]["vocab"]["zqx"] = ROWS


@pytest.mark.parametrize(
    ("edits", "name"),
    [
        ([], "dbrx"),
        ([model(ignore_merges=True)], "llama-bpe"),
        ([split(by(GPT_2), BYTES)], "gpt-2"),
        ([split(pre_tokenizers.ByteLevel(add_prefix_space=False))], "gpt-2"),
        ([split(pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False))], "smollm"),
        # Its merges make all of its tokens, so that it does not matter what comes first.
        ([split(by(GPT_2), BYTES), model(ignore_merges=True)], "gpt-2"),
        ([split(by(GPT_2), BYTES), model(ignore_merges=True), with_token_that_no_merge_makes], None),
    ],
)
def test_words_are_split_in_the_way_that_llama_cpp_knows(edits: list[Edit], name: str | None) -> None:
    if name is None:
        with pytest.raises(TokenizerError, match=WORDS):
            to_gguf(edited(*edits), {0, 1}, ROWS + 1)
    else:
        metadata, notes = to_gguf(edited(*edits), {0, 1}, ROWS)
        assert (metadata["tokenizer.ggml.pre"], notes) == (name, [])


def test_runs_of_spaces_may_merge_in_any_order_as_in_mistrals_vocabulary() -> None:
    """Scores of all runs but the shortest are equal, so that the leftmost merge comes first, whatever it makes."""
    pieces = [Piece("<unk>", 0, Kind.UNKNOWN)]
    pieces += [Piece(f"<0x{byte:02X}>", 0, Kind.BYTE) for byte in range(256)]
    pieces += [Piece(letter, 0, Kind.NORMAL) for letter in (SPACE, "a", "b")]
    pieces += [Piece("ab", -1, Kind.NORMAL), *(Piece(SPACE * n, -2, Kind.NORMAL) for n in range(2, 9))]
    backend = bpe(pieces, Spaces(prefix=True, remove_extra=False))
    metadata, notes = to_gguf(backend.to_str(), {0}, len(pieces))
    scores, kinds = (metadata[f"tokenizer.ggml.{name}"] for name in ("scores", "token_type"))
    assert isinstance(scores, np.ndarray)
    assert isinstance(kinds, np.ndarray)
    assert scores[-8:].tolist() == [-1, -3, *[-2] * 6]
    assert kinds.tolist() == [2, *[6] * 256, *[1] * 11]
    assert notes == []


@pytest.mark.parametrize(
    ("edit", "note"),
    [
        (split(by(O200K), BYTES), "llama.cpp takes only A to Z for capital letters"),
        (normalize(normalizers.NFC()), "llama.cpp does not bring texts into the form NFC"),
        (
            lambda content: content["model"]["vocab"].pop("Ą"),
            "of 1 bytes that this tokenizer has no token for",
        ),
        (added(special=True, lstrip=True), "llama.cpp keeps spaces beside special tokens"),
    ],
)
def test_it_is_said_in_what_llama_cpp_differs(edit: Edit, note: str) -> None:
    _, [said] = to_gguf(edited(edit), {0, 1}, ROWS + 1)
    assert said.startswith(note)
