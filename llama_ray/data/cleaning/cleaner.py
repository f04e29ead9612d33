"""All that is done to one text: its normal form, its language, the filters, what it shares with evaluations."""

from __future__ import annotations

import unicodedata
from typing import Final, Literal, NamedTuple

from llama_ray.data.cleaning.config import CleanConfig
from llama_ray.data.cleaning.drops import Drop
from llama_ray.data.cleaning.filters.c4 import c4, fineweb_c4
from llama_ray.data.cleaning.filters.fineweb import fineweb
from llama_ray.data.cleaning.filters.gopher_quality import gopher_quality
from llama_ray.data.cleaning.filters.gopher_repetition import gopher_repetition
from llama_ray.data.cleaning.filters.reading import Filter, Reading
from llama_ray.data.cleaning.language import check_languages, identify

FILTERS: Final[dict[str, Filter]] = {
    "gopher_quality": gopher_quality,
    "gopher_repetition": gopher_repetition,
    "c4": c4,
    "fineweb_c4": fineweb_c4,
    "fineweb": fineweb,
}
_FORMS: Final[dict[str, Literal["NFC", "NFKC"]]] = {"nfc": "NFC", "nfkc": "NFKC"}


class Cleaned(NamedTuple):
    """A text as the dataset takes it, or None; what the rules took away from it; its language, if it was asked for.

    If the text is dropped, the only drop is that of the text.
    """

    text: str | None
    drops: tuple[Drop, ...] = ()
    language: str = ""


class Cleaner:
    """Applies a configuration to one text at a time; make one for each process.

    Raises ValueError for a language that is not known.
    """

    def __init__(self, config: CleanConfig) -> None:
        check_languages(config.language)
        self._config = config

    def __call__(self, text: str) -> Cleaned:
        """Return `text` as the dataset takes it."""
        if form := _FORMS.get(self._config.unicode):
            text = unicodedata.normalize(form, text)
        language = ""
        if self._config.language:
            language, probability = identify(text)
            if language not in self._config.language or probability < self._config.language_threshold:
                return _dropped("language", text, f"{language} with probability {probability:.2f}", language)
        return self._filter(text, language)

    def _filter(self, text: str, language: str) -> Cleaned:
        reading = Reading(text)
        lines: tuple[Drop, ...] = ()
        for name in self._config.clean:
            verdict = FILTERS[name](reading)
            if verdict.rule:
                return _dropped(f"{name}/{verdict.rule}", text, verdict.detail, language)
            lines += tuple(drop.under(name) for drop in verdict.lines)
            if verdict.text is not None and verdict.text != reading.text:
                reading = Reading(verdict.text)
        return Cleaned(reading.text, lines, language)


def _dropped(rule: str, text: str, detail: str, language: str) -> Cleaned:
    return Cleaned(None, (Drop(rule, "text", 1, len(text), text, detail),), language)
