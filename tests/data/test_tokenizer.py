from __future__ import annotations

import json
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given
from tokenizers import decoders, models
from transformers import AutoTokenizer

from llama_ray.data.tokenizer import BOS, EOS, Tokenizer, TokenizerError
from tests.data.helpers import ANY_TEXT, BYTE_FALLBACK, OURS, TEXTS, ours

KINDS = pytest.mark.parametrize("tokenizer", [OURS, BYTE_FALLBACK], ids=["byte_level", "byte_fallback"])


@KINDS
@given(text=ANY_TEXT)
def test_decoding_inverts_encoding(tokenizer: Tokenizer, text: str) -> None:
    if tokenizer is BYTE_FALLBACK:
        text = text.replace("▁", "")  # SentencePiece uses this character for a space.
    ids = tokenizer.encode(text, bos=True, eos=True)
    assert (ids[0], ids[-1]) == (tokenizer.bos_id, tokenizer.eos_id)
    assert not {tokenizer.bos_id, tokenizer.eos_id} & set(ids[1:-1])
    assert all(0 <= id < tokenizer.vocab_size for id in ids)
    assert tokenizer.decode(ids) == text


def test_text_is_never_encoded_as_a_special_token() -> None:
    ids = OURS.encode(f"a{EOS}b{BOS}")
    assert OURS.decode(ids, skip_special=True) == f"a{EOS}b{BOS}"
    assert OURS.decode([OURS.bos_id or 0, *ids], skip_special=False) == f"{BOS}a{EOS}b{BOS}"


def test_training_is_deterministic_and_bounded() -> None:
    again = ours()
    assert again.fingerprint == OURS.fingerprint
    assert again.vocab_size == 350
    assert Tokenizer.train(iter(TEXTS), 351).fingerprint != OURS.fingerprint
    assert Tokenizer.train(iter(["ab"]), 5000).vocab_size == 258


def test_a_vocab_size_below_the_minimum_is_refused() -> None:
    with pytest.raises(TokenizerError, match="vocab_size is 257; it must be at least 258"):
        Tokenizer.train(iter(TEXTS), 257)


def test_a_lone_surrogate_is_refused() -> None:
    with pytest.raises(TokenizerError, match=r"lone surrogate \(U\+D83C\) at character 2"):
        OURS.encode("ab\ud83c")


def test_a_saved_directory_loads_here_and_in_transformers(tmp_path: Path) -> None:
    OURS.save(tmp_path)
    # As in a model directory; transformers must not rebuild the tokenizer from the model type.
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    for loaded in (Tokenizer.load(tmp_path), Tokenizer.load(tmp_path / "tokenizer.json")):
        assert loaded.fingerprint == OURS.fingerprint
        assert (loaded.bos_id, loaded.eos_id) == (OURS.bos_id, OURS.eos_id)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert (theirs.bos_token_id, theirs.eos_token_id) == (OURS.bos_id, OURS.eos_id)
    for text in TEXTS:
        assert theirs(text, add_special_tokens=False).input_ids == OURS.encode(text)
        assert theirs(text).input_ids == OURS.encode(text, bos=True)
        assert theirs.decode(OURS.encode(text)) == text


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (None, ("<s>", "</s>")),
        ({}, ("<s>", "</s>")),
        ({"bos_token": {"content": "a", "special": True}, "eos_token": "b"}, ("a", "b")),
        ({"bos_token": None, "eos_token": "</s>"}, (None, "</s>")),
    ],
)
def test_bos_and_eos_of_a_foreign_tokenizer(
    tmp_path: Path, config: dict[str, object] | None, expected: tuple[str | None, str | None]
) -> None:
    BYTE_FALLBACK.save(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    if config is not None:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    loaded = Tokenizer.load(tmp_path)
    vocab = json.loads((tmp_path / "tokenizer.json").read_text())["model"]["vocab"]
    assert (loaded.bos_id, loaded.eos_id) == tuple(name and vocab[name] for name in expected)
    if loaded.bos_id is None:
        with pytest.raises(TokenizerError, match="has no bos_token"):
            loaded.encode("a", bos=True)


def test_saving_keeps_the_entries_of_a_foreign_config(tmp_path: Path) -> None:
    BYTE_FALLBACK.save(tmp_path / "one")
    config = {
        "bos_token": "<s>",
        "eos_token": "</s>",
        "chat_template": "{{ messages }}",
        "model_max_length": 4096,
    }
    (tmp_path / "one" / "tokenizer_config.json").write_text(json.dumps(config))
    Tokenizer.load(tmp_path / "one").save(tmp_path / "two")
    saved = json.loads((tmp_path / "two" / "tokenizer_config.json").read_text())
    assert saved.items() >= config.items()


def test_a_gpt2_style_tokenizer_uses_one_token_as_bos_and_eos(tmp_path: Path) -> None:
    backend = tokenizers.Tokenizer(models.BPE({"a": 0, "Ġ": 1, "<|endoftext|>": 2}, []))
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<|endoftext|>"])
    backend.save(str(tmp_path / "tokenizer.json"))
    loaded = Tokenizer.load(tmp_path)
    assert (loaded.bos_id, loaded.eos_id, loaded.vocab_size) == (2, 2, 3)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("other.txt", "", "no tokenizer at"),
        ("tokenizer.json", "{", "cannot be read as a Hugging Face tokenizer.json"),
        ("tokenizer_config.json", "{", "is not JSON"),
        (
            "tokenizer_config.json",
            '{"eos_token": "<nowhere>"}',
            "eos_token '<nowhere>'; name one that is in the vocabulary",
        ),
    ],
)
def test_unusable_files_are_refused(tmp_path: Path, name: str, content: str, message: str) -> None:
    if name == "tokenizer_config.json":
        OURS.save(tmp_path)
    (tmp_path / name).write_text(content)
    with pytest.raises(TokenizerError, match=message):
        Tokenizer.load(tmp_path)
