from __future__ import annotations

import math
import os
from collections.abc import Callable
from pathlib import Path

import mlflow
import pandas as pd
import pytest
from mlflow import MlflowClient

from llama_ray.tracking.registry import (
    TrackingError,
    Version,
    check_name,
    download,
    latest_version,
    promote,
    register,
    resolve_version,
)
from llama_ray.tracking.runs import Run


@pytest.fixture
def add(new_run: Callable[..., Run], checkpoint: Path, echo_model: Path) -> Callable[..., Version]:
    """Registers one more version."""

    def register_one(name: str, loss: float = 2.0, data: str = "books", run: Run | None = None) -> Version:
        return register(
            run or new_run(),
            name=name,
            checkpoint=checkpoint,
            python_model=echo_model,
            validation_loss=loss,
            data_fingerprint=data,
            tags={"tokens": "4096"},
            description="**Tiny**, trained on books",
        )

    return register_one


@pytest.fixture
def default_store(store: str, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    return store


def test_a_registered_version_predicts_with_parameters(
    add: Callable[..., Version], new_run: Callable[..., Run], default_store: str
) -> None:
    run = new_run(params={"hidden_size": 64})
    run.log_metrics({"loss/validation": 3.0}, step=50)
    run.log_metrics({"loss/validation": 2.25}, step=100)
    version = add("predicts", loss=2.25, run=run)
    promote("predicts", version.version, policy="if_better")

    model = mlflow.pyfunc.load_model("models:/predicts@champion")
    assert model.predict(["hello", "you"]) == ["llama:hello:100:0.9", "llama:you:100:0.9"]
    table = pd.DataFrame({"prompt": ["hello"]})
    assert model.predict(table, params={"max_tokens": 5, "top_p": 0.5}) == ["llama:hello:5:0.5"]
    defaults = {spec.name: spec.default for spec in model.metadata.signature.params.params}
    assert defaults == {"max_tokens": 100, "temperature": 0.8, "top_k": 40, "top_p": 0.9, "seed": None}

    weights = Path(mlflow.artifacts.download_artifacts("models:/predicts@champion/artifacts/checkpoint"))
    assert (weights / "model-00002-of-00002.safetensors").is_file()


def test_a_version_is_tied_to_its_run_and_the_run_keeps_its_status(
    add: Callable[..., Version], new_run: Callable[..., Run], store: str
) -> None:
    run = new_run(params={"hidden_size": 64})
    run.log_metrics({"loss/validation": 3.0}, step=50)
    run.log_metrics({"loss/validation": 2.25}, step=100)
    environment = dict(os.environ)
    version = add("tied.1", loss=2.25, run=run)
    assert (version.name, version.version, version.uri) == ("tied.1", 1, "models:/tied.1/1")
    assert version.validation_loss == 2.25
    assert version.tags == {
        "validation_loss": "2.25",
        "data_fingerprint": "books",
        "tokens": "4096",
    }
    assert version.description == "**Tiny**, trained on books"
    assert version.run_id == run.run_id

    client = MlflowClient(store)
    assert client.get_run(run.run_id).info.status == "RUNNING"
    assert mlflow.active_run() is None
    assert dict(os.environ) == environment
    assert [point.step for point in client.get_metric_history(run.run_id, "loss/validation")] == [50, 100]
    (logged,) = client.search_logged_models(
        [run.experiment_id], filter_string=f"source_run_id='{run.run_id}'"
    )
    assert logged.status == "READY"
    assert logged.params["hidden_size"] == "64"
    assert [(metric.key, metric.value, metric.step) for metric in logged.metrics] == [
        ("loss/validation", 2.25, 100)
    ]
    assert client.get_model_version("tied.1", "1").source == f"models:/{logged.model_id}"


def test_neither_pickles_nor_links_are_stored(
    add: Callable[..., Version], store: str, tmp_path: Path
) -> None:
    version = add("plain")
    folder = download(version.uri, store, tmp_path).parents[1]
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert {path.name for path in files} >= {"MLmodel", "echo_model.py", "requirements.txt", "config.json"}
    assert not [path for path in files if path.suffix in (".pkl", ".pickle") or path.is_symlink()]
    size = mlflow.models.Model.load(str(folder)).model_size_bytes
    assert size >= sum(path.stat().st_size for path in folder.rglob("*.safetensors"))


def test_download_returns_the_local_store_itself(
    add: Callable[..., Version], checkpoint: Path, store: str, tmp_path: Path
) -> None:
    version = add("local")
    folder = download(version.uri, store, cache_dir=tmp_path / "cache")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {
        path.name: path.read_bytes() for path in checkpoint.iterdir()
    }
    assert folder.is_relative_to(Path(store.removeprefix("sqlite:///")).parent)
    assert not list((tmp_path / "cache").rglob("*.safetensors"))


def test_only_a_better_loss_on_the_same_data_takes_the_alias(add: Callable[..., Version], store: str) -> None:
    def try_promote(loss: float, data: str = "books", policy: str = "if_better") -> tuple[bool, str]:
        version = add("contest", loss, data)
        decision = promote("contest", version.version, policy=policy, uri=store)  # type: ignore[arg-type]
        holds = resolve_version("models:/contest@champion", store).version == version.version
        assert holds == decision.promoted
        return decision.promoted, decision.reason

    version = add("contest", math.nan)
    assert not promote("contest", version.version, policy="always", uri=store).promoted
    assert try_promote(2.0) == (True, "version 2 is the first champion (validation loss 2.0000)")
    assert try_promote(2.0)[0] is False
    assert try_promote(1.5) == (
        True,
        "version 4 is better: validation loss 1.5000 against 2.0000 of version 2",
    )
    promoted, reason = try_promote(1.0, data="news")
    assert not promoted
    assert "different data" in reason
    assert "--promote always" in reason
    assert try_promote(math.inf)[0] is False
    assert try_promote(0.5, policy="never")[0] is False
    assert try_promote(9.0, data="news", policy="always")[0] is True
    assert promote("contest", 8, policy="if_better", uri=store).reason == "version 8 is champion already"


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_a_champion_without_a_finite_loss_gives_way(
    add: Callable[..., Version], store: str, loss: float
) -> None:
    name = f"gives-way-{loss}".replace("--", "-minus-")
    first = add(name, loss)
    assert not promote(name, first.version, policy="always", uri=store).promoted
    MlflowClient(store).set_registered_model_alias(name, "champion", str(first.version))
    assert promote(name, add(name, 2.0).version, policy="if_better", uri=store).promoted


def test_references_resolve_and_follow_the_alias(add: Callable[..., Version], store: str) -> None:
    first, second = add("moves"), add("moves")
    for version in (first, second):
        promote("moves", version.version, policy="always", uri=store)
        assert resolve_version("models:/moves@champion", store) == version
    assert resolve_version("models:/moves/1", store) == first
    assert latest_version("moves", store) == second
    assert latest_version("nobody", store) is None


@pytest.mark.parametrize(
    ("ref", "message"),
    [
        ("models:/a-known/9", r"'a-known' has no such version; its versions: 1$"),
        ("models:/a-known@best", r"'a-known' has no alias 'best'; its aliases: champion$"),
        ("models:/unknown/1", r"no model 'unknown' is registered at sqlite:.*registered: .*a-known"),
        ("models:/unknown@champion", r"no model 'unknown' is registered"),
        ("models:/a-known", r"give models:/NAME/VERSION or models:/NAME@ALIAS"),
        ("models:/a-known/latest", r"is not a model reference"),
        ("models:/a-known@champion/extra", r"is not a model reference"),
        ("runs:/a-known/1", r"is not a model reference"),
    ],
)
def test_a_wrong_reference_lists_the_existing_names(
    add: Callable[..., Version], store: str, ref: str, message: str
) -> None:
    if latest_version("a-known", store) is None:
        promote("a-known", add("a-known").version, policy="always", uri=store)
    for function in (resolve_version, download):
        with pytest.raises(TrackingError, match=message) as error:
            function(ref, store)
        assert "\n" not in str(error.value)


def test_a_version_without_a_checkpoint_is_refused(new_run: Callable[..., Run], store: str) -> None:
    run = new_run()
    run.log_text("x", "model/other.txt")
    client = MlflowClient(store)
    client.create_registered_model("foreign")
    location = client.get_run(run.run_id).info.artifact_uri + "/model"
    client.create_model_version("foreign", location, run.run_id)
    with pytest.raises(TrackingError, match="has no artifacts/checkpoint"):
        download("models:/foreign/1", store)
    client.create_model_version("foreign", "file:///on/another/machine", run.run_id)
    with pytest.raises(TrackingError, match="does not exist on this machine"):
        download("models:/foreign/2", store)


@pytest.mark.parametrize("name", ["", "a/b", "a:b", "a@b", "a b", "..", "it's", "x" * 201, "ü" * 101])
def test_impossible_names_are_refused(name: str) -> None:
    with pytest.raises(TrackingError, match="cannot name a registered model"):
        check_name(name)


def test_incomplete_checkpoints_are_refused_before_anything_is_stored(
    new_run: Callable[..., Run], echo_model: Path, tmp_path: Path, store: str
) -> None:
    (tmp_path / "config.json").write_text("{}")
    for folder, message in ((tmp_path, "no tokenizer.json and no"), (tmp_path / "no", "is not a directory")):
        with pytest.raises(ValueError, match=message):
            register(
                new_run(),
                name="incomplete",
                checkpoint=folder,
                python_model=echo_model,
                validation_loss=1.0,
                data_fingerprint="",
                tags={},
                description="",
            )
    assert latest_version("incomplete", store) is None
