from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import mlflow
import pytest
import yaml
from mlflow import MlflowClient

from llama_ray.tracking.errors import TrackingError
from llama_ray.tracking.runs import Run


def artifact(run: Run, path: str) -> Path:
    return Path(
        mlflow.artifacts.download_artifacts(run_id=run.run_id, artifact_path=path, tracking_uri=run.uri)
    )


def data(run: Run) -> mlflow.entities.RunData:
    return MlflowClient(run.uri).get_run(run.run_id).data


def test_a_run_has_its_name_tags_description_and_all_parameters(new_run: Callable[..., Run]) -> None:
    many = {f"p{i}": i for i in range(250)}
    run = new_run(
        name="tiny on books",
        params={"model": {"hidden_size": 64, "rope": {"theta": 1e4}}, "note": "x" * 9000, **many},
        tags={"device": "cpu"},
        description="# Tiny",
    )
    found = data(run)
    assert found.tags["mlflow.runName"] == "tiny on books"
    assert found.tags["mlflow.note.content"] == "# Tiny"
    assert found.tags["device"] == "cpu"
    assert found.params["model.hidden_size"] == "64"
    assert found.params["model.rope.theta"] == "10000.0"
    assert found.params["p249"] == "249"
    assert found.params["note"].endswith("…")
    assert len(found.params) == 253


def test_a_run_shows_the_data_it_was_trained_on(new_run: Callable[..., Run]) -> None:
    run = new_run()
    run.log_dataset("books", fingerprint="f" * 64, source="/data/books", sizes={"train_tokens": 9})
    [shown] = MlflowClient(run.uri).get_run(run.run_id).inputs.dataset_inputs
    assert (shown.dataset.name, shown.dataset.digest) == ("books", "f" * 12)
    assert "/data/books" in shown.dataset.source
    assert "9" in shown.dataset.profile
    assert [(tag.key, tag.value) for tag in shown.tags] == [("mlflow.data.context", "training")]


def test_data_in_an_object_store_are_shown_as_such(new_run: Callable[..., Run]) -> None:
    run = new_run()
    run.log_dataset("books", fingerprint="f", source="s3://key:hidden@bucket/books", sizes={})
    [shown] = MlflowClient(run.uri).get_run(run.run_id).inputs.dataset_inputs
    assert (shown.dataset.source_type, json.loads(shown.dataset.source)) == (
        "s3",
        {"uri": "s3://***@bucket/books"},
    )


def test_no_global_state_is_left(new_run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch) -> None:
    before = mlflow.get_tracking_uri()
    run = new_run()
    run.log_metrics({"loss/train": 1.0}, step=1)
    assert mlflow.active_run() is None
    assert mlflow.get_tracking_uri() == before


def test_artifacts_are_stored_beside_the_database(new_run: Callable[..., Run], store: str) -> None:
    run = new_run()
    run.log_text("hello", "notes/a.txt")
    folder = Path(store.removeprefix("sqlite:///")).parent / "mlartifacts" / run.run_id / "artifacts"
    assert (folder / "notes" / "a.txt").read_text() == "hello"


def test_another_process_continues_after_the_last_step(new_run: Callable[..., Run]) -> None:
    run = new_run()
    assert run.last_steps().get("loss/train") is None
    code = (
        "import sys; from llama_ray.tracking.runs import Run; run = Run.attach(*sys.argv[1:]);\n"
        "for step in (1, 2, 3): run.log_metrics({'loss/train': 4.0 / step, 'progress/tokens': step * 10}, step)"
    )
    subprocess.run([sys.executable, "-c", code, run.run_id, run.uri], check=True, timeout=120)
    assert run.last_steps().get("loss/train") == 3
    assert run.last_steps().get("loss/validation") is None
    assert [(p.step, p.value) for p in run.history("loss/train")] == [(1, 4.0), (2, 2.0), (3, 4.0 / 3)]
    assert MlflowClient(run.uri).get_run(run.run_id).info.status == "RUNNING"


def test_values_that_are_not_finite_become_gaps_and_count_as_steps(new_run: Callable[..., Run]) -> None:
    run = new_run()
    for step, value in enumerate([1.0, math.inf, -math.inf, math.nan]):
        run.log_metrics({"loss/train": value}, step)
    values = [point.value for point in run.history("loss/train")]
    assert values[0] == 1.0
    assert all(math.isnan(value) for value in values[1:])
    assert run.last_steps().get("loss/train") == 3


def test_more_metrics_than_mlflow_accepts_in_one_request(new_run: Callable[..., Run]) -> None:
    run = new_run()
    run.log_metrics({f"m/{i}": i for i in range(1500)}, step=1)
    assert len(data(run).metrics) == 1500


def test_config_round_trips_through_yaml(new_run: Callable[..., Run]) -> None:
    run = new_run()
    run.log_config({"z": 1, "a": {"path": Path("/data"), "betas": (0.9, 0.95), "none": None, "ja": "é"}})
    text = artifact(run, "config.yaml").read_text()
    assert yaml.safe_load(text) == {
        "z": 1,
        "a": {"path": "/data", "betas": [0.9, 0.95], "none": None, "ja": "é"},
    }
    assert text.startswith("z:")


def test_loss_curve_is_drawn_from_what_was_logged(new_run: Callable[..., Run]) -> None:
    run = new_run()
    for step in range(1, 6):
        run.log_metrics({"loss/train": 5.0 - step, "progress/tokens": step * 1000}, step)
    run.log_metrics({"loss/validation": 1.5}, 5)
    run.log_loss_curve()
    assert artifact(run, "loss_curve.png").read_bytes().startswith(b"\x89PNG")


def test_samples_that_contain_markdown_are_fenced(new_run: Callable[..., Run]) -> None:
    run = new_run()
    run.log_samples([("def f():", "\n```python\nreturn 1\n```")], step=100)
    text = artifact(run, "samples/step_000100.md").read_text()
    assert "````text\n\n```python\nreturn 1\n```\n````" in text


def test_a_finished_run_can_be_reopened(new_run: Callable[..., Run]) -> None:
    run = new_run()
    run.finish("FAILED")
    client = MlflowClient(run.uri)
    assert client.get_run(run.run_id).info.status == "FAILED"
    Run.attach(run.run_id, run.uri).reopen()
    assert client.get_run(run.run_id).info.status == "RUNNING"


def test_system_metrics_continue_after_a_restart(new_run: Callable[..., Run]) -> None:
    run = new_run()
    name = "system/cpu_utilization_percentage"
    for restart in range(2):
        attached = Run.attach(run.run_id, run.uri)
        before = attached.last_steps().get(name)
        assert (before is None) == (restart == 0)
        with attached.system_metrics(interval_s=0.05):
            deadline = time.monotonic() + 30
            while attached.last_steps().get(name) in (None, before):
                assert time.monotonic() < deadline
    steps = [point.step for point in MlflowClient(run.uri).get_metric_history(run.run_id, name)]
    assert len(steps) == len(set(steps)) >= 2


def test_a_deleted_run_or_experiment_says_how_to_restore_it(new_run: Callable[..., Run], store: str) -> None:
    with pytest.raises(TrackingError, match="no run 0123abc at sqlite"):
        Run.attach("0123abc", store)
    run = new_run(experiment="gone")
    client = MlflowClient(store)
    client.delete_run(run.run_id)
    with pytest.raises(TrackingError, match=f"mlflow runs restore --run-id {run.run_id}"):
        Run.attach(run.run_id, store)
    client.delete_experiment(run.experiment_id)
    with pytest.raises(TrackingError, match="mlflow experiments restore --experiment-id"):
        new_run(experiment="gone")
