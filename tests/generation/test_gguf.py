"""An engine whose model is a GGUF file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from llama_ray.generation.engine import Engine
from llama_ray.generation.memory import required_bytes
from llama_ray.generation.options import EngineOptions
from llama_ray.generation.sampling.params import SamplingParams
from llama_ray.model.end_of_text import stored_eos_ids
from llama_ray.model.llama import Llama
from llama_ray.pretrained import save_pretrained
from tests.model.gguf.helpers import write_model
from tests.small_models import random_model, small_config

PROMPT = [5, 7, 11, 13]


@pytest.fixture(scope="module")
def model() -> Llama:
    return random_model(small_config(300))


@pytest.fixture(scope="module")
def file(model: Llama, tmp_path_factory: pytest.TempPathFactory) -> Path:
    ends: dict[str, Any] = {"tokenizer.ggml.eos_token_id": 7, "tokenizer.ggml.eot_token_id": 9}
    return write_model(tmp_path_factory.mktemp("gguf") / "model.gguf", model, **ends)


@pytest.fixture(scope="module")
def directory(model: Llama, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("directory")
    save_pretrained(model, None, directory)
    return directory


@pytest.mark.parametrize("tensor_parallel", [1, 2])
def test_its_tokens_are_those_of_the_same_model_in_a_directory(
    file: Path, directory: Path, tensor_parallel: int
) -> None:
    params = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True)
    with (
        Engine.from_pretrained(file, device="cpu", tensor_parallel=tensor_parallel) as engine,
        Engine.from_pretrained(directory, device="cpu") as peer,
    ):
        [got], [expected] = engine.generate([PROMPT], params), peer.generate([PROMPT], params)
    assert got.token_ids == expected.token_ids


def test_its_ends_of_texts_and_turns_are_those_of_its_metadata(file: Path) -> None:
    assert stored_eos_ids(file, 300) == [7, 9]
    with pytest.raises(ValueError, match="eot_token_id is 9; it must be a token id of the model, 0 to 8"):
        stored_eos_ids(file, 9)


def test_it_needs_the_memory_of_its_weights_as_they_are_read(file: Path, directory: Path) -> None:
    options = EngineOptions(max_num_seqs=1)
    for dtype in (None, torch.bfloat16):
        needed = required_bytes(file, dtype, "cpu", options)
        assert needed == pytest.approx(required_bytes(directory, dtype, "cpu", options), rel=0.01)
