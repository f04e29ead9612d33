"""Texts that repeat an evaluation: they share a run of words with it, once both are folded.

This is the method of GPT-3 (Brown et al. 2020, https://arxiv.org/abs/2005.14165, appendix C), whose runs are of 13
words, but that the whole text is dropped.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from llama_ray.data.cleaning.fold import Form, folded_words, in_form
from llama_ray.data.cleaning.words import Hashes, ngram_hashes
from llama_ray.storage.atomic import replacing
from llama_ray.utils.errors import UserError, printable

_RECORDS = (".jsonl", ".ndjson")


@dataclass(frozen=True)
class Evaluations:
    """What files of evaluations hold: texts, different runs of words in them, and texts of too few words for one."""

    texts: int
    runs: int
    too_short: int

    def line(self) -> str:
        """Return a line for the log."""
        line = f"evaluations: {self.runs:,} runs of words of {self.texts:,} texts"
        if self.too_short:
            line += (
                f", and {self.too_short:,} of fewer words, which are not looked for (--decontaminate_words)"
            )
        return line


class Shared(NamedTuple):
    """A run of words that a text shares with an evaluation, folded, and the place of its file in the configuration."""

    run: str
    file: int


def write_evaluations(files: Sequence[str], words: int, output: Path, form: Form = "none") -> Evaluations:
    """Write the hashes of all runs of so many `words` in `files`, sorted, with the number of the file: [2, runs].

    A line of JSON is one text, made of all texts in it; another file is one text. `form` is the normal form of the
    texts in which they are looked for. Raises UserError for a file that cannot be read, or that has no run.
    """
    hashes: list[Hashes] = []
    numbers: list[Hashes] = []
    texts = too_short = 0
    for number, file in enumerate(files):
        runs = [ngram_hashes(folded_words(in_form(text, form))[1].hashes, words) for text in _texts(file)]
        found = np.unique(np.concatenate([np.zeros(0, np.uint64), *runs]))
        if not len(found):
            raise UserError(
                f"decontaminate names {printable(file)}, in which no text has {words} words; give texts or JSONL, or "
                "smaller decontaminate_words"
            )
        short = sum(not len(run) for run in runs)
        texts, too_short = texts + len(runs) - short, too_short + short
        hashes.append(found)
        numbers.append(np.full(len(found), number, np.uint64))
    # Of a run in several files the first one is kept.
    unique, first = np.unique(np.concatenate(hashes), return_index=True)
    with replacing(output) as stream:
        np.save(stream, np.stack([unique, np.concatenate(numbers)[first]]))
    return Evaluations(texts, len(unique), too_short)


class Contamination:
    """Finds what texts share with evaluations; the file of `write_evaluations` is mapped into memory."""

    def __init__(self, path: Path, words: int) -> None:
        self._runs, self._files = np.load(path, mmap_mode="r")
        self._words = words

    def find(self, text: str) -> Shared | None:
        """Return the first run of words that `text` shares with an evaluation."""
        folded, words = folded_words(text)
        runs = ngram_hashes(words.hashes, self._words)
        places = np.minimum(np.searchsorted(self._runs, runs), len(self._runs) - 1)
        shared = np.flatnonzero(self._runs[places] == runs)
        if not len(shared):
            return None
        first = int(shared[0])
        run = slice(first, first + self._words)
        spans = zip(words.starts[run], words.lengths[run], strict=True)
        return Shared(
            " ".join(folded[start : start + length] for start, length in spans),
            int(self._files[places[first]]),
        )


def _texts(file: str) -> Iterator[str]:
    try:
        content = Path(file).read_text("utf-8-sig")
        if not file.endswith(_RECORDS):
            yield content
            return
        for line in content.split("\n"):
            if line.strip():
                yield "\n".join(_strings(json.loads(line)))
    except (OSError, ValueError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else "neither text in UTF-8 nor JSONL"
        raise UserError(f"decontaminate names {printable(file)}, which cannot be read: {reason}") from error


def _strings(value: object) -> Iterator[str]:
    """Yield all texts in a value of JSON."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _strings(item)
