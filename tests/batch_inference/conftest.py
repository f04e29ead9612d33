"""A small model shared by the tests of batch inference."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.batch_inference.helpers import write_rows
from tests.small_models import save_small_model


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_small_model(tmp_path_factory.mktemp("batch-checkpoint"))


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    """An input of 100 rows."""
    return write_rows(tmp_path / "in" / "prompts.jsonl", [{"prompt": f"The quick {i}"} for i in range(100)])
