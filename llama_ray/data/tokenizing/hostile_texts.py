"""Texts on which two implementations of a tokenizer are likely to differ."""

from __future__ import annotations

import random
import sys
import unicodedata
from collections import defaultdict
from collections.abc import Iterator, Sequence

# What the splits of GPT-2, GPT-4, Llama 3 and Qwen treat differently: white space of all kinds, contractions in both
# cases (also the long s and the Kelvin sign, which fold to ASCII letters), digits, punctuation, letters of scripts with
# and without case, marks, emoji sequences, right-to-left and control characters.
_PARTS = (
    *(" ", "  ", "   ", "\t", "\n", "\r", "\r\n", "\n\n", "\x0b", "\x0c", "\x1c", "\x85", "\xa0", "\u1680"),
    *("\u2003", "\u2028", "\u2029", "\u202f", "\u205f", "\u3000", "\u200b", "\u200d", "\ufeff", "\u180e"),
    *(
        "'s",
        "'T",
        "'re",
        "'VE",
        "'m",
        "'LL",
        "'d",
        "'ſ",
        "'\u212a",
        "’s",
        "'",
        '"',
        "``",
        "don't",
        "I'M",
        "'x",
    ),
    *("0", "7", "12", "123", "1234", "3.14", "1,000", "٣٤٥", "²³", "½", "Ⅷ", "五", "𝟘𝟙"),
    *(".", "...", "!?", "--", "==", "//", "/*", "*/", "#", "_", "__init__", "{}", "<|", "|>", "€", "±", "。"),
    *(
        "a",
        "A",
        "the",
        "The",
        "THE",
        "word",
        "Straße",
        "naïve",
        "ſ",
        "İ",
        "ǅ",
        "Ünï",
        "e\u0301",
        "é",
        "ﬁ",
        "Å",
        "Å",
    ),
    *(
        "русский",
        "ελληνικά",
        "हिन्दी",
        "ไทย",
        "한국어",
        "日本語",
        "中文",
        "ひらがな",
        "עברית",
        "العربية",
        "𐍈",
        "𝒜",
        "ꙮ",
    ),
    *("👩", "👩\u200d👩\u200d👧", "🏳️\u200d🌈", "🇩🇪", "👍🏽", "\ufe0f", "\u0301\u0327", "\u200f", "\u202e"),
    *("\0", "\x01", "\x1b[0m", "\x7f", "\u0600", "\ue000", "\ufffd", "\uffff", "\U0010ffff"),
    *(
        "▁",
        "Ġ",
        "Ċ",
        "<0x0A>",
        "<s>",
        "</s>",
        "<unk>",
        "<|endoftext|>",
        "<|begin_of_text|>",
        "<|im_end|>",
        "[INST]",
    ),
)
_LETTERS_AROUND = ("a", " ", "1", ".", "\n")


def hostile_texts() -> Iterator[str]:
    """Yield the same few thousand texts at each call, about 2 MB in all.

    Each of the characters of the first two planes stands in one of them, in Unicode's order: libraries bring tables of
    different versions.
    """
    yield ""
    yield from _PARTS
    yield from _runs()
    yield from _pairs(_PARTS)
    yield from _by_category()
    yield from _all_characters()
    yield from _random_texts(1500)


def vocabulary_texts(texts: Sequence[str], pairs: int = 20_000) -> Iterator[str]:
    """Yield the texts of the tokens of a vocabulary, each alone, and pseudo-random pairs of them.

    A text that is a token need not be what the merges of its bytes lead to.
    """
    yield from texts
    chance = random.Random(1)
    for _ in range(pairs):
        yield chance.choice(texts) + chance.choice(texts)


def _runs() -> Iterator[str]:
    """Long runs of one character, alone and with something before and after them."""
    for character in (
        " ",
        "\n",
        "\t",
        "\r\n",
        "a",
        "A",
        "0",
        "!",
        "'",
        "=",
        "é",
        "日",
        "\u0301",
        "👍",
        "\xa0",
        "\0",
    ):
        for length in (2, 3, 4, 7, 16, 17, 63, 64, 65, 255, 4097):
            yield character * length
            yield f"x{character * length}y"
            yield f"1 {character * length}\n{character * length} 'll"


def _pairs(parts: Sequence[str]) -> Iterator[str]:
    """All pairs of parts, one text for each first part."""
    for first in parts:
        yield " ".join(first + second for second in parts)
        yield "".join(first + second for second in parts)


def _by_category() -> Iterator[str]:
    """Characters of each general category, composed and decomposed, within what splits look at."""
    found: dict[str, list[str]] = defaultdict(list)
    for code in range(sys.maxunicode + 1):
        character = chr(code)
        category = unicodedata.category(character)
        if category != "Cs":
            found[category].append(character)
    chance = random.Random(2)
    for characters in found.values():
        some = [characters[0], characters[-1], *(chance.choice(characters) for _ in range(30))]
        for form in ("NFC", "NFD"):
            text = unicodedata.normalize(form, "".join(some))
            yield text
            for around in _LETTERS_AROUND:
                yield around.join(text)


def _all_characters() -> Iterator[str]:
    for start in range(0, 0x20000, 256):
        characters = [chr(code) for code in range(start, start + 256) if not 0xD800 <= code < 0xE000]
        yield "".join(characters)
        yield "".join(f" {character}a" for character in characters)


def _random_texts(count: int) -> Iterator[str]:
    chance = random.Random(3)
    for _ in range(count):
        yield "".join(chance.choice(_PARTS) for _ in range(chance.randint(1, 40)))
