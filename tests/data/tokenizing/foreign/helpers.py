"""Tokenizers of other libraries, made here, and texts on which ours are compared with them."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import sentencepiece
from transformers.convert_slow_tokenizer import bytes_to_unicode

from llama_ray.data.tokenizing.hostile_texts import hostile_texts
from llama_ray.data.tokenizing.tokenizer import Tokenizer

CORPUS = [
    *Path(json.__file__).read_text(encoding="utf-8").splitlines(),
    *(Path(base64.__file__).read_text(encoding="utf-8").splitlines()),
    *["Straße, naïve, русский текст, 日本語 and 12345 ABCDEF0123456789/<>x unk s"] * 20,
]
BYTE_LEVEL = Tokenizer.train(iter(CORPUS), 700)
MODEL = json.loads(BYTE_LEVEL.to_json())["model"]
TEXTS = [*list(hostile_texts())[::6], *CORPUS, "\n".join(CORPUS)]

Encode = Callable[[str], Sequence[int]]


def differences(tokenizer: Tokenizer, reference: Encode) -> list[str]:
    """The texts to which the two give different ids."""
    return [text for text in TEXTS if tokenizer.encode(text) != list(reference(text))]


def ranks() -> dict[bytes, int]:
    """The tokens of BYTE_LEVEL as tiktoken has them: the bytes and, in the order of their merges, the others."""
    bytes_of = {letter: byte for byte, letter in bytes_to_unicode().items()}
    merged = [bytes(bytes_of[letter] for letter in "".join(pair)) for pair in MODEL["merges"]]
    return {token: rank for rank, token in enumerate([*(bytes([byte]) for byte in range(256)), *merged])}


def train_sentencepiece(directory: Path, **options: object) -> Path:
    """Train a model like that of Llama 2, but for `options`."""
    settings = {
        "model_type": "bpe",
        "vocab_size": 600,
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "minloglevel": 2,
    }
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS), model_prefix=str(directory / "tokenizer"), **(settings | options)
    )
    return directory / "tokenizer.model"
