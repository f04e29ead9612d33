"""C4's rules for lines and pages of English: Raffel et al. 2020, https://jmlr.org/papers/v21/20-074.html, section 2.2.

These take lines out of a text, and drop the text where few sentences remain. The list of bad words is left out, as in
datatrove and FineWeb.
"""

from __future__ import annotations

import re

from llama_ray.data.cleaning.drops import Drop
from llama_ray.data.cleaning.filters.reading import Reading, Verdict

CITATION = re.compile(r"\[\d*]|\[edit]|\[citation needed]")
END = (".", "?", "!", '"', "'")
POLICY = ("terms of use", "privacy policy", "cookie policy", "uses cookies", "use of cookies", "use cookies")
_LEAST_SENTENCES, _LEAST_WORDS, _LONGEST_WORD = 5, 3, 1000
# A full stop ends no sentence after a single letter, an abbreviation or another full stop. What follows is taken at
# once and never given back, so that no text takes long.
_SENTENCE_END = re.compile(
    r"(?:(?<!\.)(?<!\b[A-Za-z])(?<!\b(?:Mr|Ms|Dr|St|vs))(?<!\b(?:Mrs|etc|Gen|Rev))\.|[!?。！？])[\"'”’)\]]*+\s++\W*+"
)


def c4(reading: Reading) -> Verdict:
    """Take lines out of a text that look like no prose, and say whether enough remains."""
    return _judge(reading.text, terminal_punctuation=True)


def fineweb_c4(reading: Reading) -> Verdict:
    """Apply the rules of C4 without that of terminal punctuation, as FineWeb does (https://arxiv.org/abs/2406.17557)."""
    return _judge(reading.text, terminal_punctuation=False)


def _judge(text: str, terminal_punctuation: bool) -> Verdict:
    kept: list[str] = []
    lost: dict[str, list[str]] = {}
    sentences = 0
    for line in text.splitlines():
        stripped = line.strip()
        plain = CITATION.sub("", stripped) if "[" in stripped else stripped
        rule = _line_rule(stripped, plain, terminal_punctuation)
        if rule in _PAGE_RULES:
            return Verdict(rule, plain)
        if rule:
            lost.setdefault(rule, []).append(line)
            continue
        kept.append(plain)
        if sentences < _LEAST_SENTENCES:
            sentences += count_sentences(plain)
    if sentences < _LEAST_SENTENCES:
        return Verdict("too_few_sentences", f"{sentences} sentences; at least {_LEAST_SENTENCES}")
    lines = (Drop(rule, "line", len(some), sum(map(len, some)), some[0]) for rule, some in lost.items())
    return Verdict(text="\n".join(kept).strip(), lines=tuple(lines))


_PAGE_RULES = ("lorem_ipsum", "curly_bracket")
"""Rules that drop the whole text for one line."""


def _line_rule(line: str, plain: str, terminal_punctuation: bool) -> str:
    """Return the rule that a line breaks, or an empty text; `plain` is the line without citations."""
    if len(line) > _LONGEST_WORD and any(len(word) > _LONGEST_WORD for word in line.split()):
        return "too_long_word"
    if terminal_punctuation and (not plain.endswith(END) or plain.endswith("...")):
        return "no_terminal_punc"
    if len(line.split(None, _LEAST_WORDS)) < _LEAST_WORDS:
        return "too_few_words"
    lower = plain.lower()
    if "lorem ipsum" in lower:
        return "lorem_ipsum"
    if "javascript" in lower:
        return "javascript"
    if "{" in plain:
        return "curly_bracket"
    return "policy" if any(phrase in lower for phrase in POLICY) else ""


def count_sentences(line: str) -> int:
    """Return the number of sentences in a line."""
    end = len(line)
    while end and not line[end - 1].isalnum():
        end -= 1
    return 1 + sum(1 for _ in _SENTENCE_END.finditer(line, 0, end))
