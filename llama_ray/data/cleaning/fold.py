"""The form in which texts are compared: what does not count is taken away."""

from __future__ import annotations

import re
import sys
import unicodedata
from functools import cache
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray

from llama_ray.data.cleaning.characters import nonspacing_marks
from llama_ray.data.cleaning.words import Words, find_words

_NUMBER = re.compile(r"\d+(?:[.,\u060c\u066b\u2396\u2397\u2398]\d+)?")


_FORMS: Final[dict[str, Literal["NFC", "NFKC"]]] = {"nfc": "NFC", "nfkc": "NFKC"}

Form = Literal["none", "nfc", "nfkc"]
"""A normal form of Unicode, or the text as it is."""


def in_form(text: str, form: Form) -> str:
    """Return `text` in a normal form."""
    return text if form == "none" else unicodedata.normalize(_FORMS[form], text)


def fold(text: str) -> str:
    """Return `text` in lower case, with each number as 0 and without accents: datatrove's `simplify_text`.

    Punctuation and white space stay; `folded_words` takes both for white space.
    """
    text = _NUMBER.sub("0", text.lower())
    return text if text.isascii() else _without_marks(unicodedata.normalize("NFD", text))


def folded_words(text: str) -> tuple[str, Words]:
    """Return the folded text, and its words without punctuation."""
    text = fold(text)
    return text, find_words(text, punctuation=False)


def _without_marks(text: str) -> str:
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")
    marks = _marks().take(codes)
    if not marks.any():
        return text
    return codes[~marks].tobytes().decode("utf-32-le", "surrogatepass")


@cache
def _marks() -> NDArray[np.bool_]:
    table = np.zeros(sys.maxunicode + 1, np.bool_)
    table[list(nonspacing_marks())] = True
    return table
