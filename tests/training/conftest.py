"""The data, the model and the finished run that training tests share."""

from __future__ import annotations

from pathlib import Path

import pytest

from llama_ray.model.config import LlamaConfig
from llama_ray.training.loop import train
from tests.token_data import write_dataset
from tests.training.helpers import CPU, TWELVE_STEPS, FinishedRun, Recorder


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data") / "small")


@pytest.fixture(scope="session")
def tiny() -> LlamaConfig:
    return LlamaConfig.preset("llama-tiny", max_seq_len=32)


@pytest.fixture(scope="session")
def finished(tiny: LlamaConfig, dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> FinishedRun:
    """A run of `TWELVE_STEPS` on one worker, from start to end."""
    directory = tmp_path_factory.mktemp("run")
    recorder = Recorder()
    progress = train(tiny, TWELVE_STEPS, dataset, device=CPU, observer=recorder, output_dir=str(directory))
    return FinishedRun(recorder, progress, directory)
