from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
from mlflow import MlflowClient

from llama_ray.evaluation.promotion import Rule, promote_if
from llama_ray.evaluation.recording import record
from llama_ray.evaluation.results import Evaluation, EvaluationError
from llama_ray.tracking.registry import current_champion
from llama_ray.tracking.versions import Version, resolve_version
from tests.evaluation.helpers import add_version, evaluation

OLD = evaluation("models:/m/1", bits=1.5, accuracy=0.6)
Measure = Callable[[Version], Evaluation]


@pytest.mark.parametrize(
    ("rule", "bits", "accuracy", "holds"),
    [
        ("bits_per_byte < champion", 1.4, 0.5, True),
        ("bits_per_byte < champion", 1.5, 0.5, False),
        ("bits_per_byte<=champion", 1.5, 0.5, True),
        ("licence/bits_per_byte < champion - 0.2", 1.4, 0.5, False),
        ("bits_per_byte < champion + .2", 1.65, 0.5, True),
        ("bits_per_byte<champion-1e-1", 1.39, 0.5, True),
        ("bits_per_byte < champion and acc >= champion - 0.05", 1.4, 0.56, True),
        ("bits_per_byte < champion and acc >= champion - 0.05", 1.4, 0.54, False),
        ("acc > 0.7", 9.0, 0.71, True),
        ("acc > 0.7  and  bits_per_byte < 1.3", 1.3, 0.71, False),
    ],
)
def test_a_rule_is_what_it_says(rule: str, bits: float, accuracy: float, holds: bool) -> None:
    decision = Rule.parse(rule).decide(evaluation("models:/m/2", bits, accuracy), OLD)
    assert decision.promoted == holds
    assert "licence/bits_per_byte" in decision.reason or "next_line/acc" in decision.reason


@pytest.mark.parametrize(
    "text",
    [
        "",
        "bits_per_byte",
        "bits_per_byte < ",
        "bits_per_byte == champion",
        "bits_per_byte < champions",
        "bits_per_byte < champion * 2",
        "bits_per_byte < champion and",
        "bits_per_byte < champion or acc > 0",
        "acc < nan",
        "acc < inf",
        "__import__('os') < 1",
        "acc > 0.5\nand\nx",
    ],
)
def test_anything_else_is_no_rule(text: str) -> None:
    with pytest.raises(EvaluationError, match="is no condition; write METRIC < champion") as refused:
        Rule.parse(text)
    assert "\n" not in str(refused.value)


def test_nothing_that_is_not_a_number_is_ever_better() -> None:
    new = evaluation("models:/m/2", 1.4)
    object.__setattr__(new.scores[0], "value", math.nan)
    for rule in (
        "bits_per_byte < champion",
        "bits_per_byte >= champion",
        "bits_per_byte < 9",
        "bits_per_byte > -9",
    ):
        assert not Rule.parse(rule).decide(new, OLD).promoted
        assert not Rule.parse(rule).decide(new, None).promoted


def test_what_was_not_measured_in_the_same_way_is_not_compared() -> None:
    other = evaluation("models:/m/2", 1.4, fingerprint="b")
    with pytest.raises(EvaluationError, match="of models:/m/1 was not measured in the same way"):
        Rule.parse("bits_per_byte < champion").decide(other, OLD)
    with pytest.raises(
        EvaluationError, match="no score is called 'speed'; name one of: licence/bits_per_byte"
    ):
        Rule.parse("speed < 1").decide(other, OLD)


def test_a_metric_alone_is_that_of_the_first_text_or_task() -> None:
    one = evaluation("models:/m/2", 1.4)
    two = replace(one, scores=(*one.scores, replace(one.scores[0], task="poem", value=9.0)))
    assert Rule.parse("bits_per_byte < 1.5").decide(two, None).promoted
    assert not Rule.parse("poem/bits_per_byte < 1.5").decide(two, None).promoted


def never(version: Version) -> Evaluation:
    raise AssertionError(f"{version.uri} need not be evaluated")


def test_the_alias_moves_when_the_rule_holds_and_the_version_says_why(store: str) -> None:
    rule = Rule.parse("bits_per_byte < champion")

    def attempt(bits: float, evaluate: Measure = never) -> tuple[bool, str]:
        version = add_version(store, "ruled")
        new = evaluation(version.uri, bits)
        record(new, uri=store)
        decision = promote_if(rule, version, new, evaluate, store)
        champion = current_champion("ruled", store)
        assert decision.promoted == (champion is not None and champion.version == version.version)
        tags = resolve_version(version.uri, store).tags
        assert tags["promotion.rule"] == rule.text
        assert tags["evaluation.bits_per_byte"] == str(bits)
        return decision.promoted, tags["promotion.decision"]

    assert attempt(1.5) == (
        True,
        "promoted: licence/bits_per_byte 1.5000, and there is no champion yet",
    )
    assert attempt(1.5) == (
        False,
        "not promoted: 'bits_per_byte < champion' does not hold: not "
        "licence/bits_per_byte 1.5000 < 1.5000 of the champion",
    )
    assert attempt(1.25) == (True, "promoted: licence/bits_per_byte 1.2500 < 1.5000 of the champion")
    measured: list[str] = []

    def measure(version: Version) -> Evaluation:
        measured.append(version.uri)
        return evaluation(version.uri, 1.25)

    # A champion that was evaluated in another way, or computed in another one, is evaluated again.
    of_other_texts = evaluation("models:/ruled/3", 9.0, fingerprint="b")
    of_rounded_weights = evaluation("models:/ruled/3", 9.0)
    of_rounded_weights.settings["quantization"] = "int4"
    for other in (of_other_texts, of_rounded_weights):
        record(other, uri=store)
        measured.clear()
        assert attempt(1.3, measure)[0] is False
        assert measured == ["models:/ruled/3"]


def test_a_version_that_becomes_champion_meanwhile_is_compared_with(store: str) -> None:
    first, better, new = (add_version(store, "overtaken") for _ in range(3))
    MlflowClient(store).set_registered_model_alias("overtaken", "champion", str(first.version))
    bits = {first.version: 1.5, better.version: 1.0}

    def measure(version: Version) -> Evaluation:
        MlflowClient(store).set_registered_model_alias("overtaken", "champion", str(better.version))
        return evaluation(version.uri, bits[version.version])

    decision = promote_if(
        Rule.parse("bits_per_byte < champion"), new, evaluation(new.uri, 1.25), measure, store
    )
    assert not decision.promoted
    assert current_champion("overtaken", store) == better


def test_a_champion_that_cannot_be_evaluated_stays(store: str) -> None:
    first, new = add_version(store, "broken"), add_version(store, "broken")
    MlflowClient(store).set_registered_model_alias("broken", "champion", str(first.version))

    def measure(version: Version) -> Evaluation:
        raise EvaluationError("its weights are gone")

    decision = promote_if(Rule.parse("acc > champion"), new, evaluation(new.uri, 1.0), measure, store)
    assert not decision.promoted
    assert decision.reason == "the champion, version 1, cannot be evaluated (its weights are gone)"
    decision = promote_if(
        Rule.parse("acc > champion"),
        new,
        evaluation(new.uri, 1.0),
        lambda version: evaluation(version.uri, 2.0, fingerprint="b"),
        store,
    )
    assert not decision.promoted
    assert decision.reason == "the champion, version 1, was measured in another way, so that nothing compares"
    assert promote_if(Rule.parse("acc > 0.1"), new, evaluation(new.uri, 1.0), never, store).promoted
