"""What GET /v1/models and /ready say of a table."""

from __future__ import annotations

import dataclasses

import pytest

from serve_app.errors import ApiError
from serve_app.protocol.models import cards, ready
from serve_app.registry.messages import Table
from serve_app.routing.choice import choose
from tests.serve_app.tables import INFO, directory, served, table, version

MODELS = table(
    served(
        version(7, "serving", "champion", "stable"),
        version(8, "canary", "challenger"),
        version(6, "previous"),
        version(9, "loading", "next", reason="waits for memory"),
        version(5, "rejected", reason="its loss is nan"),
        notice="MLflow does not answer",
    ),
    directory(),
)


def test_each_name_that_can_be_asked_for_has_a_card_with_the_exact_version() -> None:
    assert {card.id: card.root for card in cards(MODELS)} == {
        "llama": "models:/llama/7",
        "llama@champion": "models:/llama/7",
        "llama@stable": "models:/llama/7",
        "llama@challenger": "models:/llama/8",
        "models:/llama/7": "models:/llama/7",
        "models:/llama/8": "models:/llama/8",
        "models:/llama/6": "models:/llama/6",
        "models:/llama/9": "models:/llama/9",
        "models:/llama/5": "models:/llama/5",
        "tiny": "tiny",
    }


def test_ids_are_unique_and_the_first_is_a_models_own_name() -> None:
    ids = [card.id for card in cards(table(directory("llama"), *MODELS.models))]
    assert len(ids) == len(set(ids))
    assert ids[0] == "llama"


def test_every_card_that_serves_can_be_asked_for_and_no_other() -> None:
    for card in cards(MODELS):
        if card.metadata["state"] in ("loading", "rejected"):
            with pytest.raises(ApiError):
                choose(MODELS, card.id, None, "r")
        elif card.id != "llama":  # Its share of the canary is another test's.
            assert choose(MODELS, card.id, None, "r")[1] == card.root


def test_a_card_says_what_is_known_of_the_version() -> None:
    card = next(card for card in cards(MODELS) if card.id == "llama@challenger")
    assert (card.created, card.max_model_len) == (INFO.created, 4096)
    assert card.metadata == {
        "version": 8,
        "aliases": ["challenger"],
        "state": "canary",
        "reason": None,
        "run_id": "run8",
        "validation_loss": 4.0,
        "parameters": 134_000_000,
        "device": "cpu",
        "chat_template": "plain",
        "replicas": 2,
        "notice": "MLflow does not answer",
    }


@pytest.mark.parametrize(("number", "reason"), [(9, "waits for memory"), (5, "its loss is nan")])
def test_a_version_that_does_not_serve_says_why(number: int, reason: str) -> None:
    card = next(card for card in cards(MODELS) if card.id == f"models:/llama/{number}")
    assert card.metadata["reason"] == reason
    assert card.max_model_len is None


def test_ready_while_each_model_has_a_replica() -> None:
    assert ready(MODELS).status == "ready"


def without_replicas() -> Table:
    current = dataclasses.replace(version(7, "serving"), ready={"LlamaReplica": 0})
    return table(directory(), served(current))


@pytest.mark.parametrize(
    ("models", "message"),
    [
        (None, "the follower of the registry has not answered yet"),
        (table(served()), "llama has no version that serves (none is known)"),
        (table(served(notice="MLflow is away")), "llama has no version that serves (MLflow is away)"),
        (
            table(directory(), served(version(7, "loading", reason="fetching"))),
            "llama has no version that serves (models:/llama/7 is loading: fetching)",
        ),
        (without_replicas(), "models:/llama/7 has no replica that is ready"),
    ],
)
def test_not_ready_says_what_is_missing(models: Table | None, message: str) -> None:
    with pytest.raises(ApiError) as error:
        ready(models)
    assert error.value.status == 503
    assert str(error.value) == f"not ready: {message}"
    assert error.value.response.error.code == "not_ready"
