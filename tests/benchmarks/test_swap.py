"""What measures moves and kills: does it notice an answer that is wrong?"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from benchmarks.serving.answers import Answers
from benchmarks.serving.load import Load, Measured, Outcome
from benchmarks.serving.registered import Registered, register_versions
from benchmarks.swap import FIELDS, main
from llama_ray.tracking.registry import resolve_version

LOAD = Load(prompt_tokens=8, new_tokens=6, vocab_size=512, prompts=2, fields=FIELDS)


@pytest.fixture(scope="module")
def model(store: str, tmp_path_factory: pytest.TempPathFactory) -> Registered:
    return register_versions(tmp_path_factory.mktemp("swap"), "llama-tiny", store)


@pytest.fixture(scope="module")
def answers(model: Registered) -> Answers:
    return Answers(model, LOAD)


def outcome(answers: Answers, number: int, ref: str) -> Outcome:
    """Return a right answer of the version `ref`, as it comes in a stream of an event for each token."""
    expected = answers.expected(ref, number)
    events: list[dict[str, Any]] = [
        {
            "system_fingerprint": ref,
            "choices": [
                {
                    "text": expected.text if i == 0 else "",
                    "logprobs": {"tokens": [token], "token_logprobs": [expected.logprobs[i]]},
                }
            ],
        }
        for i, token in enumerate(expected.tokens)
    ]
    events.append({"system_fingerprint": ref, "choices": []})
    lines = [json.dumps(event) for event in events]
    return Outcome(number, 0.0, [1.0, 2.0, 4.0], tokens=6, version=ref, events=lines)


def test_the_alias_moves(model: Registered) -> None:
    for number in (2, 1):
        model.move(number)
        assert resolve_version(model.ref, model.uri).version == number


def test_right_answers_of_two_versions(model: Registered, answers: Answers) -> None:
    outcomes = [outcome(answers, number, model.version(v)) for v in (1, 2) for number in (0, 1, 2)]
    assert outcomes[0].events != outcomes[3].events
    verdict = answers.compare(Measured(outcomes, 2.0, 0.0))
    assert (verdict.requests, verdict.failed, verdict.wrong) == (6, 0, 0)
    assert verdict.gap_s == 2.0
    assert verdict.tokens_per_s == 18
    assert verdict.versions == {model.version(1): 3, model.version(2): 3}


def repeated(right: Outcome, other: Outcome) -> Outcome:
    return replace(right, events=[right.events[0], *right.events])


def lost(right: Outcome, other: Outcome) -> Outcome:
    return replace(right, events=[*right.events[:2], *right.events[3:]])


def mixed(right: Outcome, other: Outcome) -> Outcome:
    """The rest comes from the other version, which the header does not say."""
    return replace(right, events=[*right.events[:3], *other.events[3:]])


def silently_mixed(right: Outcome, other: Outcome) -> Outcome:
    ref = json.loads(right.events[0])["system_fingerprint"]
    rest = [json.dumps(json.loads(event) | {"system_fingerprint": ref}) for event in other.events[3:]]
    return replace(right, events=[*right.events[:3], *rest])


def miscounted(right: Outcome, other: Outcome) -> Outcome:
    return replace(right, tokens=7)


def not_the_headers(right: Outcome, other: Outcome) -> Outcome:
    return replace(right, version=other.version)


@pytest.mark.parametrize("broken", [repeated, lost, mixed, silently_mixed, miscounted, not_the_headers])
def test_a_wrong_answer_is_found(
    broken: Callable[[Outcome, Outcome], Outcome], model: Registered, answers: Answers
) -> None:
    right, other = (outcome(answers, 1, model.version(v)) for v in (1, 2))
    assert answers.compare(Measured([broken(right, other)], 1.0, 0.0)).wrong == 1


def test_a_failed_request_is_counted_as_such(answers: Answers) -> None:
    verdict = answers.compare(Measured([Outcome(0, 0.0, error="503")], 1.0, 0.0))
    assert (verdict.failed, verdict.wrong) == (1, 0)


def test_a_run_without_a_disturbance_ends_well() -> None:
    assert main(["--preset", "llama-tiny", "--moves", "0"])
