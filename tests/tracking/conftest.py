"""Runs and checkpoints for the SQLite store and the MLflow server that all tests share."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from llama_ray.tracking.runs import Run

ECHO_MODEL = """
import json
from pathlib import Path

import mlflow


class Echo(mlflow.pyfunc.PythonModel):
    def load_context(self, context):
        self.config = json.loads(Path(context.artifacts["checkpoint"], "config.json").read_text())

    def predict(self, context, model_input: list[str], params=None) -> list[str]:
        kind = self.config["model_type"]
        return [f"{kind}:{text}:{params['max_tokens']}:{params['top_p']}" for text in model_input]


mlflow.models.set_model(Echo())
"""


@pytest.fixture
def new_run(store: str) -> Callable[..., Run]:
    """Creates runs in the session's store."""

    def create(**changes: object) -> Run:
        options = {"params": {}, "tags": {}, "description": "", "uri": store}
        return Run.create(**{"experiment": "tests", "name": "a run", **options, **changes})  # type: ignore[arg-type]

    return create


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the files of a Hugging Face LLaMA, weights in two shards."""
    folder = tmp_path_factory.mktemp("hf") / "step_000100"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (folder / "tokenizer.json").write_text("{}")
    for shard in (1, 2):
        save_file(
            {f"w{shard}": torch.full((256,), shard)}, folder / f"model-{shard:05d}-of-00002.safetensors"
        )
    weight_map = {f"w{shard}": f"model-{shard:05d}-of-00002.safetensors" for shard in (1, 2)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


@pytest.fixture(scope="session")
def echo_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A models-from-code file that answers with its input, its parameters and the checkpoint's model type."""
    file = tmp_path_factory.mktemp("code") / "echo_model.py"
    file.write_text(ECHO_MODEL)
    return file
