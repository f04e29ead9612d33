"""FineWeb's rules against lists and menus: Penedo et al. 2024, https://arxiv.org/abs/2406.17557."""

from __future__ import annotations

from llama_ray.data.cleaning.characters import TERMINAL
from llama_ray.data.cleaning.filters.reading import PASSED, Reading, Verdict, repeated, too_little, too_much


def fineweb(reading: Reading) -> Verdict:
    """Say whether the lines of a text end like sentences, are long, and are not repeated."""
    text = reading.text
    lines = [line for line in text.split("\n") if line.strip()]
    ended = sum(line.endswith(TERMINAL) for line in lines) / len(lines)
    short = sum(len(line) <= 30 for line in lines) / len(lines)
    return (
        too_little("line_punct_ratio", ended, 0.12, "of the lines end with punctuation")
        or too_much("short_line_ratio", short, 0.67, "of the lines are of at most 30 characters")
        or _repetition(text, lines)
        or too_much("list_ratio", text.count("\n") / len(reading.words), 0.3, "ends of lines a word")
        or PASSED
    )


def _repetition(text: str, lines: list[str]) -> Verdict | None:
    share = repeated(lines)[1] / (len(text) - text.count("\n"))
    return too_much("char_dup_ratio", share, 0.01, "of the characters are in repeated lines")
