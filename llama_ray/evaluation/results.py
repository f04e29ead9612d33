"""What an evaluation finds, and which scores may be compared."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field

from llama_ray.utils.errors import UserError
from llama_ray.utils.typed_json import from_json

Setting = str | int | float | bool | None

_COMPUTED_WITH = ("dtype", "quantization", "max_seq_len")
"""Settings that change the numbers of one and the same model."""


class EvaluationError(UserError):
    """An evaluation that cannot be made, continued or read."""


@dataclass(frozen=True)
class Score:
    """What a model reached in one metric of one task.

    Args:
        task: The name of the task, text or data.
        metric: `bits_per_byte`, `perplexity`, `acc` and the like; with a filter of lm-eval other than `none`, after a
            comma: `exact_match,strict-match`.
        value: A finite number.
        stderr: The standard error of `value`; None where the metric has none.
        samples: Documents that `value` is made from.
        higher_is_better: How to rank two values.
        fingerprint: A digest of everything but the model that determined `value`: the documents, how they are
            presented, the context that each token sees.
        values: What each document adds, in an order that `fingerprint` determines: `value` is their sum, divided by
            that of `weights`. Two models are compared document by document where both are known; empty where not.
        weights: What each document counts, such as its bytes; empty if all count the same: one.
    """

    task: str
    metric: str
    value: float
    stderr: float | None
    samples: int
    higher_is_better: bool
    fingerprint: str
    values: tuple[float, ...] = ()
    weights: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        for name in ("value", "stderr"):
            number = getattr(self, name)
            if number is not None and not math.isfinite(number):
                raise EvaluationError(
                    f"{name} of {self.metric} of {self.task} is {number}; it must be finite; the model's numbers "
                    "overflow, or it gives a token no probability at all"
                )

    @property
    def name(self) -> str:
        """`task/metric`, unique in an evaluation."""
        return f"{self.task}/{self.metric}"

    def comparable_to(self, other: Score) -> bool:
        """Whether a difference between both can only come from the models."""
        return self.name == other.name and self.fingerprint == other.fingerprint

    def better_than(self, other: Score) -> bool:
        """Whether this value ranks before that of `other`; equal values do not."""
        return self.value > other.value if self.higher_is_better else self.value < other.value


@dataclass(frozen=True)
class Evaluation:
    """All scores of one model.

    Args:
        model: The reference that was evaluated, fixed: `models:/NAME/3` rather than an alias.
        scores: In the order in which they were asked for; each `Score.name` once.
        seconds: What the evaluation took, of wall-clock time, with the model loaded.
        settings: What else describes how it was made, for people, and how the model was computed (`computed_like`).
    """

    model: str
    scores: tuple[Score, ...]
    seconds: float
    settings: dict[str, Setting] = field(default_factory=dict)

    def __post_init__(self) -> None:
        names = [score.name for score in self.scores]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise EvaluationError(
                f"the score {twice} is there twice; give each task, text and data another name"
            )

    @property
    def settings_fingerprint(self) -> str:
        """A digest of what was asked: evaluations with the same one have the same scores, all of them comparable."""
        return fingerprint(sorted([score.name, score.fingerprint] for score in self.scores))

    def computed_like(self, other: Evaluation) -> bool:
        """Whether both models were computed in the same way: neither alone was rounded or had a shorter context."""
        return all(self.settings.get(name) == other.settings.get(name) for name in _COMPUTED_WITH)

    def score(self, name: str) -> Score | None:
        """Return the score named `task/metric`, or None."""
        return next((score for score in self.scores if score.name == name), None)

    def to_json(self) -> str:
        """Return the whole evaluation as JSON of several lines."""
        return json.dumps(asdict(self), indent=2, ensure_ascii=False, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Evaluation:
        """Return the evaluation that `to_json` wrote. Raises EvaluationError for any other text."""
        try:
            return from_json(cls, json.loads(text))
        except ValueError as error:
            raise EvaluationError(f"this is no evaluation that can be read: {error}") from error


def fingerprint(value: object) -> str:
    """Return a digest of what JSON can hold; the order of keys does not matter."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def comparable(evaluations: Iterable[Evaluation]) -> list[str]:
    """Return the names of the scores that all `evaluations` have, each of them comparable; in order of the first."""
    first, *others = evaluations
    return [
        score.name
        for score in first.scores
        if all((found := other.score(score.name)) and found.comparable_to(score) for other in others)
    ]
