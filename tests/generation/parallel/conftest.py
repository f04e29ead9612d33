from __future__ import annotations

from pathlib import Path

import pytest

from llama_ray.data.tokenizing.tokenizer import Tokenizer
from llama_ray.model.llama import Llama
from llama_ray.pretrained import save_pretrained


@pytest.fixture(scope="session")
def saved(model: Llama, tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("saved")
    save_pretrained(model, tokenizer, directory)
    return directory
