"""Rules such as `bits_per_byte < champion`: when a version that was evaluated becomes the champion."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable
from dataclasses import dataclass

from llama_ray.evaluation.recording import recorded
from llama_ray.evaluation.results import Evaluation, EvaluationError, Score
from llama_ray.tracking.measurements import replace_tags
from llama_ray.tracking.registry import CHAMPION, PromotionDecision, current_champion, decide_alias
from llama_ray.tracking.versions import Version
from llama_ray.utils.errors import first_line
from llama_ray.utils.fields import shown

_NUMBER = r"[0-9]*\.?[0-9]+(?:e[+-]?[0-9]+)?"
_CONDITION = re.compile(
    rf"(?P<metric>[A-Za-z_][\w./:,-]*)\s*(?P<comparison><=|>=|<|>)\s*"
    rf"(?:{CHAMPION}(?:\s*(?P<sign>[+-])\s*(?P<margin>{_NUMBER}))?|(?P<number>-?{_NUMBER}))",
    re.IGNORECASE,
)
_COMPARE: dict[str, Callable[[float, float], bool]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}
_EXAMPLE = "write METRIC < champion, METRIC >= champion - 0.01 or METRIC > 0.3, several joined by `and`"
_TAGS = "promotion."
_CHANGED = PromotionDecision(False, f"another version became {CHAMPION} while the one before was evaluated")


@dataclass(frozen=True)
class Condition:
    """One comparison: of a metric with that of the champion plus `number`, or with `number` alone."""

    metric: str
    comparison: str
    to_champion: bool
    number: float

    def check(self, new: Evaluation, champion: Evaluation | None) -> tuple[bool, str]:
        """Return whether it holds, and the numbers in words; without a champion, what compares to it holds.

        Raises EvaluationError if there is no such score, or none of the champion that compares.
        """
        score = find_score(new, self.metric)
        is_value = f"{score.name} {score.value:.4f}"
        if not self.to_champion:
            return self._compare(score.value, 0.0), f"{is_value} {self.comparison} {self.number:g}"
        if champion is None:
            return math.isfinite(score.value), f"{is_value}, and there is no {CHAMPION} yet"
        against = champion.score(score.name)
        if against is None or not score.comparable_to(against):
            raise EvaluationError(f"{score.name} of {champion.model} was not measured in the same way")
        margin = f" {'+' if self.number > 0 else '-'} {abs(self.number):g}" if self.number else ""
        words = f"{is_value} {self.comparison} {against.value:.4f} of the {CHAMPION}{margin}"
        return self._compare(score.value, against.value), words

    def _compare(self, value: float, base: float) -> bool:
        # Any comparison with NaN is false.
        return _COMPARE[self.comparison](value, base + self.number)


@dataclass(frozen=True)
class Rule:
    """Conditions that must all hold for a version to become the champion."""

    text: str
    conditions: tuple[Condition, ...]

    @classmethod
    def parse(cls, text: str) -> Rule:
        """Read a rule: `METRIC <|<=|>|>= champion [+|- NUMBER]` or `... NUMBER`, several joined by `and`.

        METRIC is `TASK/METRIC`; the metric alone is that of the first text or task that has it. Raises
        EvaluationError for anything else.
        """
        conditions = []
        for part in re.split(r"\s+and\s+", text.strip()):
            match = _CONDITION.fullmatch(part.strip())
            if match is None:
                raise EvaluationError(
                    f"promote_if is {shown(text)}; {shown(part)} is no condition; {_EXAMPLE}"
                )
            number = float(match["number"] or f"{match['sign'] or ''}{match['margin'] or 0}")
            conditions.append(
                Condition(match["metric"], match["comparison"], match["number"] is None, number)
            )
        return cls(text.strip(), tuple(conditions))

    @property
    def needs_champion(self) -> bool:
        """Whether the champion must be evaluated, too."""
        return any(condition.to_champion for condition in self.conditions)

    def can_compare(self, new: Evaluation, champion: Evaluation) -> bool:
        """Whether `champion` has all that `new` is compared with, measured in the same way."""
        wanted = [find_score(new, one.metric) for one in self.conditions if one.to_champion]
        return all((found := champion.score(one.name)) and one.comparable_to(found) for one in wanted)

    def decide(self, new: Evaluation, champion: Evaluation | None) -> PromotionDecision:
        """Return whether all conditions hold, and the numbers: of all, or of the first one that does not hold."""
        words = []
        for condition in self.conditions:
            holds, why = condition.check(new, champion)
            if not holds:
                return PromotionDecision(False, f"{self.text!r} does not hold: not {why}")
            words.append(why)
        return PromotionDecision(True, " and ".join(words))


def find_score(evaluation: Evaluation, name: str) -> Score:
    """Return the score named `task/metric`, or the first one of this metric. Raises EvaluationError."""
    if (exact := evaluation.score(name)) is not None:
        return exact
    found = next((score for score in evaluation.scores if score.metric == name), None)
    if found is None:
        names = ", ".join(score.name for score in evaluation.scores)
        raise EvaluationError(f"no score is called {shown(name)}; name one of: {names}")
    return found


def promote_if(
    rule: Rule,
    version: Version,
    new: Evaluation,
    evaluate: Callable[[Version], Evaluation],
    uri: str | None = None,
) -> PromotionDecision:
    """Move the alias `champion` to `version` if `rule` holds for its evaluation `new`; record the decision in its tags.

    Unless its last evaluation was made in the same way, the champion is evaluated with `evaluate`, as `new`
    was; if another version becomes champion meanwhile, that one is. A champion that cannot be evaluated keeps the
    alias. Raises TrackingError, and EvaluationError for a rule that names what was not measured.
    """
    for condition in rule.conditions:
        find_score(new, condition.metric)
    decision = _CHANGED
    while decision is _CHANGED:
        decision = _attempt(rule, version, new, evaluate, uri)
    outcome = "promoted" if decision.promoted else "not promoted"
    replace_tags(version, _TAGS, {"rule": rule.text, "decision": f"{outcome}: {decision.reason}"}, uri)
    return decision


def _attempt(
    rule: Rule, version: Version, new: Evaluation, evaluate: Callable[[Version], Evaluation], uri: str | None
) -> PromotionDecision:
    champion = current_champion(version.name, uri)
    measured = None
    if champion and champion.version != version.version and rule.needs_champion:
        label = f"the {CHAMPION}, version {champion.version},"
        try:
            measured = _measured_alike(rule, champion, new, evaluate, uri)
        except ValueError as error:
            return PromotionDecision(False, f"{label} cannot be evaluated ({first_line(error)})")
        if measured is None:
            return PromotionDecision(False, f"{label} was measured in another way, so that nothing compares")

    def decide(candidate: Version, holder: Version | None) -> PromotionDecision:
        if holder is not None and holder.version == candidate.version:
            return PromotionDecision(False, f"version {candidate.version} is {CHAMPION} already")
        if (holder and holder.version) != (champion and champion.version):
            return _CHANGED
        return rule.decide(new, measured)

    return decide_alias(version.name, version.version, decide, uri)


def _measured_alike(
    rule: Rule, champion: Version, new: Evaluation, evaluate: Callable[[Version], Evaluation], uri: str | None
) -> Evaluation | None:
    """Return an evaluation of `champion` that `new` compares with: its last one, or another; None if that does not."""
    last = recorded(champion, uri)
    if last is not None and last.computed_like(new) and rule.can_compare(new, last):
        return last
    again = evaluate(champion)
    return again if rule.can_compare(new, again) else None
