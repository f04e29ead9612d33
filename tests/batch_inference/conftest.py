"""A small model, and rows for it, shared by the tests of batch inference."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from llama_ray.data.tokenizer import Tokenizer
from llama_ray.model.config import LlamaConfig
from llama_ray.model.llama import Llama
from llama_ray.pretrained import save_pretrained


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("batch-checkpoint")
    tokenizer = Tokenizer.train(iter(["The quick brown fox. 漢字 🙂"] * 5), 300)
    config = LlamaConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=32,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        intermediate_size=64,
        max_seq_len=256,
    )
    torch.manual_seed(0)
    save_pretrained(Llama(config), tokenizer, directory)
    return directory


def write_rows(file: Path, rows: list[Any]) -> Path:
    """One line a row; a string is written as it is."""
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = (row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows)
    file.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return file


def read_rows(file: Path | str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(file).read_text(encoding="utf-8").splitlines()]
