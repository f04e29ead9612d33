from __future__ import annotations

import base64
import json
from pathlib import Path

import pytest
import tiktoken
from transformers import AutoTokenizer

from llama_ray.data.tokenizing.errors import TokenizerError
from llama_ray.data.tokenizing.foreign.byte_level import last_merge
from llama_ray.data.tokenizing.splits import LLAMA_3, TEKKEN
from llama_ray.data.tokenizing.tokenizer import Tokenizer
from tests.data.tokenizing.foreign.helpers import CORPUS, differences, ranks

RANKS = ranks()


def write_tiktoken(directory: Path, tokens: dict[bytes, int]) -> Path:
    lines = [f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in tokens.items()]
    (directory / "tokenizer.model").write_text("".join(lines))
    return directory / "tokenizer.model"


def write_tekken(directory: Path, tokens: dict[bytes, int], **parts: object) -> Path:
    content = {
        "config": {
            "pattern": TEKKEN,
            "default_vocab_size": len(tokens) + 90,
            "default_num_special_tokens": 100,
        },
        "vocab": [
            {"rank": rank, "token_bytes": base64.b64encode(token).decode(), "token_str": None}
            for token, rank in tokens.items()
        ],
    }
    (directory / "tekken.json").write_text(json.dumps(content | parts))
    return directory / "tekken.json"


def encoding(split: str, tokens: dict[bytes, int]) -> tiktoken.Encoding:
    return tiktoken.Encoding("test", pat_str=split, mergeable_ranks=tokens, special_tokens={})


def test_the_ids_of_llama_3s_file_are_those_of_tiktoken(tmp_path: Path) -> None:
    # Also a token that no merges lead to, and one whose parts have a higher rank than it.
    tokens = dict(RANKS) | {b"qzqz": len(RANKS), b"xyxyz": len(RANKS) + 1, b"xyxy": len(RANKS) + 2}
    tokens[b"xy"] = len(tokens)
    tokenizer = Tokenizer.load(write_tiktoken(tmp_path, tokens))
    assert (tokenizer.bos_id, tokenizer.eos_id) == (len(tokens), len(tokens) + 1)
    assert tokenizer.vocab_size == len(tokens) + 256
    reference = encoding(LLAMA_3, tokens)
    assert not differences(tokenizer, reference.encode_ordinary)
    for text in ("qzqz", " qzqz", "aqzqz", "xyxyz", "axyxyzxyxy", "xyxyxyxyz"):
        assert tokenizer.encode(text) == reference.encode_ordinary(text)
    assert tokenizer.encode_prompt("a<|eot_id|>", parse_special=True) == [
        len(tokens),
        RANKS[b"a"],
        len(tokens) + 9,
    ]


def test_a_saved_tokenizer_is_the_same_here_and_in_transformers(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(write_tiktoken(tmp_path, RANKS))
    tokenizer.save(tmp_path / "saved")
    assert Tokenizer.load(tmp_path / "saved").fingerprint == tokenizer.fingerprint
    theirs = AutoTokenizer.from_pretrained(tmp_path / "saved")
    for text in CORPUS[:50]:
        assert theirs(text).input_ids == tokenizer.encode(text, bos=True)


def test_the_ids_of_tekken_are_those_of_tiktoken_after_the_special_tokens(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(write_tekken(tmp_path, RANKS))
    # The file holds 10 tokens more than its vocabulary takes.
    reference = encoding(TEKKEN, {token: rank for token, rank in RANKS.items() if rank < len(RANKS) - 10})
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.vocab_size) == (1, 2, len(RANKS) + 90)
    assert not differences(tokenizer, lambda text: [100 + id for id in reference.encode_ordinary(text)])


def test_the_last_merge_of_a_token_is_what_all_others_leave() -> None:
    order = {b"a": 0, b"b": 1, b"c": 2, b"bc": 3, b"ab": 4, b"abc": 5}
    assert last_merge(b"abc", order) == [(b"a", b"bc")]
    assert last_merge(b"cab", order | {b"cab": 6}) == [(b"c", b"ab")]
    assert last_merge(b"cba", order | {b"cba": 6}) == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("YQ== 0\nYg== x\n", "its line 2 is no token in base64 and its rank"),
        ("YQ== 0\nYg==\n", "its line 2 is no token in base64 and its rank"),
        ("YQ== 0\nYg== 2\n", "its ranks are not 0, 1, 2 and so on"),
        ("YQ== 0\nYg== 1\n", "it has no token for the byte 0x00"),
    ],
)
def test_a_damaged_file_of_tiktoken_is_refused(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "tokenizer.model").write_text(content)
    with pytest.raises(TokenizerError, match=message):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize("content", ["{", "{}", '{"config": {}}', "[]"])
def test_a_damaged_tekken_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "tekken.json").write_text(content)
    with pytest.raises(TokenizerError, match=r"tekken.json cannot be read: it is no whole tekken.json"):
        Tokenizer.load(tmp_path)


def test_the_name_of_a_tekken_may_have_a_date(tmp_path: Path) -> None:
    file = write_tekken(tmp_path, RANKS).rename(tmp_path / "tekken_240911.json")
    assert Tokenizer.load(file).vocab_size == len(RANKS) + 90
