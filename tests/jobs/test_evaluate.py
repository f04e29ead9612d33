from __future__ import annotations

import json
from pathlib import Path

import pytest

from llama_ray.evaluation.results import Evaluation
from llama_ray.pretrained import save_pretrained
from tests.jobs.helpers import run_here
from tests.small_models import random_model, small_config, small_tokenizer

TEXT = "The quick brown fox jumps over the lazy dog. " * 30


@pytest.fixture
def model(tmp_path: Path) -> Path:
    tokenizer = small_tokenizer((TEXT,)).for_documents()
    save_pretrained(random_model(small_config(tokenizer.vocab_size)), tokenizer, tmp_path / "model")
    (tmp_path / "fox.txt").write_text(TEXT)
    return tmp_path / "model"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ((), "there is nothing to measure"),
        (("--text", "nothing.txt"), "holds no text"),
        (("--text", "fox.txt", "--context", "300"), "context is 300; it must be from 1 to 256"),
        (("--text", "fox.txt", "--limit", "0"), "limit is 0; it must be at least 1"),
        (("--text", "fox.txt", "--dtype", "int8"), "dtype is int8; choose float32"),
        (
            ("--text", "fox.txt", "--promote_if", "acc < champion"),
            "promote_if needs one model, a registered version",
        ),
        (("--text", "fox.txt", "--promote_if", "acc"), "'acc' is no condition"),
        (("--text", "fox.txt", "--endpoint", "http://127.0.0.1:9/v1"), "endpoint needs --tokenizer"),
        (("--data", "fox.txt"), "fox.txt"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_one_line(
    model: Path, monkeypatch: pytest.MonkeyPatch, flags: tuple[str, ...], message: str
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    done = run_here("evaluate.py", str(model), *flags, "--mlflow", "false", cwd=model.parent)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


def test_models_are_measured_in_windows_that_all_of_them_read(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    tokenizer = small_tokenizer((TEXT,)).for_documents()
    shorter = random_model(small_config(tokenizer.vocab_size, max_seq_len=64), seed=2)
    save_pretrained(shorter, tokenizer, tmp_path / "shorter")
    flags = ("--text", "fox=fox.txt", "--mlflow", "false", "--output", "found")
    done = run_here("evaluate.py", "model", "shorter", *flags, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "fox/bits_per_byte" in done.stdout
    results = json.loads((tmp_path / "found" / "results.json").read_text())
    first, second = (Evaluation.from_json(json.dumps(each)) for each in results)
    assert first.settings_fingerprint == second.settings_fingerprint
    assert first.settings["context"] == 64
    assert "fox/bits_per_byte" in (tmp_path / "found" / "results.md").read_text()
    twice = run_here("evaluate.py", "model", str(model), *flags, cwd=tmp_path)
    assert "is given twice" in twice.stderr
