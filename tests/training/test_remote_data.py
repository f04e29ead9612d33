"""Data in an object store train as the directory does that they were copied from."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from llama_ray.model.config import LlamaConfig
from llama_ray.storage import store
from llama_ray.training.loop import train
from tests.object_store import s3_server, uri
from tests.training.helpers import CPU, TWELVE_STEPS, FinishedRun, Recorder


def test_a_run_goes_on_with_a_copy_of_its_data(
    finished: FinishedRun, tiny: LlamaConfig, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    recorder = Recorder()
    with s3_server() as port:
        location = uri(port, "data")
        store.make_directory(location)
        for path in dataset.iterdir():
            store.upload(path, store.join(location, path.name))
        train(
            tiny, replace(TWELVE_STEPS, data_cache_bytes=2**20), location, device=CPU, observer=recorder,
            output_dir=str(tmp_path / "run"), resume_from=finished.checkpoint(10),
        )  # fmt: skip
    assert {step: metrics["loss/train"] for step, metrics in recorder.points.items()} == {
        step: finished.recorder.points[step]["loss/train"] for step in (11, 12)
    }
    assert recorder.validations[12] == finished.recorder.validations[12]
    assert (tmp_path / "run" / "step_00000012" / "tokenizer.json").is_file()
    assert list((tmp_path / ".cache/llama_ray/data").glob("*/train-00000.bin*"))
