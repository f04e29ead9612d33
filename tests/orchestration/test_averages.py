from __future__ import annotations

from pathlib import Path

import pytest
import torch
from mlflow import MlflowClient

from llama_ray.exporting.averages import AverageConfig
from llama_ray.orchestration.averages import register_average
from llama_ray.pretrained import load_pretrained, save_pretrained
from tests.small_models import random_model, small_config, small_tokenizer


def test_an_average_is_a_version_that_names_its_parents(
    tmp_path: Path, store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    tokenizer, parents = small_tokenizer(), [str(tmp_path / name) for name in "ab"]
    for seed, parent in enumerate(parents):
        save_pretrained(random_model(small_config(tokenizer.vocab_size), seed), tokenizer, parent)
    config = AverageConfig(refs=tuple(parents), weights=(3, 1))
    version = register_average(config, "averaged", "averages", lambda _: None)
    model, loaded = load_pretrained(version.uri)
    first, second = (load_pretrained(parent)[0].norm.weight for parent in parents)
    torch.testing.assert_close(model.norm.weight, 0.75 * first + 0.25 * second)
    assert loaded is not None
    assert loaded.fingerprint == tokenizer.fingerprint
    found = MlflowClient(store).get_model_version("averaged", version.version)
    assert found.tags["parents"] == ", ".join(parents)
    assert f"0.7500 of `{parents[0]}`" in found.description
    # The same weights are not registered again.
    assert register_average(config, "averaged", "averages", lambda _: None) == version
