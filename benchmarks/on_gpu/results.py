"""Figures, kept in a file as they come, and the table of them all."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True)
class Result:
    """One figure of one part."""

    part: str
    case: str
    value: float
    unit: str
    share: float | None = None
    """Of the ceiling that `ceiling` names."""
    ceiling: str = ""
    note: str = ""

    def __str__(self) -> str:
        share = "" if self.share is None else f", {self.share:.1%} of {self.ceiling}"
        return f"{self.case}: {_number(self.value)} {self.unit}{share}" + (
            f"; {self.note}" if self.note else ""
        )


class Results:
    """The results in `directory`; `part` is the one whose figures are added."""

    def __init__(self, directory: Path, part: str = "") -> None:
        self._file, self._part = directory / "results.jsonl", part

    def add(
        self,
        case: str,
        value: float,
        unit: str,
        share: float | None = None,
        ceiling: str = "",
        note: str = "",
    ) -> None:
        """Keep a figure, and print it."""
        result = Result(self._part, case, value, unit, share, ceiling, note)
        with self._file.open("a") as stream:
            stream.write(json.dumps(asdict(result)) + "\n")
        print(result, flush=True)

    def of(self, part: str) -> list[Result]:
        """Return the latest figures of `part`, by case."""
        return [r for r in self._latest() if r.part == part]

    def value(self, part: str, case: str) -> float | None:
        """Return the latest figure of a case, or None if there is none."""
        return next((r.value for r in self.of(part) if r.case == case), None)

    def table(self, title: str) -> str:
        """Return the latest figure of every case as a Markdown table."""
        head = "| part | case | figure | of its ceiling | |\n|---|---|---|---|---|"
        rows = []
        for r in self._latest():
            share = "" if r.share is None else f"{r.share:.1%} of {r.ceiling}"
            rows.append(f"| {r.part} | {r.case} | {_number(r.value)} {r.unit} | {share} | {r.note} |")
        return "\n".join(("", title, "", head, *rows))

    def _latest(self) -> list[Result]:
        if not self._file.is_file():
            return []
        records = [Result(**json.loads(line)) for line in self._file.read_text().splitlines()]
        return list({(r.part, r.case): r for r in records}.values())


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
