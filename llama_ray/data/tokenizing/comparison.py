"""How well tokenizers fit a text."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from tokenizers.pre_tokenizers import ByteLevel

from llama_ray.data.tokenizing.tokenizer import Tokenizer

_BYTE = re.compile("<0x[0-9A-F]{2}>")


@dataclass(frozen=True)
class TokenizerFit:
    """What a tokenizer makes of a text.

    `tokens_per_word` counts words between white space. `single_bytes` is the share of the tokens that stand for one
    byte, and `used` that of the vocabulary's entries that occur; all are 0 for a text without tokens.
    """

    name: str
    vocab_size: int
    bytes_per_token: float
    tokens_per_word: float
    single_bytes: float
    used: float


def compare_tokenizers(texts: Iterable[str], tokenizers: Mapping[str, Tokenizer]) -> list[TokenizerFit]:
    """Return how each of `tokenizers`, by its name, fits `texts`, which are read once."""
    counts = {name: np.zeros(tokenizer.vocab_size, np.int64) for name, tokenizer in tokenizers.items()}
    size = words = 0
    for text in texts:
        size += len(text.encode())
        words += len(text.split())
        for name, tokenizer in tokenizers.items():
            counts[name] += np.bincount(tokenizer.encode(text), minlength=tokenizer.vocab_size)
    return [_fit(name, tokenizer, counts[name], size, words) for name, tokenizer in tokenizers.items()]


def table(fits: Iterable[TokenizerFit]) -> list[str]:
    """Return lines that show `fits` in columns, the first line being their names."""
    rows = [("tokenizer", "entries", "bytes/token", "tokens/word", "single bytes", "entries used")]
    rows += [
        (
            fit.name,
            f"{fit.vocab_size:,}",
            f"{fit.bytes_per_token:.2f}",
            f"{fit.tokens_per_word:.2f}",
            f"{fit.single_bytes:.1%}",
            f"{fit.used:.1%}",
        )
        for fit in fits
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]


def _fit(name: str, tokenizer: Tokenizer, counts: NDArray[np.int64], size: int, words: int) -> TokenizerFit:
    tokens = int(counts.sum())
    return TokenizerFit(
        name=name,
        vocab_size=tokenizer.vocab_size,
        bytes_per_token=size / max(tokens, 1),
        tokens_per_word=tokens / max(words, 1),
        single_bytes=int(counts[_single_bytes(tokenizer)].sum()) / max(tokens, 1),
        used=np.count_nonzero(counts) / len(counts),
    )


def _single_bytes(tokenizer: Tokenizer) -> list[int]:
    """Return the ids of the tokens that stand for one byte: a letter of GPT-2's for bytes, or "<0x0A>"."""
    model = json.loads(tokenizer.to_json())["model"]
    vocabulary = model["vocab"]
    names = (
        vocabulary if isinstance(vocabulary, dict) else {entry[0]: id for id, entry in enumerate(vocabulary)}
    )
    letters = set() if model.get("byte_fallback") else set(ByteLevel.alphabet())
    return [
        id
        for name, id in names.items()
        if name in letters or _BYTE.fullmatch(name) or (len(name) == 1 and name.isascii())
    ]
