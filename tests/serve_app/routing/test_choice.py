"""Which version answers a request: by name, by share, by alias, by number."""

from __future__ import annotations

import subprocess
import sys
from itertools import pairwise

import pytest

from serve_app.errors import ApiError
from serve_app.registry.messages import Table
from serve_app.routing.choice import choose
from tests.serve_app.tables import directory, served, table, version

V6, V7, V8, V9 = (f"models:/llama/{number}" for number in (6, 7, 8, 9))
BUSY = table(
    served(
        version(7, "serving", "champion", "stable"),
        version(8, "canary", "challenger"),
        version(6, "previous", "fallback"),
        version(9, "loading"),
        version(5, "rejected", "broken", reason="its loss is nan"),
    ),
    directory(),
)
SESSIONS = [f"session {number}" for number in range(10_000)]


def refusal(models: Table, model: str) -> ApiError:
    with pytest.raises(ApiError) as refused:
        choose(models, model, None, "request")
    return refused.value


def to_canary(share: float) -> set[str]:
    """The sessions that the canary answers at this share."""
    models = table(served(version(7, "serving"), version(8, "canary"), share=share))
    return {session for session in SESSIONS if choose(models, "llama", session, "r")[1] == V8}


@pytest.mark.parametrize("share", [0, 0.01, 0.1, 0.5, 0.9, 1])
def test_the_canary_answers_its_share_of_the_sessions(share: float) -> None:
    # Four standard deviations of a binomial.
    tolerance = 4 * (share * (1 - share) / len(SESSIONS)) ** 0.5
    assert len(to_canary(share)) / len(SESSIONS) == pytest.approx(share, abs=tolerance)


def test_a_larger_share_only_moves_sessions_to_the_canary() -> None:
    answered = [to_canary(share) for share in (0, 0.05, 0.1, 0.3, 0.8, 1)]
    for fewer, more in pairwise(answered):
        assert fewer < more


def test_a_session_stays_on_its_version_whatever_the_request_and_the_process() -> None:
    models = table(served(version(7, "serving"), version(8, "canary"), share=0.5))
    here = [choose(models, "llama", session, f"request {session}")[1] for session in SESSIONS[:20]]
    assert here == [choose(models, "llama", session, "another")[1] for session in SESSIONS[:20]]
    code = (
        "from tests.serve_app.routing.test_choice import *\n"
        "models = table(served(version(7, 'serving'), version(8, 'canary'), share=0.5))\n"
        "print(*(choose(models, 'llama', session, 'r')[1] for session in SESSIONS[:20]))"
    )
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert there.stdout.split() == here


def test_requests_without_a_session_are_shared_by_their_ids() -> None:
    models = table(served(version(7, "serving"), version(8, "canary"), share=0.5))
    answered = [choose(models, "llama", None, f"request {number}")[1] for number in range(1000)]
    assert 400 < answered.count(V8) < 600


def test_a_canary_that_no_replica_has_loaded_gets_no_share() -> None:
    models = table(served(version(7, "serving"), version(8, "loading", "challenger"), share=1))
    assert choose(models, "llama", "s", "r")[1] == V7


@pytest.mark.parametrize(
    ("model", "ref"),
    [
        ("llama@champion", V7),
        ("models:/llama@champion", V7),
        ("llama@stable", V7),
        ("llama@challenger", V8),
        ("llama@fallback", V6),
        ("models:/llama/7", V7),
        ("models:/llama/8", V8),
        ("models:/llama/6", V6),
        ("tiny", "tiny"),
    ],
)
def test_an_explicit_name_means_one_version_for_every_session(model: str, ref: str) -> None:
    assert {choose(BUSY, model, session, session)[1] for session in SESSIONS[:100]} == {ref}


def test_the_model_that_was_chosen_comes_with_the_version() -> None:
    assert choose(BUSY, "llama", None, "r")[0] is BUSY.models[0]
    assert choose(BUSY, "tiny", None, "r")[0] is BUSY.models[1]


def test_the_followed_alias_means_what_serves_while_its_new_version_loads() -> None:
    models = table(served(version(7, "serving"), version(8, "loading", "champion")))
    assert choose(models, "llama@champion", None, "r")[1] == V7


@pytest.mark.parametrize(
    ("model", "status", "message"),
    [
        ("models:/llama/9", 503, "models:/llama/9 is loading"),
        ("models:/llama/5", 404, "models:/llama/5 is rejected: its loss is nan"),
        ("models:/llama/4", 404, "ask for 'llama', 'llama@champion', 'llama@challenger', "),
        ("llama@broken", 404, "'llama@broken' is not served here"),
        ("gpt-4", 404, "model 'gpt-4' is not served here; ask for 'llama', "),
        ("", 404, "model '' is not served here"),
        ("x" * 10_000, 404, "xxx...' is not served here"),
        ("\ud800", 404, "is not served here"),
    ],
)
def test_what_does_not_answer_is_refused_with_the_reason(model: str, status: int, message: str) -> None:
    error = refusal(BUSY, model)
    assert error.status == status
    assert message in error.response.error.message
    assert error.response.error.code == ("not_ready" if status == 503 else "model_not_found")
    assert (error.retry_after_s is not None) == (status == 503)


@pytest.mark.parametrize("model", ["llama", "llama@champion", "models:/llama@champion"])
def test_a_model_is_not_ready_before_its_first_version_serves(model: str) -> None:
    assert refusal(table(served()), model).status == 503
    loading = refusal(table(served(version(7, "loading", "champion"))), model)
    assert loading.status == 503
    assert "models:/llama/7, which is loading" in str(loading)


def test_a_canary_that_was_rejected_says_why() -> None:
    models = table(served(version(7, "serving"), version(8, "rejected", "challenger", reason="no tokenizer")))
    error = refusal(models, "llama@challenger")
    assert error.status == 404
    assert "models:/llama/8, which is rejected: no tokenizer" in str(error)


def test_a_session_may_be_any_text() -> None:
    for session in ("", "\ud800", "ü\n", "x" * 100_000):
        assert choose(BUSY, "llama", session, "r")[1] in (V7, V8)
