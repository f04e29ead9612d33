from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama_ray.evaluation.results import Evaluation, EvaluationError, Score, comparable

ACCURACY = Score("next_line", "acc", 0.5, 0.01, 100, True, "a")
BITS = Score("licence", "bits_per_byte", 1.2, None, 3, False, "b")
EVALUATION = Evaluation("models:/demo/1", (ACCURACY, BITS), 2.5, {"limit": None, "dtype": "float32"})

texts = st.text(max_size=8)
numbers = st.floats(allow_nan=False, allow_infinity=False)
scores = st.builds(Score, texts, texts, numbers, st.none() | numbers, st.integers(0), st.booleans(), texts)
evaluations = st.builds(
    Evaluation,
    texts,
    st.lists(scores, max_size=3, unique_by=lambda score: score.name).map(tuple),
    numbers,
    st.dictionaries(texts, st.none() | st.booleans() | st.integers() | numbers | texts, max_size=3),
)


@given(evaluations)
def test_an_evaluation_survives_json(evaluation: Evaluation) -> None:
    assert Evaluation.from_json(evaluation.to_json()) == evaluation


@pytest.mark.parametrize("text", ["", "{}", "[1]", EVALUATION.to_json().replace("0.5", '"half"')])
def test_what_is_no_evaluation_is_refused(text: str) -> None:
    with pytest.raises(EvaluationError, match="no evaluation that can be read"):
        Evaluation.from_json(text)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_value_that_is_not_finite_is_no_score(value: float) -> None:
    with pytest.raises(EvaluationError, match="bits_per_byte of licence"):
        replace(BITS, value=value)


def test_a_score_is_compared_only_with_one_that_was_made_the_same_way() -> None:
    other = Evaluation("models:/demo/2", (replace(ACCURACY, value=0.9), replace(BITS, fingerprint="c")), 1.0)
    assert comparable([EVALUATION, other]) == ["next_line/acc"]
    assert EVALUATION.settings_fingerprint != other.settings_fingerprint
    better = replace(EVALUATION, model="models:/demo/3", scores=(BITS, replace(ACCURACY, value=1.0)))
    assert EVALUATION.settings_fingerprint == better.settings_fingerprint


def test_ranking_knows_which_direction_is_better() -> None:
    assert replace(ACCURACY, value=0.6).better_than(ACCURACY)
    assert replace(BITS, value=1.1).better_than(BITS)
    assert not BITS.better_than(BITS)


def test_a_name_that_stands_twice_is_refused() -> None:
    with pytest.raises(EvaluationError, match="next_line/acc is there twice"):
        Evaluation("m", (ACCURACY, ACCURACY), 1.0)
