"""All that is done to one text: its normal form, its language, the filters, what is in an evaluation."""

from __future__ import annotations

import unicodedata
from typing import Final, Literal, NamedTuple

from llama_ray.data.cleaning.config import CleanConfig
from llama_ray.data.cleaning.drops import Drop

_FORMS: Final[dict[str, Literal["NFC", "NFKC"]]] = {"nfc": "NFC", "nfkc": "NFKC"}


class Cleaned(NamedTuple):
    """A text as the dataset takes it, or None; what the rules took away from it; its language, if it was asked for."""

    text: str | None
    drops: tuple[Drop, ...] = ()
    language: str = ""


class Cleaner:
    """Applies a configuration to one text at a time; make one for each process."""

    def __init__(self, config: CleanConfig) -> None:
        self._config = config

    def __call__(self, text: str) -> Cleaned:
        """Return `text` as the dataset takes it."""
        if form := _FORMS.get(self._config.unicode):
            text = unicodedata.normalize(form, text)
        return Cleaned(text)
