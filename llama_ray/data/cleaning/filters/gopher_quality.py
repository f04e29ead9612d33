"""Gopher's rules of quality for English text: Rae et al. 2021, https://arxiv.org/abs/2112.11446, appendix A.1."""

from __future__ import annotations

from functools import cache

import numpy as np

from llama_ray.data.cleaning.filters.reading import PASSED, Reading, Verdict, too_little, too_much
from llama_ray.data.cleaning.words import Hashes, Words, word_hash

STOP_WORDS = ("the", "be", "to", "of", "and", "that", "have", "with")


def gopher_quality(reading: Reading) -> Verdict:
    """Say whether a text is of words that look like those of a language, in lines that look like prose."""
    return _words(reading.words) or _symbols(reading) or _stop_words(reading.words) or PASSED


def _words(words: Words) -> Verdict | None:
    content = int(words.content.sum())
    if content < 50:
        return Verdict("short_doc", f"{content} words; at least 50")
    if content > 100_000:
        return Verdict("long_doc", f"{content} words; at most 100000")
    mean = float(words.lengths[words.content].mean())
    of = "characters in the mean word"
    return too_little("below_avg_threshold", mean, 3, of) or too_much("above_avg_threshold", mean, 10, of)


def _symbols(reading: Reading) -> Verdict | None:
    text, words = reading.text, len(reading.words)
    lines = text.splitlines()
    bullets = sum([line.lstrip().startswith(("•", "-")) for line in lines])
    ellipses = text.count("...") + text.count("…")
    ended = sum([line.rstrip().endswith(("...", "…")) for line in lines]) if ellipses else 0
    return (
        too_much("too_many_hashes", text.count("#") / words, 0.1, "# a word")
        or too_much("too_many_ellipsis", ellipses / words, 0.1, "ellipses a word")
        or too_much("too_many_bullets", bullets / len(lines), 0.9, "of the lines begin with a bullet")
        or too_much("too_many_end_ellipsis", ended / len(lines), 0.3, "of the lines end with an ellipsis")
        or too_little(
            "below_alpha_threshold", reading.words.alphabetic.mean(), 0.8, "of the words have a letter"
        )
    )


def _stop_words(words: Words) -> Verdict | None:
    found = np.isin(_stop_word_hashes(), words.hashes).sum()
    if found >= 2:
        return None
    # The rule's name in datatrove.
    return Verdict("enough_stop_words", f"{found} of {', '.join(STOP_WORDS)}; at least 2")


@cache
def _stop_word_hashes() -> Hashes:
    return np.array([word_hash(word) for word in STOP_WORDS], np.uint64)
