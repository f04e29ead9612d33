"""The data and the shape that the training tests use."""

from __future__ import annotations

from pathlib import Path

import pytest

from llama_ray.model.config import LlamaConfig
from tests.datasets import write_dataset


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data") / "small")


@pytest.fixture(scope="session")
def tiny() -> LlamaConfig:
    return LlamaConfig.preset("llama-tiny", max_seq_len=32)
