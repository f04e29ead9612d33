"""Two small tokenizers of different kinds, and the texts of a source."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import tokenizers
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers

from llama_ray.data.preparing import corpus as corpora
from llama_ray.data.preparing.config import NamedSource
from llama_ray.data.records.fields import TextFields
from llama_ray.data.records.pieces import Piece, read
from llama_ray.data.sources.left_out import Tally
from llama_ray.data.tokenizing.tokenizer import BOS, EOS, Tokenizer

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


def nested_byte_level() -> Tokenizer:
    """A byte-level tokenizer whose decoder is a sequence in a sequence."""
    backend = tokenizers.Tokenizer.from_str(ours().to_json())
    backend.decoder = decoders.Sequence([decoders.Sequence([decoders.ByteLevel()]), decoders.Fuse()])
    return Tokenizer(backend, {})


def metaspace() -> Tokenizer:
    """A tokenizer built like that of T5 or of newer exports of Llama 2, without the normalizer of `byte_fallback`."""
    backend = tokenizers.Tokenizer.from_str(byte_fallback().to_json())
    backend.normalizer = None
    backend.pre_tokenizer = pre_tokenizers.Metaspace("▁", "first", split=False)
    backend.decoder = decoders.Sequence(
        [decoders.ByteFallback(), decoders.Metaspace("▁", "first", split=False)]
    )
    return Tokenizer(backend, {})


def word_piece() -> Tokenizer:
    """A tokenizer that writes spaces between its words only when it decodes."""
    words = ["[UNK]", "a", "##b", "the", ".", "é", "e"]
    backend = tokenizers.Tokenizer(
        models.WordPiece({word: id for id, word in enumerate(words)}, unk_token="[UNK]")
    )
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece(cleanup=False)
    return Tokenizer(backend, {})


OURS = ours()
BYTE_FALLBACK = byte_fallback()
KINDS = {
    "byte_level": OURS,
    "nested_byte_level": nested_byte_level(),
    "byte_fallback": BYTE_FALLBACK,
    "metaspace": metaspace(),
    "word_piece": word_piece(),
}

ANY_TEXT = st.one_of(
    st.text(),
    # Characters and names with a special meaning for tokenizers.
    st.lists(
        st.sampled_from([BOS, EOS, "<s>", "</s>", "<0xE2>", " ", "\n", "Ġ", "▁", "é", "日", "👩‍👧"])
    ).map("".join),
)


class Found(NamedTuple):
    """The pieces of one source."""

    documents: list[Piece]
    left_out: Tally
    fingerprint: str
    size: int


def find_corpus(source: str, output: Path | None = None) -> Found:
    """Find one source."""
    corpus = corpora.find_corpus([NamedSource("text", source)], TextFields(), output=output)
    [found] = corpus.sources
    return Found(found.pieces, found.left_out, corpus.fingerprint, corpus.size)


def texts(source: Path | str) -> list[str]:
    """All texts of a source, in the order of its documents."""
    return taken(source)[0]


def taken(source: Path | str) -> tuple[list[str], list[str]]:
    """All texts of a source, and a line for each reason why something was left out."""
    corpus = find_corpus(str(source))
    left_out = Tally()
    left_out.merge(corpus.left_out)
    found = [
        text.text for document in corpus.documents for text in read(document, TextFields(), left_out.add)
    ]
    return found, left_out.lines()


@contextmanager
def folder_without_root() -> Iterator[Path]:
    """Make a folder, and be a user whom access rights bind: root may read everything."""
    user = os.geteuid()
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o777)
        if user == 0:
            os.seteuid(65534)
        try:
            yield Path(folder)
        finally:
            os.seteuid(user)
            for path in Path(folder).iterdir():
                path.chmod(0o777)
