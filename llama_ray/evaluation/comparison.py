"""Models side by side: which differences are larger than chance, document by document where these are known."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from llama_ray.evaluation.results import Evaluation, EvaluationError, Score, comparable
from llama_ray.utils.redact import redact

CONFIDENCE = 0.95
_LEAST_DOCUMENTS = 6
"""Of fewer, all favour the same one of two equal models in more than 5 % of cases."""


@dataclass(frozen=True)
class Difference:
    """One score minus another, and half the width of its confidence interval; None where that is not known."""

    value: float
    margin: float | None
    paired: bool
    """Whether it was computed document by document, which cancels how hard the documents are."""

    @property
    def is_significant(self) -> bool:
        """Whether the confidence interval leaves out zero."""
        return self.margin is not None and abs(self.value) > self.margin


@dataclass(frozen=True)
class Row:
    """One score of all models, in their order; `best` is the index of one that is better than each other.

    That is, by more than chance; it is None where no model is.
    """

    scores: tuple[Score, ...]
    best: int | None

    @property
    def name(self) -> str:
        """`task/metric`."""
        return self.scores[0].name

    @property
    def direction(self) -> str:
        """An arrow to where better scores are."""
        return "↑" if self.scores[0].higher_is_better else "↓"


@dataclass(frozen=True)
class Comparison:
    """The scores that several models have in common, by rows. `labels` are short names, each another."""

    labels: tuple[str, ...]
    rows: tuple[Row, ...]
    left_out: tuple[str, ...] = ()
    """Names of scores that were not made for all models in the same way."""

    def markdown(self) -> str:
        """Return the table in Markdown, with the best of a row in bold."""
        head, *body = self._cells("**{}**")
        rows = [head, ["---"] * len(head), *body]
        return "\n".join(f"| {' | '.join(row)} |" for row in rows) + f"\n\n{self._note('bold')}\n"

    def text(self) -> str:
        """Return the table for a terminal, with a star after the best of a row."""
        cells = self._cells("{} *")
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in cells
        ]
        return "\n".join([*map(str.rstrip, lines), "", self._note("*")])

    def columns(self) -> dict[str, list[object]]:
        """Return the numbers as a table of MLflow: a row for each score and model."""
        found: dict[str, list[object]] = {
            name: [] for name in ("task", "metric", "model", "score", "margin", "best", "samples")
        }
        for row in self.rows:
            for number, (label, score) in enumerate(zip(self.labels, row.scores, strict=True)):
                values = (score.task, score.metric, label, score.value, margin(score), number == row.best)
                for column, value in zip(found.values(), (*values, score.samples), strict=True):
                    column.append(value)
        return found

    def _cells(self, best: str) -> list[list[str]]:
        pairs = len(self.labels) == 2
        cells = [["score", *self.labels, *(["difference"] if pairs else [])]]
        for row in self.rows:
            values = [_with_margin(score.value, margin(score)) for score in row.scores]
            if row.best is not None:
                values[row.best] = best.format(values[row.best])
            cells.append([f"{row.name} {row.direction}", *values])
            if pairs:
                found = difference(row.scores[1], row.scores[0])
                cells[-1].append(_with_margin(found.value, found.margin, sign="+"))
        return cells

    def _note(self, mark: str) -> str:
        paired = any(difference(row.scores[0], other).paired for row in self.rows for other in row.scores[1:])
        by_document = ", document by document where the same ones were scored" if paired else ""
        note = (
            f"± is half of the {CONFIDENCE:.0%} confidence interval; {mark} is better than each other model at that "
            f"level{by_document}"
        )
        if self.left_out:
            note += f"; not compared, because not made in the same way for all: {', '.join(self.left_out)}"
        return note


def compare(evaluations: Sequence[Evaluation]) -> Comparison:
    """Put the scores side by side that all `evaluations` have, made in the same way from the same documents.

    Raises EvaluationError if there is none.
    """
    models = [evaluation.model for evaluation in evaluations]
    names = comparable(evaluations)
    if not names:
        raise EvaluationError(
            f"{' and '.join(models)} have no score that was made in the same way from the same documents; evaluate "
            "them in one call"
        )
    rows = []
    for name in names:
        scores = tuple(score for evaluation in evaluations if (score := evaluation.score(name)))
        rows.append(Row(scores, _best(scores)))
    left_out = {score.name: None for evaluation in evaluations for score in evaluation.scores}
    return Comparison(_labels(models), tuple(rows), tuple(name for name in left_out if name not in names))


def difference(score: Score, other: Score) -> Difference:
    """Return `score` minus `other`.

    With the same documents its standard error is that of the ratio of the summed differences to the summed weights
    (Cochran 1977, Sampling Techniques, section 6.4); otherwise both scores count as independent.
    """
    value = score.value - other.value
    if score.values and len(score.values) == len(other.values) and score.weights == other.weights:
        differences = np.array(score.values) - np.array(other.values)
        weights = np.array(score.weights or np.ones(len(differences)))
        deviations = differences - value * weights
        documents = len(differences)
        spread = math.sqrt(float(deviations @ deviations) * documents / max(1, documents - 1))
        return Difference(value, _half_width(spread / float(weights.sum()), documents), True)
    if score.stderr is None or other.stderr is None:
        return Difference(value, None, False)
    documents = min(score.samples, other.samples)
    return Difference(value, _half_width(math.hypot(score.stderr, other.stderr), documents), False)


def margin(score: Score) -> float | None:
    """Return half the width of the confidence interval of `score`; None where its standard error is not known."""
    return None if score.stderr is None else _half_width(score.stderr, score.samples)


def _half_width(stderr: float, documents: int) -> float | None:
    """Return `stderr` times the quantile of Student's t (Abramowitz and Stegun 1964, 26.7.5)."""
    if documents < _LEAST_DOCUMENTS:
        return None
    z, n = NormalDist().inv_cdf((1 + CONFIDENCE) / 2), documents - 1
    terms: tuple[float, ...] = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    )
    return stderr * (z + math.fsum(term / n**power for power, term in enumerate(terms, 1)))


def _best(scores: Sequence[Score]) -> int | None:
    for number, score in enumerate(scores):
        others = [other for place, other in enumerate(scores) if place != number]
        if others and all(
            score.better_than(each) and difference(score, each).is_significant for each in others
        ):
            return number
    return None


def _labels(models: Sequence[str]) -> tuple[str, ...]:
    """Return the ends of the references, as long as needed to tell all apart."""
    parts = [redact(model).removeprefix("models:/").rstrip("/").split("/") for model in models]
    for length in range(2, max(map(len, parts)) + 1):
        labels = tuple("/".join(part[-length:]) for part in parts)
        if len(set(labels)) == len(labels):
            return labels
    return tuple(f"{redact(model)} ({number})" for number, model in enumerate(models, 1))


def _with_margin(value: float, half: float | None, sign: str = "") -> str:
    return f"{value:{sign}.4f}" + ("" if half is None else f" ± {half:.4f}")
