"""Which language a text is in, by py3langid."""

from __future__ import annotations

from collections.abc import Collection
from functools import cache
from typing import Protocol

from llama_ray.utils.fields import shown

_CHARACTERS = 1000
"""Only the beginning of a text is looked at: enough to be certain, and a tenth of a second for each megabyte."""
NONE = "zxx"
"""The code for text without language, such as tables of numbers."""


class _Identifier(Protocol):
    @property
    def labels(self) -> list[str]: ...
    def classify(self, text: str) -> tuple[str, float]: ...


def identify(text: str) -> tuple[str, float]:
    """Return the ISO 639 code of the language of `text` and its probability."""
    return _identifier().classify(text[:_CHARACTERS])


def check_languages(codes: Collection[str]) -> None:
    """Raise ValueError for a code that py3langid does not know."""
    known = _identifier().labels if codes else []
    for code in codes:
        if code not in known:
            raise ValueError(
                f"language is {shown(code)}; it must be a code of ISO 639 that py3langid knows: "
                f"{', '.join(sorted(known))}"
            )


@cache
def _identifier() -> _Identifier:
    # To load the model takes most of a second.
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    identifier: _Identifier = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
    return identifier
