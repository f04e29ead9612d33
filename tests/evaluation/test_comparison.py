from __future__ import annotations

import io
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from llama_ray.evaluation.comparison import compare, difference, margin
from llama_ray.evaluation.figures import comparison_figure
from llama_ray.evaluation.results import Evaluation, EvaluationError, Score


def accuracy(hits: list[float], task: str = "next_line") -> Score:
    n = len(hits)
    return Score(
        task, "acc", sum(hits) / n, float(np.std(hits, ddof=1)) / math.sqrt(n), n, True, "a", tuple(hits)
    )


def bits(per_document: list[float], sizes: list[float]) -> Score:
    value = sum(per_document) / sum(sizes)
    return Score(
        "poem", "bits_per_byte", value, 0.5, len(sizes), False, "b", tuple(per_document), tuple(sizes)
    )


def evaluation(model: str, *scores: Score) -> Evaluation:
    return Evaluation(model, scores, 1.0)


@given(st.lists(st.tuples(st.floats(-9, 9), st.floats(-9, 9)), min_size=6, max_size=60))
def test_the_paired_interval_is_that_of_students_t(pairs: list[tuple[float, float]]) -> None:
    ours, theirs = (list(values) for values in zip(*pairs, strict=True))
    found = difference(accuracy(ours), accuracy(theirs))
    assert found.paired
    gaps = np.subtract(ours, theirs)
    margin = stats.t.ppf(0.975, len(gaps) - 1) * np.std(gaps, ddof=1) / math.sqrt(len(gaps))
    assert found.margin == pytest.approx(margin, rel=2e-3, abs=1e-6)
    assert found.value == pytest.approx(float(np.mean(gaps)), abs=1e-9)


def test_the_interval_of_bits_per_byte_covers_the_true_difference() -> None:
    """Of many made evaluations, about 95 % of the intervals must hold the difference that they were made with."""
    random = np.random.default_rng(0)
    held = 0
    for _ in range(400):
        sizes = random.integers(100, 4000, 30)
        hard = random.normal(1.0, 0.3, 30)
        ours, theirs = ((hard + shift + random.normal(0, 0.05, 30)) * sizes for shift in (0.0, 0.1))
        found = difference(bits(list(ours), list(sizes)), bits(list(theirs), list(sizes)))
        assert found.margin is not None
        held += abs(found.value + 0.1) <= found.margin
    assert 0.92 <= held / 400 <= 0.98


def test_scores_of_other_documents_count_as_independent() -> None:
    one, two = (replace(accuracy([0.0, 1.0] * 50), values=()) for _ in range(2))
    found = difference(one, two)
    assert not found.paired
    assert found.margin == pytest.approx(math.sqrt(2) * (margin(one) or 0))


def test_the_best_is_marked_where_the_difference_is_larger_than_chance() -> None:
    hard = [0.0, 1.0] * 20
    # The same model but for 10 documents: far within the interval of each score, but not of the difference.
    better = [1.0 if place < 20 else hit for place, hit in enumerate(hard)]
    lucky = [1.0 if place < 2 else hit for place, hit in enumerate(hard)]
    found = compare(
        [
            evaluation("models:/demo/1", accuracy(hard), accuracy(hard, "other")),
            evaluation("models:/demo/2", accuracy(better), accuracy(lucky, "other")),
        ]
    )
    assert [row.best for row in found.rows] == [1, None]
    first, second = found.markdown().splitlines()[2:4]
    assert first == ("| next_line/acc ↑ | 0.5000 ± 0.1619 | **0.7500 ± 0.1402** | +0.2500 ± 0.1402 |")
    assert "**" not in second
    assert "0.7500 ± 0.1402 *" in found.text()
    assert found.columns()["best"] == [False, True, False, False]


def test_the_lower_bits_per_byte_is_the_better_one_and_a_few_documents_prove_nothing() -> None:
    sizes = [100.0, 50.0, 80.0, 90.0, 120.0, 70.0]

    def of(rate: float, documents: int) -> Score:
        return bits([rate * size + n for n, size in enumerate(sizes[:documents])], sizes[:documents])

    models = [evaluation(f"/runs/a/step_{rate}", of(rate, 6)) for rate in (1.4, 1.2, 1.3)]
    assert [row.best for row in compare(models).rows] == [1]
    models = [evaluation(f"/runs/a/step_{rate}", of(rate, 3)) for rate in (1.4, 1.2, 1.3)]
    assert [row.best for row in compare(models).rows] == [None]


def test_only_like_is_compared_with_like() -> None:
    one = evaluation("models:/demo/1", accuracy([0.0, 1.0]), accuracy([0.0, 1.0], "mine"))
    other = replace(one.scores[0], fingerprint="other")
    with pytest.raises(
        EvaluationError, match="models:/demo/1 and models:/demo/2 have no score that was made in the"
    ):
        compare([one, evaluation("models:/demo/2", other)])
    both = compare([one, evaluation("models:/demo/2", other, one.scores[1])])
    assert [row.name for row in both.rows] == ["mine/acc"]
    assert both.text().endswith("; not compared, because not made in the same way for all: next_line/acc")


def test_models_are_named_as_shortly_as_tells_them_apart() -> None:
    score = accuracy([0.0, 1.0])
    long = compare([evaluation(f"/runs/{name}/step_1", score) for name in ("a", "b")])
    assert long.labels == ("a/step_1", "b/step_1")
    deep = compare([evaluation(f"/{name}/run/step_1", score) for name in ("a", "b")])
    assert deep.labels == ("a/run/step_1", "b/run/step_1")
    assert len(set(compare([evaluation("same", score)] * 2).labels)) == 2


def test_the_picture_has_a_panel_for_each_score() -> None:
    models = [
        evaluation(f"models:/demo/{n}", *(accuracy([0.0, 1.0, n / 3, 1.0], f"task_{t}") for t in range(5)))
        for n in range(3)
    ]
    figure = comparison_figure(compare(models))
    panels = [axes for axes in figure.axes if axes.axison]
    assert [axes.get_title(loc="left") for axes in panels] == [
        f"task_{t}/acc (higher is better)" for t in range(5)
    ]
    assert [label.get_text() for label in panels[0].get_yticklabels()] == ["demo/0", "demo/1", "demo/2"]
    file = io.BytesIO()
    figure.savefig(file, format="png")
    assert file.getvalue().startswith(b"\x89PNG")
