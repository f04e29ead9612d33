from __future__ import annotations

import re
from pathlib import Path

import pytest

from llama_ray.pretrained import save_pretrained
from tests.jobs.helpers import run_here
from tests.small_models import random_model, small_config


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["nowhere", "--register_as", "a"],
            "error: .*nowhere is not a directory or a .gguf file; give one, hf://",
        ),
        (
            ["hf://one/two/three", "--register_as", "a"],
            "error: .* names no model of the hub; give hf://ORG/NAME",
        ),
        (["{model}", "--register_as", "a/b"], "error: 'a/b' cannot name a registered model"),
        (
            ["{model}", "--register_as", "a", "--dtype", "int8"],
            "error: --dtype is int8; it must be float32 or",
        ),
        (["{model}", "--register-as", "a"], "error: .*model holds no tokenizer, which a served model needs"),
    ],
)
def test_what_cannot_be_imported_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: list[str], message: str
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    save_pretrained(random_model(small_config(300)), None, tmp_path / "model")
    job = run_here("import_checkpoint.py", *(flag.format(model=tmp_path / "model") for flag in flags))
    assert job.returncode == 2
    assert re.match(message, job.stderr)
    assert job.stderr.count("\n") == 1
