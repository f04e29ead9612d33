from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from llama_ray.tracking.errors import TrackingError
from llama_ray.tracking.uri import artifact_location, connect, tracking_uri


def test_the_default_is_an_absolute_sqlite_file_with_artifacts_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    assert tracking_uri() == f"sqlite:///{tmp_path}/mlflow.db"
    assert artifact_location(tracking_uri()) == f"file://{tmp_path}/mlartifacts"


def test_the_environment_decides_and_relative_sqlite_paths_become_absolute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://tracking:5000")
    assert tracking_uri() == "http://tracking:5000"
    assert artifact_location(tracking_uri()) is None
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///runs/my.db")
    assert tracking_uri() == f"sqlite:///{tmp_path}/runs/my.db"
    assert artifact_location(tracking_uri()) == f"file://{tmp_path}/runs/mlartifacts"


def test_a_server_that_does_not_answer_is_reported_at_once() -> None:
    started = time.monotonic()
    with pytest.raises(
        TrackingError, match=r"no MLflow server answers at http://127\.0\.0\.1:9 .*MLFLOW_TRACKING_URI"
    ):
        connect("http://127.0.0.1:9")
    assert time.monotonic() - started < 5


@pytest.mark.parametrize("uri", ["./mlruns", "ftp://somewhere", "sqlite:///{tmp_path}/absent/mlflow.db"])
def test_unusable_uris_say_what_to_correct(uri: str, tmp_path: Path) -> None:
    with pytest.raises(TrackingError, match="MLFLOW_TRACKING_URI") as error:
        connect(uri.format(tmp_path=tmp_path))
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_two_processes_may_create_the_same_store_at_once(tmp_path: Path) -> None:
    code = (
        "import sys; from llama_ray.tracking.runs import Run; "
        "print(Run.create(experiment='same', name=sys.argv[2], params={}, tags={}, description='', "
        "uri=sys.argv[1]).experiment_id)"
    )
    command = [sys.executable, "-c", code, f"sqlite:///{tmp_path}/mlflow.db"]
    both = [
        subprocess.Popen([*command, name], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for name in "ab"
    ]
    ends = [process.communicate(timeout=120) for process in both]
    assert [process.returncode for process in both] == [0, 0], ends
    assert ends[0][0] == ends[1][0]
