"""Two small tokenizers of different kinds, and the texts of a source."""

from __future__ import annotations

from pathlib import Path

import tokenizers
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers

from llama_ray.data.corpus import find_corpus
from llama_ray.data.documents import read
from llama_ray.data.tokenizer import BOS, EOS, Tokenizer

TEXTS = [
    "def add(a, b):\n    return a + b\n" * 3,
    "The quick brown fox doesn't jump over 12345 lazy dogs.\r\n\r\n" * 3,
    "Ünïcödé, 日本語のテキスト, русский текст, 🎉👩‍👩‍👧 and 🏳️‍🌈." * 3,
]


def ours() -> Tokenizer:
    """A byte-level tokenizer, as this project trains them."""
    return Tokenizer.train(iter(TEXTS), 350)


def byte_fallback() -> Tokenizer:
    """A tokenizer built like that of Llama 2, SentencePiece BPE with byte fallback, with a small vocabulary."""
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

ANY_TEXT = st.one_of(
    st.text(),
    # Characters and names with a special meaning for tokenizers.
    st.lists(
        st.sampled_from([BOS, EOS, "<s>", "</s>", "<0xE2>", " ", "\n", "Ġ", "▁", "é", "日", "👩‍👧"])
    ).map("".join),
)


def texts(source: Path | str) -> list[str]:
    """All texts of a source, in the order of its documents."""
    return [text for document in find_corpus(str(source)).documents for text in read(document)]
