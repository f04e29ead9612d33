"""Which version and adapter answer a request for MODEL:ADAPTER, and what is said where none does."""

from __future__ import annotations

import dataclasses

import pytest

from serve_app.errors import ApiError
from serve_app.protocol.models import cards
from serve_app.registry.messages import AdapterVersion, Table
from serve_app.routing.choice import choose
from tests.serve_app.tables import directory, served, table, version

V6, V7, V9 = (f"models:/llama/{number}" for number in (6, 7, 9))
ADAPTERS = {
    "poet": AdapterVersion("poet", "/adapters/poet"),
    "support": AdapterVersion("support", "models:/support/2", V7),
    "older": AdapterVersion("older", "models:/older/1", V6),
    "gone": AdapterVersion("gone", "models:/gone/1", "models:/llama/3"),
    "copied": AdapterVersion("copied", "models:/copied/1", "models:/llama-import/1"),
    "lost": AdapterVersion("lost", "models:/lost@champion", missing="models:/lost has no alias champion"),
}
MODELS = table(
    dataclasses.replace(
        served(
            version(7, "serving", "champion"),
            version(8, "canary", "challenger"),
            version(6, "previous"),
            version(9, "loading"),
            share=1.0,
        ),
        adapters=tuple(ADAPTERS.values()),
    ),
    directory(),
)


def chosen(model: str, models: Table = MODELS) -> tuple[str, str]:
    choice = choose(models, model, None, "request")
    assert choice.adapter is not None
    return choice.ref, choice.adapter.location


def refusal(model: str) -> ApiError:
    with pytest.raises(ApiError) as refused:
        choose(MODELS, model, None, "request")
    return refused.value


@pytest.mark.parametrize(
    ("model", "ref", "name"),
    [
        ("llama:poet", V7, "poet"),
        ("llama:support", V7, "support"),
        ("llama@champion:support", V7, "support"),
        ("models:/llama/7:support", V7, "support"),
        ("llama/7:poet", V7, "poet"),
        ("llama:older", V6, "older"),
        ("llama:copied", V7, "copied"),
    ],
)
def test_an_adapter_answers_on_the_version_that_it_was_trained_on(model: str, ref: str, name: str) -> None:
    assert chosen(model) == (ref, ADAPTERS[name].location)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            "llama:other",
            "llama has no adapter 'other' here; ask for 'llama:poet', 'llama:support', 'llama:older'",
        ),
        ("tiny:poet", "tiny has no adapter 'poet' here; it has none"),
        ("llama:lost", "the adapter 'lost' of llama is not there: models:/lost has no alias champion"),
        (
            "llama:gone",
            "the adapter 'gone' was trained on models:/llama/3, and llama is models:/llama/7; ask for",
        ),
        (
            "models:/llama/6:support",
            "the adapter 'support' was trained on models:/llama/7, and models:/llama/6 is",
        ),
        ("nobody:poet", "model 'nobody:poet' is not served here"),
        ("models:/llama/70", "model 'models:/llama/70' is not served here"),
    ],
)
def test_what_no_adapter_answers_is_a_404_that_says_what_there_is(model: str, message: str) -> None:
    error = refusal(model)
    assert error.status == 404
    assert error.response.error.code == "model_not_found"
    assert message in str(error)


def test_an_adapter_of_a_version_that_is_loading_comes_later() -> None:
    assert refusal("models:/llama/9:poet").status == 503
    with pytest.raises(ApiError, match="llama:poet has no version that serves yet") as refused:
        choose(table(served()), "llama:poet", None, "request")
    assert refused.value.status == 503


def test_while_versions_change_the_adapter_of_the_one_that_serves_answers() -> None:
    both = (
        AdapterVersion("support", "models:/support/3", V9),
        AdapterVersion("support", "models:/support/2", V7),
    )
    before = dataclasses.replace(served(version(7, "serving"), version(9, "loading")), adapters=both)
    after = dataclasses.replace(served(version(9, "serving"), version(7, "previous")), adapters=both)
    assert chosen("llama:support", table(before)) == (V7, "models:/support/2")
    assert chosen("llama:support", table(after)) == (V9, "models:/support/3")
    assert chosen("models:/llama/7:support", table(after)) == (V7, "models:/support/2")


def test_adapters_are_listed_with_what_is_loaded_and_the_version_that_they_belong_to() -> None:
    found = {card.id: (card.root, card.parent) for card in cards(MODELS) if ":" in card.id and card.parent}
    assert found == {
        "llama:poet": ("/adapters/poet", V7),
        "llama:support": ("models:/support/2", V7),
        "llama:older": ("models:/older/1", V6),
        "llama:copied": ("models:/copied/1", V7),
    }
    for name, (root, parent) in found.items():
        assert chosen(name) == (parent, root)


def test_clients_are_shown_no_secrets_of_a_place() -> None:
    model = served(version(7, "serving"))
    adapter = AdapterVersion("poet", "s3://key:secret@bucket/poet")
    [card] = (c for c in cards(table(dataclasses.replace(model, adapters=(adapter,)))) if c.parent)
    assert card.root == "s3://***@bucket/poet"
