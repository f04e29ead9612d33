from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from llama_ray.model.weight_files import CheckpointError
from llama_ray.pretrained import load_pretrained, load_tokenizer, resolve
from llama_ray.storage import run_directory
from tests.small_models import save_small_model


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, str]:
    """A directory with a model, as an object store has it, and its URI."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    directory = save_small_model(tmp_path / "store" / "model")
    (directory / "optimizer-rank00000.safetensors").write_bytes(b"large")
    return directory, f"file://{directory}"


def test_a_model_is_fetched_once_without_its_optimizer(store: tuple[Path, str]) -> None:
    directory, uri = store
    expected = load_pretrained(directory)[0].state_dict()
    loaded, tokenizer = load_pretrained(uri)
    assert all(torch.equal(weight, expected[name]) for name, weight in loaded.state_dict().items())
    assert tokenizer is not None
    copy = resolve(uri)
    assert copy != directory
    assert {path.name for path in copy.iterdir()} == {
        path.name for path in directory.iterdir() if not path.name.startswith("optimizer")
    }
    before = {path: path.stat().st_mtime_ns for path in copy.iterdir()}
    assert {path: path.stat().st_mtime_ns for path in resolve(uri).iterdir()} == before


def test_a_model_that_was_replaced_is_fetched_again(store: tuple[Path, str]) -> None:
    directory, uri = store
    before = resolve(uri)
    weights = directory / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-4:] = b"\0\0\0\0"
    weights.write_bytes(content)
    os.utime(weights, ns=(1, 1))
    after = resolve(uri)
    assert after != before
    assert (after / "model.safetensors").read_bytes() == content


def test_files_of_two_versions_are_not_mixed(
    store: tuple[Path, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    directory, uri = store
    read_marker = run_directory.read_marker

    def replaced_meanwhile(location: str) -> dict[str, Any] | None:
        """What is called when the files are known, and none of them is read yet."""
        weights = directory / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[::-1])
        os.utime(weights, ns=(1, 1))
        return read_marker(location)

    with monkeypatch.context() as patched:
        patched.setattr(run_directory, "read_marker", replaced_meanwhile)
        with pytest.raises(CheckpointError, match="was replaced while it was fetched; try again"):
            resolve(uri)
    content = (directory / "model.safetensors").read_bytes()
    assert (resolve(uri) / "model.safetensors").read_bytes() == content


def test_a_tokenizer_is_fetched_without_the_weights(store: tuple[Path, str]) -> None:
    _, uri = store
    assert load_tokenizer(uri) is not None
    assert not list(resolve(uri, weights=False).glob("*.safetensors"))


@pytest.mark.parametrize("name", ["nothing", "nothing.gguf"])
def test_a_place_without_a_model_is_refused(store: tuple[Path, str], name: str) -> None:
    with pytest.raises(CheckpointError, match=f"{name} holds no files"):
        resolve(f"file://{store[0].parent}/{name}")
