"""What each character is for words and sentences: a table of flags over all of Unicode."""

from __future__ import annotations

import unicodedata
from functools import cache

import numpy as np
from numpy.typing import NDArray

SPACE, CORE, EDGE, SPLIT, APOSTROPHE, RUN, ALPHABETIC, CONTENT = (1 << bit for bit in range(8))
"""White space; what stays in a word wherever it is; what leaves a word at its ends; what divides a word between two
letters; what begins a word there; what is one word with its like; letters in the sense of `str.isalpha`; what is
neither punctuation nor a control character."""

_CODES = 0x110000
_MARKS = {"Mn", "Mc", "Me"}
# Each ideograph and each hiragana is a word, as in UAX #29: CJK and its extensions, compatibility ideographs.
_ALONE = "3005-3007 3041-309f 3400-4dbf 4e00-9fff f900-faff 20000-2fa1f 30000-323af"
# The characters that datatrove 0.10 takes for punctuation (`utils/text.py`), of which the second line is Unicode's
# property Sentence_Terminal.
_PUNCTUATION = (
    "0-8 b-1f 21-2f 3a-40 5b-60 7b-9f ab b4 bb 2013-2014 2019 201c-201e 2026 2236 2501 25ba 3001-3002 3008-300d "
    "3010-3011 ff01 ff05 ff08-ff09 ff0c ff0e ff11 ff1a-ff1b ff1f ff5e"
)
_TERMINAL = (
    "21 2e 3f 589 61d-61f 6d4 700-702 7f9 837 839 83d-83e 964-965 104a-104b 1362 1367-1368 166e 1735-1736 17d4-17d6 "
    "17d9-17da 1803 1809 1944-1945 1aa8-1aab 1b5a-1b5b 1b5e-1b5f 1b7d-1b7e 1c3b-1c3c 1c7e-1c7f 203c-203d 2047-2049 "
    "2e2e 2e3c 2e53-2e54 3002 a4ff a60e-a60f a6f3 a6f7 a876-a877 a8ce-a8cf a92f a9c8-a9c9 aa5d-aa5f aaf0-aaf1 abeb "
    "fe52 fe56-fe57 ff01 ff0e ff1f ff61 10a56-10a57 10f55-10f59 10f86-10f89 11047-11048 110be-110c1 11141-11143 "
    "111c5-111c6 111cd 111de-111df 11238-11239 1123b-1123c 112a9 1144b-1144c 115c2-115c3 115c9-115d7 11641-11642 "
    "1173c-1173e 11944 11946 11a42-11a43 11a9b-11a9c 11c41-11c42 11ef7-11ef8 11f43-11f44 16a6e-16a6f 16af5 "
    "16b37-16b38 16b44 16e98 1bc9f 1da88"
)


def _codes(ranges: str) -> list[int]:
    """Return the code points of `ranges`, such as '21-2f 3a': hexadecimal, both ends included."""
    ends = [(part.split("-")[0], part.split("-")[-1]) for part in ranges.split()]
    return [code for first, last in ends for code in range(int(first, 16), int(last, 16) + 1)]


TERMINAL = tuple(map(chr, _codes(_TERMINAL)))
"""Characters that end a sentence, in any script."""


@cache
def flags() -> NDArray[np.uint8]:
    """Return the flags of each code point, [0x110000]."""
    characters = np.arange(_CODES, dtype=np.uint32).view("U1")
    core = np.strings.isalnum(characters)
    core[list(marks())] = True
    core[_ordinals("_/\\|^~-+@")] = True
    table = np.where(core, np.uint8(CORE), np.uint8(EDGE))
    table[_codes(_ALONE)] = 0
    table[np.strings.isspace(characters)] = SPACE
    table[np.strings.isalpha(characters)] |= ALPHABETIC
    table[~_punctuation()] |= CONTENT
    for role, members in ((SPLIT, "-/,:<>="), (APOSTROPHE, "'\u2019"), (RUN, ".")):
        table[_ordinals(members)] |= role
    return table


@cache
def plain_flags() -> NDArray[np.uint8]:
    """Return the flags of each code point where punctuation and control characters count as white space."""
    table = flags().copy()
    table[_punctuation()] = SPACE
    return table


def _punctuation() -> NDArray[np.bool_]:
    punctuation = np.zeros(_CODES, np.bool_)
    punctuation[_codes(_PUNCTUATION) + _codes(_TERMINAL)] = True
    return punctuation


def _ordinals(characters: str) -> list[int]:
    return [ord(character) for character in characters]


@cache
def marks() -> tuple[int, ...]:
    """Return the code points of combining marks."""
    return tuple(code for code in range(_CODES) if unicodedata.category(chr(code)) in _MARKS)


def nonspacing_marks() -> tuple[int, ...]:
    """Return the code points of combining marks that take no space, such as accents."""
    return tuple(code for code in marks() if unicodedata.category(chr(code)) == "Mn")
