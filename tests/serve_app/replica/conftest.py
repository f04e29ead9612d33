"""Versions with different weights, and a garbage collector as in a replica."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

from llama_ray.pretrained import save_pretrained
from serve_app.registry.messages import ModelVersion
from tests.serve_app.replica.helpers import version
from tests.small_models import random_model, small_config, small_tokenizer


@pytest.fixture(scope="session")
def versions(tmp_path_factory: pytest.TempPathFactory) -> list[ModelVersion]:
    """Three versions with different weights."""
    tokenizer, folder = small_tokenizer(), tmp_path_factory.mktemp("versions")
    for seed in range(3):
        model = random_model(small_config(tokenizer.vocab_size), seed)
        save_pretrained(model, tokenizer, folder / f"v{seed}")
    return [version(folder / f"v{seed}") for seed in range(3)]


@pytest.fixture(scope="package", autouse=True)
def frozen_objects() -> Iterator[None]:
    """Let collections skip what exists already, which takes most of their time; Ray Serve does so in a replica."""
    gc.freeze()
    yield
    gc.unfreeze()
