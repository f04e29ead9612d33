"""What to clean texts of: the flags of `prepare_data.py`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from llama_ray.data.cleaning.filters.named import FILTERS
from llama_ray.data.cleaning.fold import Form
from llama_ray.utils.fields import check_fields, limits, shown


@dataclass(frozen=True)
class CleanConfig:
    """Which texts a dataset takes, and in which form. By default all of them, as they are.

    Args:
        clean: Filters that a text must pass, applied in this order: gopher_quality, gopher_repetition, c4, fineweb_c4
            (c4 without its rule of terminal punctuation, as FineWeb uses it) and fineweb.
        unicode: Normal form to write characters in: nfc composes them, nfkc also replaces variants such as ligatures
            and full-width letters.
        language: Codes of the languages to take, such as en and de, as py3langid recognises them.
        language_threshold: Probability that a text must have of being in one of these languages.
        dedup: exact drops texts that are equal but for white space and case; minhash also near-duplicates, by
            FineWeb's parameters. The first one of them stays.
        decontaminate: Text or JSONL files of evaluations; a text that shares a run of words with one of them is
            dropped.
        decontaminate_words: Length of such a run, in words.
    """

    clean: tuple[str, ...] = ()
    unicode: Form = "none"
    language: tuple[str, ...] = ()
    language_threshold: float = field(default=0.65, metadata=limits(0, 1))
    dedup: Literal["none", "exact", "minhash"] = "none"
    decontaminate: tuple[str, ...] = ()
    decontaminate_words: int = field(default=13, metadata=limits(5, 100))

    def __post_init__(self) -> None:
        check_fields(self)
        for name in self.clean:
            if name not in FILTERS:
                raise ValueError(f"clean is {shown(name)}; choose among {', '.join(FILTERS)}")
            if self.clean.count(name) > 1:
                raise ValueError(f"clean has {name} {self.clean.count(name)} times; name each filter once")
