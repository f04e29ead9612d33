from __future__ import annotations

from pathlib import Path

import pytest

from llama_ray.tracking.environment import open_variables, secret_variables

OPEN = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_TRACKING_INSECURE_TLS": "true",
    "DATABRICKS_HOST": "https://h",
}
SECRET = {
    "MLFLOW_TRACKING_PASSWORD": "a",
    "MLFLOW_TRACKING_TOKEN": "b",
    "DATABRICKS_TOKEN": "c",
    "MLFLOW_REGISTRY_URI": "postgresql://u:d@h/db",
}


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    for name, value in (OPEN | SECRET | {"AWS_SECRET_ACCESS_KEY": "e"}).items():
        monkeypatch.setenv(name, value)


def test_what_another_process_needs_is_divided_into_what_may_be_shown_and_secrets(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://host:5000")
    assert open_variables().items() >= (OPEN | {"MLFLOW_TRACKING_URI": "http://host:5000"}).items()
    assert secret_variables() == SECRET


def test_a_tracking_uri_is_a_secret_if_it_holds_one_and_absolute(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://user:word@host")
    assert secret_variables()["MLFLOW_TRACKING_URI"] == "https://user:word@host"
    assert "MLFLOW_TRACKING_URI" not in open_variables()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///my.db")
    assert open_variables()["MLFLOW_TRACKING_URI"] == f"sqlite:///{tmp_path}/my.db"
