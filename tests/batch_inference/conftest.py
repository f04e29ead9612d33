"""A small model shared by the tests of batch inference."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from llama_ray.data.tokenizer import Tokenizer
from llama_ray.model.config import LlamaConfig
from llama_ray.model.llama import Llama
from llama_ray.pretrained import save_pretrained
from tests.batch_inference.helpers import write_rows


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


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    """An input of 100 rows."""
    return write_rows(tmp_path / "in" / "prompts.jsonl", [{"prompt": f"The quick {i}"} for i in range(100)])
