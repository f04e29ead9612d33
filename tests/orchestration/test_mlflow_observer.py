from __future__ import annotations

from pathlib import Path

import pytest
from mlflow import MlflowClient

from llama_ray.data.dataset.info import read_info
from llama_ray.data.mixtures.sources import parse_sources
from llama_ray.orchestration.mlflow_observer import MLflowObserver
from llama_ray.storage import store
from llama_ray.tracking.buffer import BufferedRun
from llama_ray.tracking.runs import Run
from llama_ray.training.checkpointing.progress import Progress
from llama_ray.training.config import TrainConfig
from tests.object_store import s3_server, uri
from tests.token_data import write_dataset, write_documents
from tests.training.helpers import schedule_of


def test_its_prompts_do_not_fill_a_cache_that_is_switched_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    data = write_dataset(tmp_path / "data")
    with s3_server() as port:
        location = uri(port, "data")
        store.make_directory(location)
        for path in data.iterdir():
            store.upload(path, store.join(location, path.name))
        MLflowObserver(None, parse_sources(location), str(tmp_path / "run"), cache_bytes=0)
    assert not list((tmp_path / ".cache/llama_ray/data").glob("*/*.bin*"))


def test_a_validation_split_may_be_shorter_than_a_prompt(tmp_path: Path) -> None:
    data = write_dataset(tmp_path / "data")
    write_documents(data, {"validation": [[range(10)]]}, read_info(data).tokenizer)
    # Raises nothing.
    MLflowObserver(None, parse_sources(data), str(tmp_path / "run"))


def test_restarts_are_those_of_the_run_and_not_of_an_attempt_of_the_same_name(tmp_path: Path) -> None:
    data = write_dataset(tmp_path / "data")

    def new_run() -> Run:
        return Run.create(
            experiment="tests", name="same", params={}, tags={}, description="",
            uri=f"sqlite:///{tmp_path}/mlflow.db",
        )  # fmt: skip

    def tags_after_start(run: Run, step: int) -> dict[str, str]:
        buffered = BufferedRun(run.run_id, run.uri)
        observer = MLflowObserver(buffered, parse_sources(data), str(tmp_path / "same"))
        observer.started(schedule_of(TrainConfig(max_steps=9)), Progress(step=step), "ddp")
        assert buffered.close()
        tags = MlflowClient(run.uri).get_run(run.run_id).data.tags
        return {name: value for name, value in tags.items() if name.startswith("restart")}

    assert tags_after_start(new_run(), 0) == {}
    # The attempt died before its first checkpoint, and the launch is repeated.
    again = new_run()
    assert tags_after_start(again, 0) == {}
    assert tags_after_start(again, 3) == {"restarts": "1", "restart.1": "after step 3, 1 workers"}
