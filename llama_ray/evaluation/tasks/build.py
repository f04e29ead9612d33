"""Make the data of the bundled tasks, the same ones each time: `build.py TEXTS`.

`TEXTS` is the unpacked source distribution of the package `shakespeare` 0.6; Python's library is that of the running
interpreter. README.md says what comes from where.
"""

from __future__ import annotations

import json
import random
import re
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

_DATA = Path(__file__).parent / "data"
_PLAYS = ("as_you_like_it", "hamlet", "julius_caesar", "macbeth", "tempest")
_MODULES = (
    "argparse",
    "calendar",
    "configparser",
    "csv",
    "heapq",
    "shutil",
    "statistics",
    "tarfile",
    "textwrap",
    "zipfile",
)
_CHOICES, _WORST_LENGTH = 4, 6


def _paragraphs(text: str) -> Iterator[list[str]]:
    for paragraph in re.split(r"\n\s*\n", text.replace("\r", "")):
        yield [line.strip() for line in paragraph.splitlines() if line.strip()]


def _speeches(folder: Path, play: str) -> list[list[str]]:
    """Return the lines of each speech in verse: its first line is the speaker, and lines begin with a capital."""
    text = (folder / "shksprdata" / "texts" / f"{play}_gut.txt").read_text("latin-1")
    speeches = []
    for speaker, *lines in filter(None, _paragraphs(text)):
        verse = all(line[0].isupper() or not line[0].isalpha() for line in lines)
        if len(speaker) < 30 and lines and verse and not any(c in line for line in lines for c in "[]_*"):
            speeches.append(lines)
    return speeches


def _choice(
    rng: random.Random, context: Sequence[str], right: str, pool: Sequence[str]
) -> dict[str, Any] | None:
    """Return a question; None if `pool` has too few lines that are about as long as the right one."""
    alike = sorted(
        {
            line
            for line in pool
            if abs(len(line) - len(right)) <= _WORST_LENGTH and line not in (right, *context)
        }
    )
    if len(alike) < _CHOICES - 1:
        return None
    choices = [right, *rng.sample(alike, _CHOICES - 1)]
    rng.shuffle(choices)
    return {"context": "\n".join(context), "choices": choices, "answer": choices.index(right)}


def _verse(folder: Path, rng: random.Random) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    questions, copies = [], []
    for play in _PLAYS:
        speeches = _speeches(folder, play)
        pool = [line for lines in speeches for line in lines[1:]]
        long = [lines for lines in speeches if len(lines) > 6]
        for lines in rng.sample(long, min(41, len(long))):
            start = rng.randrange(len(lines) - 5)
            if question := _choice(rng, lines[start : start + 5], lines[start + 5], pool):
                questions.append(question)
        copies += [{"line": line} for line in rng.sample([line for line in pool if 30 < len(line) < 50], 21)]
    rng.shuffle(questions)
    rng.shuffle(copies)
    return questions, copies


def _last_words(folder: Path, rng: random.Random) -> list[dict[str, Any]]:
    text = (folder / "miltondata" / "texts" / "paradise_regained_gut.txt").read_text("latin-1")
    lines = [re.sub(r"\s+\d+$", "", line).strip() for line in text.splitlines()]
    rows = []
    for start in range(20, len(lines) - 6, 9):
        passage = lines[start : start + 6]
        context, _, last = "\n".join(passage).rpartition(" ")
        word = last.rstrip(".,;:!?")
        if all(len(line) > 20 for line in passage) and word.isalpha() and word.islower() and len(word) > 3:
            rows.append({"context": context, "word": word})
    rng.shuffle(rows)
    return rows


def _sonnets(folder: Path) -> list[dict[str, Any]]:
    text = (folder / "shksprdata" / "texts" / "sonnets_gut.txt").read_text("latin-1")
    poems = [lines for lines in _paragraphs(text) if len(lines) == 14]
    return [{"text": "\n".join(lines) + "\n"} for lines in poems[::3]]


def _python(rng: random.Random) -> list[dict[str, Any]]:
    rows = []
    for module in _MODULES:
        text = (Path(sysconfig.get_path("stdlib")) / f"{module}.py").read_text("utf-8")
        lines = [line.rstrip() for line in text.splitlines() if line.strip()]
        starts = rng.sample(range(len(lines) - 9), 40)
        for start in starts:
            right = lines[start + 8]
            plain = 20 < len(right.strip()) < 70 and not right.strip().startswith("#")
            if plain and (row := _choice(rng, lines[start : start + 8], right, lines)):
                rows.append(row)
    rng.shuffle(rows)
    return rows[:205]


def main(folder: Path) -> None:
    """Write all files of `data/`."""
    rng = random.Random(0)
    questions, copies = _verse(folder, rng)
    files = {
        "verse_next_line": questions,
        "verse_copy": copies,
        "verse_last_word": _last_words(folder, rng),
        "sonnets": _sonnets(folder),
        "python_next_line": _python(rng),
    }
    _DATA.mkdir(exist_ok=True)
    for name, rows in files.items():
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (_DATA / f"{name}.jsonl").write_text(text, "utf-8")
        print(f"{name}: {len(rows)} documents, {len(text.encode()):,} bytes")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
