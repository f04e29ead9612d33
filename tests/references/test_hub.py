from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from llama_ray.model.weight_files import CheckpointError
from llama_ray.pretrained import fixed, load_pretrained, load_tokenizer, resolve
from tests.data.sources.web_server import COMMIT, Web, hub_contents, web_server
from tests.small_models import FOX, save_small_model


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return save_small_model(tmp_path / "model")


@pytest.fixture
def hub(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Web]:
    files = {path.name: path.read_bytes() for path in model.iterdir()}
    more = {"original/consolidated.00.safetensors": b"the same again", "README.md": b"about it"}
    with web_server(hub_contents(files | more, "models")) as server:
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setenv("HF_ENDPOINT", server.url(""))
        yield server


@pytest.mark.parametrize("ref", ["hf://owner/name", "hf://owner/name@v1", f"hf://owner/name@{COMMIT}"])
def test_a_model_of_the_hub_is_that_of_its_directory(hub: Web, model: Path, ref: str) -> None:
    loaded, tokenizer = load_pretrained(ref)
    expected = load_pretrained(model)[0].state_dict()
    assert all(torch.equal(weight, expected[name]) for name, weight in loaded.state_dict().items())
    assert tokenizer is not None
    assert tokenizer.decode(tokenizer.encode(FOX)) == FOX
    assert fixed(ref) == f"hf://owner/name@{COMMIT}"


def test_what_is_of_no_use_is_not_fetched(hub: Web, model: Path) -> None:
    tokenizer = load_tokenizer("hf://owner/name")
    assert tokenizer is not None
    described = {path.name for path in resolve("hf://owner/name", weights=False).rglob("*") if path.is_file()}
    assert described == {path.name for path in model.glob("*.json")}
    whole = {path.name for path in resolve("hf://owner/name").rglob("*") if path.is_file()}
    assert whole == {path.name for path in model.iterdir()}


def test_a_model_that_was_fetched_is_found_without_the_hub(
    hub: Web, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = resolve("hf://owner/name")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert resolve(f"hf://owner/name@{COMMIT}") == before
    assert resolve(fixed("hf://owner/name")) == before


def test_a_model_that_is_there_in_part_is_refused_without_the_hub(
    hub: Web, monkeypatch: pytest.MonkeyPatch
) -> None:
    resolve(f"hf://owner/name@{COMMIT}", weights=False)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    # The client tries again for half a minute.
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    with pytest.raises(CheckpointError, match="cannot read 'hf://owner/name@"):
        resolve(f"hf://owner/name@{COMMIT}")


@pytest.mark.parametrize(
    ("ref", "message"),
    [
        ("hf://owner/nope", r"^cannot read 'hf://owner/nope' \(.*404.*\); check its name"),
        ("hf://owner/name/notes.txt", "names no model of the hub; give hf://ORG/NAME"),
        ("hf://", "names no model of the hub"),
    ],
)
def test_a_reference_to_nothing_is_refused_in_one_line(hub: Web, ref: str, message: str) -> None:
    for ask in (resolve, fixed):
        with pytest.raises(CheckpointError, match=message) as caught:
            ask(ref)
        assert "\n" not in str(caught.value)


def test_a_hub_that_cannot_be_reached_is_said_in_one_line(hub: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    for ask in (resolve, fixed):
        with pytest.raises(CheckpointError, match=r"^cannot read 'hf://owner/name' \(") as caught:
            ask("hf://owner/name")
        assert "\n" not in str(caught.value)
