from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers
from transformers import AutoTokenizer

from llama_ray.data.tokenizer import BOS, EOS, Tokenizer, TokenizerError

TEXTS = [
    "def add(a, b):\n    return a + b\n" * 3,
    "The quick brown fox doesn't jump over 12345 lazy dogs.\r\n\r\n" * 3,
    "Ünïcödé, 日本語のテキスト, русский текст, 🎉👩‍👩‍👧 and 🏳️‍🌈." * 3,
]


def ours() -> Tokenizer:
    return Tokenizer.train(iter(TEXTS), 350)


def byte_fallback() -> Tokenizer:
    """The construction of Llama 2's tokenizer (SentencePiece BPE with byte fallback) on a small vocabulary."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += ["▁", "a", "b", "e", "t", "▁a", "ab", "▁t", "▁the", "h", "he", "é"]
    merges = [("▁", "a"), ("a", "b"), ("▁", "t"), ("h", "e"), ("▁t", "he")]
    vocab = {piece: id for id, piece in enumerate(pieces)}
    backend = tokenizers.Tokenizer(
        models.BPE(vocab, merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True)
    )
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    return Tokenizer(backend, {})


OURS = ours()
BYTE_FALLBACK = byte_fallback()
KINDS = pytest.mark.parametrize("tokenizer", [OURS, BYTE_FALLBACK], ids=["byte_level", "byte_fallback"])

any_text = st.one_of(
    st.text(),
    # text that looks like what the tokenizer's own machinery uses
    st.lists(
        st.sampled_from([BOS, EOS, "<s>", "</s>", "<0xE2>", " ", "\n", "Ġ", "▁", "é", "日", "👩‍👧"])
    ).map("".join),
)


@KINDS
@given(text=any_text)
def test_decoding_encoded_text_gives_it_back(tokenizer: Tokenizer, text: str) -> None:
    if tokenizer is BYTE_FALLBACK:
        text = text.replace("▁", "")  # SentencePiece's space mark cannot be told from a space
    ids = tokenizer.encode(text, bos=True, eos=True)
    assert (ids[0], ids[-1]) == (tokenizer.bos_id, tokenizer.eos_id)
    assert not {tokenizer.bos_id, tokenizer.eos_id} & set(ids[1:-1])
    assert all(0 <= id < tokenizer.vocab_size for id in ids)
    assert tokenizer.decode(ids) == text


@KINDS
@given(data=st.data())
def test_stream_gives_the_text_of_any_ids(tokenizer: Tokenizer, data: st.DataObject) -> None:
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1)))
    stream = tokenizer.stream()
    assert "".join([stream.push(id) for id in ids] + [stream.flush()]) == tokenizer.decode(ids)


@KINDS
@given(text=any_text)
def test_stream_never_emits_half_a_character(tokenizer: Tokenizer, text: str) -> None:
    text = text.replace("▁", "").replace("\ufffd", "")
    stream = tokenizer.stream()
    pieces = [stream.push(id) for id in tokenizer.encode(text)]
    assert "\ufffd" not in "".join(pieces)
    assert "".join(pieces) + stream.flush() == text


def test_stream_holds_back_only_what_is_pending() -> None:
    bytes_only = Tokenizer.train(iter([]), 258)
    stream = bytes_only.stream()
    first, *rest = bytes_only.encode("🎉a")
    assert stream.push(first) == ""
    assert [stream.push(id) for id in rest] == ["", "", "🎉", "a"]
    assert stream.push(first) == ""
    assert stream.flush() == "\ufffd"
    assert stream.flush() == ""


@KINDS
def test_stream_costs_the_same_per_token_however_long_the_text(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("the ab 🎉 " * 4000)
    stream = tokenizer.stream()
    started = time.perf_counter()
    for id in ids:
        stream.push(id)
    assert time.perf_counter() - started < 5  # decoding everything again for each token takes minutes


def test_text_that_names_special_tokens_stays_text() -> None:
    ids = OURS.encode(f"a{EOS}b{BOS}")
    assert OURS.decode(ids, skip_special=True) == f"a{EOS}b{BOS}"
    assert OURS.decode([OURS.bos_id or 0, *ids], skip_special=False) == f"{BOS}a{EOS}b{BOS}"


def test_encode_batch_equals_encode() -> None:
    assert OURS.encode_batch([*TEXTS, ""]) == [*(OURS.encode(text) for text in TEXTS), []]


def test_training_is_deterministic_and_bounded() -> None:
    again = ours()
    assert again.fingerprint == OURS.fingerprint
    assert again.vocab_size == 350
    assert Tokenizer.train(iter(TEXTS), 351).fingerprint != OURS.fingerprint
    assert Tokenizer.train(iter(["ab"]), 5000).vocab_size == 258


def test_too_small_a_vocabulary_is_refused() -> None:
    with pytest.raises(TokenizerError, match="vocab_size is 257, must be at least 258"):
        Tokenizer.train(iter(TEXTS), 257)


def test_lone_surrogate_is_refused() -> None:
    with pytest.raises(TokenizerError, match=r"lone surrogate \(U\+D83C\) at character 2"):
        OURS.encode("ab\ud83c")


def test_saved_directory_loads_here_and_in_transformers(tmp_path: Path) -> None:
    OURS.save(tmp_path)
    # as in a model directory: transformers must not rebuild the tokenizer from the model type
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


def test_saving_keeps_what_a_foreign_config_says(tmp_path: Path) -> None:
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


def test_gpt2_style_tokenizer_has_one_token_for_both_ends(tmp_path: Path) -> None:
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
        ("tokenizer.json", "{", "is not a Hugging Face tokenizer.json"),
        ("tokenizer_config.json", "{", "is not JSON"),
        (
            "tokenizer_config.json",
            '{"eos_token": "<nowhere>"}',
            "eos_token '<nowhere>', which is not in the vocab",
        ),
    ],
)
def test_unusable_files_are_refused(tmp_path: Path, name: str, content: str, message: str) -> None:
    if name == "tokenizer_config.json":
        OURS.save(tmp_path)
    (tmp_path / name).write_text(content)
    with pytest.raises(TokenizerError, match=message):
        Tokenizer.load(tmp_path)
