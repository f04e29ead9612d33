from __future__ import annotations

import shutil
import subprocess
import sys
import time
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

import pytest

from llama_ray.tracking.errors import TrackingError
from llama_ray.tracking.registry import download, register
from llama_ray.tracking.runs import Run
from llama_ray.tracking.uri import artifact_location, connect, sqlite_path, tracking_uri


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


ODD_NAMES = ["run#3", "what?", "a%20b", "a b", "Übung", "a@b:c", "a;b&c=d"]


@pytest.mark.parametrize("name", ODD_NAMES)
def test_a_directory_of_any_name_holds_its_database_and_its_artifacts(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / name)
    uri = tracking_uri()
    assert sqlite_path(uri) == tmp_path / name / "mlflow.db"
    # Read again, as another process does that gets it in its environment.
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    assert tracking_uri() == uri
    location = artifact_location(uri)
    assert location is not None
    assert Path(url2pathname(urlsplit(location).path)) == tmp_path / name / "mlartifacts"


def test_a_run_and_its_model_are_stored_in_a_directory_of_any_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, store: str, checkpoint: Path, echo_model: Path
) -> None:
    folder = tmp_path / "run#3 100%25 of what? Übung"
    folder.mkdir()
    # A copy of a database with its tables, which take seconds to make.
    connect(store)
    shutil.copy(str(sqlite_path(store)), folder / "mlflow.db")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(folder)
    run = Run.create(experiment="odd", name="r", params={}, tags={}, description="")
    run.log_text("hello", "a/b.txt")
    version = register(
        run,
        name="odd",
        checkpoint=checkpoint,
        python_model=echo_model,
        validation_loss=1.0,
        data_fingerprint="d",
        tags={},
        description="",
    )
    assert (folder / "mlartifacts" / run.run_id / "artifacts" / "a" / "b.txt").read_text() == "hello"
    assert download(version.uri).is_relative_to(folder / "mlartifacts")
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]


@pytest.mark.parametrize("uri", ["sqlite://", "sqlite:///:memory:", "sqlite:///?timeout=3"])
def test_a_database_in_memory_is_refused_because_processes_share_it(uri: str) -> None:
    with pytest.raises(TrackingError, match="names no file, which all processes share; give http"):
        connect(uri)


def test_options_of_a_database_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///my.db?timeout=30")
    assert tracking_uri() == f"sqlite:///{tmp_path}/my.db?timeout=30"


@pytest.mark.parametrize("uri", ["databricks", "databricks://profile"])
def test_databricks_is_left_to_mlflow(uri: str) -> None:
    assert connect(uri).tracking_uri == uri
