"""Runs and versions through a real MLflow server: metrics, artifacts and weights go over HTTP."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import mlflow
import pytest

from llama_ray.tracking.registry import Version, download, promote, register, resolve_version
from llama_ray.tracking.runs import Run


@pytest.fixture(scope="module")
def run(server: str) -> Run:
    run = Run.create(experiment="http", name="r", params={"a": 1}, tags={}, description="", uri=server)
    run.log_metrics({"loss/validation": 1.5, "loss/train": float("nan")}, step=7)
    return run


@pytest.fixture(scope="module")
def version(run: Run, checkpoint: Path, echo_model: Path) -> Version:
    return register(
        run,
        name="http-model",
        checkpoint=checkpoint,
        python_model=echo_model,
        validation_loss=1.5,
        data_fingerprint="books",
        tags={},
        description="",
    )


def test_a_worker_attaches_and_continues(run: Run, server: str) -> None:
    attached = Run.attach(run.run_id, server)
    assert attached.last_steps().get("loss/train") == 7
    assert attached.last_steps().get("loss/validation") == 7
    attached.log_text("text", "a/b.txt")
    path = mlflow.artifacts.download_artifacts(
        run_id=run.run_id, artifact_path="a/b.txt", tracking_uri=server
    )
    assert Path(path).read_text() == "text"
    page = f"{server}/#/experiments/{run.experiment_id}/runs/{run.run_id}"
    assert run.url == f"{page}?workflowType=machine_learning"


def test_a_version_is_fetched_once_by_several_processes(
    version: Version, server: str, checkpoint: Path, tmp_path: Path
) -> None:
    promote("http-model", version.version, policy="if_better", uri=server)
    assert resolve_version("models:/http-model@champion", server) == version
    code = (
        "import sys; from pathlib import Path; from llama_ray.tracking.registry import download;"
        "print(download('models:/http-model@champion', sys.argv[1], Path(sys.argv[2])))"
    )
    command = [sys.executable, "-c", code, server, str(tmp_path)]
    processes = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        for _ in range(2)
    ]
    outputs = [process.communicate(timeout=120)[0].strip() for process in processes]
    folder = download(version.uri, server, tmp_path)
    assert outputs == [str(folder), str(folder)]
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {
        path.name: path.read_bytes() for path in checkpoint.iterdir()
    }
    before = folder.stat().st_mtime_ns
    assert download(version.uri, server, tmp_path) == folder
    assert folder.stat().st_mtime_ns == before
    assert [path for path in folder.parent.iterdir() if path.is_dir()] == [folder]


def test_a_partial_download_of_a_killed_process_is_replaced(
    version: Version, server: str, tmp_path: Path
) -> None:
    folder = download(version.uri, server, tmp_path)
    (folder / "config.json").unlink()
    (folder / "half").touch()
    folder.rename(folder.with_name(f".{folder.name}.partial"))
    assert download(version.uri, server, tmp_path) == folder
    assert (folder / "config.json").is_file()
    assert not (folder / "half").exists()


def test_the_model_loads_through_the_server(
    version: Version, server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server)
    assert mlflow.pyfunc.load_model(version.uri).predict(["hi"]) == ["llama:hi:100:0.9"]
