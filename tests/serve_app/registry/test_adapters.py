"""The adapters of a model are those that the arguments name, and those that the registry has for its version."""

from __future__ import annotations

import dataclasses
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest
from mlflow import MlflowClient

from serve_app.registry.facts import Look
from serve_app.registry.messages import AdapterVersion, ModelSpec, ModelVersion
from serve_app.registry.watch import Watch
from tests.serve_app.registry.helpers import Application, look, ref


@pytest.fixture
def names(client: MlflowClient, register: Callable[..., None]) -> tuple[str, str]:
    """A model with two versions, the first its champion, and an adapter with two versions for the first of them."""
    unique = uuid.uuid4().hex[:8]
    model, adapter = f"model-{unique}", f"adapter-{unique}"
    register(model, 2)
    client.set_registered_model_alias(model, "champion", "1")
    client.create_registered_model(adapter)
    for number in (1, 1, 2):
        client.create_model_version(adapter, "file:///nowhere", tags={"base": f"models:/{model}/{number}"})
    client.set_registered_model_alias(adapter, "best", "1")
    return model, adapter


def adapters_of(store: str, spec: ModelSpec) -> dict[str, AdapterVersion]:
    found = Watch(store).look(spec)
    assert isinstance(found, Look)
    return {adapter.name: adapter for adapter in found.adapters}


def test_named_adapters_are_followed_and_those_of_the_version_are_found(
    store: str, client: MlflowClient, names: tuple[str, str], tmp_path: Path
) -> None:
    model, adapter = names
    spec = ModelSpec(
        model,
        f"models:/{model}@champion",
        adapters=(
            ("best", f"models:/{adapter}@best"),
            ("local", str(tmp_path)),
            ("none", f"models:/{adapter}@none"),
        ),
        finds_adapters=True,
    )
    base = f"models:/{model}/1"
    found = adapters_of(store, spec)
    assert "has no alias 'none'" in (found.pop("none").missing or "")
    assert found == {
        "best": AdapterVersion("best", f"models:/{adapter}/1", base),
        "local": AdapterVersion("local", str(tmp_path)),
        adapter: AdapterVersion(adapter, f"models:/{adapter}/2", base),
    }
    client.set_registered_model_alias(adapter, "best", "3")
    client.set_registered_model_alias(model, "champion", "2")
    base = f"models:/{model}/2"
    found = adapters_of(store, spec)
    assert found["best"] == AdapterVersion("best", f"models:/{adapter}/3", base)
    assert found[adapter] == AdapterVersion(adapter, f"models:/{adapter}/3", base)


def test_a_directory_serves_with_its_local_adapters_while_the_registry_is_away(tmp_path: Path) -> None:
    spec = ModelSpec(
        "tiny", str(tmp_path), adapters=(("local", str(tmp_path)), ("remote", "models:/adapter@best"))
    )
    found = adapters_of("http://127.0.0.1:9", spec)
    assert found["local"].missing is None
    assert "out of reach" in (found["remote"].missing or "")


def test_a_model_of_the_hub_is_loaded_from_there() -> None:
    look = Watch("http://127.0.0.1:9").look(ModelSpec("tiny", "hf://org/tiny@0123abc"))
    assert isinstance(look, Look)
    assert look.target == ModelVersion("tiny", "tiny", "hf://org/tiny@0123abc")


def test_the_adapter_of_a_version_stays_as_long_as_the_version_answers() -> None:
    older, newer = (AdapterVersion("support", f"models:/support/{number}", ref(number)) for number in (7, 8))

    def registry(target: int, *adapters: AdapterVersion) -> list[AdapterVersion]:
        answer = dataclasses.replace(look(target), adapters=adapters)
        application.decisions.heard(application.spec.name, answer)
        application.settle()
        return list(application.served.adapters)

    application = Application.serving(7, "a")
    assert registry(7, older) == [older]
    # The adapter's alias moves first, then that of its base.
    assert registry(7, newer) == [newer, older]
    assert registry(8, newer) == [newer, older]
    application.replica("a", {7: "ready", 8: "ready"})
    assert application.served.current == ref(8)
    application.api("api")
    application.api("api")
    assert application.wanted == [8]
    assert registry(8, newer) == [newer]
    gone = AdapterVersion("support", "models:/support@champion", missing="it has no alias")
    assert registry(8, gone) == [gone]
