"""All that is done to one text: its normal form, its language, the filters, what it shares with evaluations."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from llama_ray.data.cleaning.config import CleanConfig
from llama_ray.data.cleaning.contamination import Contamination
from llama_ray.data.cleaning.drops import Drop
from llama_ray.data.cleaning.excerpts import rank
from llama_ray.data.cleaning.filters.named import FILTERS
from llama_ray.data.cleaning.filters.reading import Reading
from llama_ray.data.cleaning.fold import in_form
from llama_ray.data.cleaning.language import check_languages, identify


class Cleaned(NamedTuple):
    """A text as the dataset takes it, or None; what the rules took away from it; its language.

    The language is asked for where the configuration takes some languages only, else for one text in 32.

    If a text is dropped, the only drop is that of the text.
    """

    text: str | None
    drops: tuple[Drop, ...] = ()
    language: str = ""


class Cleaner:
    """Applies a configuration to one text at a time; make one for each process.

    `evaluations` is what `write_evaluations` wrote for `config.decontaminate`. Raises ValueError for a language that is
    not known.
    """

    def __init__(self, config: CleanConfig, evaluations: Path | None = None) -> None:
        check_languages(config.language)
        self._config = config
        self._contamination = evaluations and Contamination(evaluations, config.decontaminate_words)

    def __call__(self, text: str) -> Cleaned:
        """Return `text` as the dataset takes it."""
        text = in_form(text, self._config.unicode)
        language, probability = identify(text) if self._config.language or _in_sample(text) else ("", 0.0)
        if self._config.language and not (
            language in self._config.language and probability >= self._config.language_threshold
        ):
            return _dropped("language", text, f"{language} with probability {probability:.2f}", language)
        if self._config.clean and not text.strip():
            return _dropped("empty", text, "nothing but white space", language)
        cleaned = self._filter(text, language)
        return cleaned if cleaned.text is None else self._decontaminated(cleaned, cleaned.text)

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

    def _decontaminated(self, cleaned: Cleaned, text: str) -> Cleaned:
        shared = self._contamination.find(text) if self._contamination else None
        if shared is None:
            return cleaned
        name = Path(self._config.decontaminate[shared.file]).name
        return _dropped("contaminated", text, f"{name} has it, too: {shared.run}", cleaned.language)


def _in_sample(text: str) -> bool:
    """Say whether the language of a text is asked for only to report it, which is done for one text in 32."""
    return rank(text[:256]) % 32 == 0


def _dropped(rule: str, text: str, detail: str, language: str) -> Cleaned:
    return Cleaned(None, (Drop(rule, "text", 1, len(text), text, detail),), language)
