"""How texts are split into words before their bytes are merged: the regular expressions of well-known tokenizers."""

from __future__ import annotations

import re

GPT_2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
"""Contractions in small letters; letters, digits and others, each with one space before them; spaces."""

LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""Of GPT-4's cl100k_base as Llama 3 uses it: contractions, words with at most one leading character that is neither
letter nor digit, numbers of at most three digits, punctuation, line ends, spaces."""

QWEN_2 = LLAMA_3.replace("{1,3}", "")
"""That of Llama 3, with each digit alone."""

DIGIT = r"\p{N}"
"""Each digit alone."""

TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|"
    r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""Of Mistral's Tekken: words also end before a capital letter."""

O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""Of GPT-4o and Llama 4: as Tekken, with contractions and at most three digits."""


def with_digits(split: str, count: int) -> str:
    """Return `split` with at most `count` digits in a word."""
    digits = r"\p{N}" if count == 1 else rf"\p{{N}}{{1,{count}}}"
    return re.sub(r"(?<=\|)( \?)?\\p\{N\}(\+|\{1,3\})?(?=\|)", lambda match: (match[1] or "") + digits, split)
