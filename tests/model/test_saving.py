"""What saving a model does to a model that the directory holds already."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from llama_ray.data.tokenizing.tokenizer import Tokenizer
from llama_ray.model.checkpoint import load_model
from llama_ray.model.llama import Llama
from llama_ray.model.saving import save_model
from llama_ray.model.weight_files import CheckpointError
from llama_ray.pretrained import load_pretrained, save_pretrained
from tests.small_models import random_model, small_config, small_tokenizer

OLD_TEXT, NEW_TEXT = "old words of an older text", "new letters for a newer one"
SHARD_BYTES = {"one file": 2**30, "shards": 40_000, "more shards": 20_000}


def model(seed: int, hidden_size: int = 32) -> Llama:
    return random_model(small_config(300, hidden_size=hidden_size), seed)


def weight_files(directory: Path) -> set[str]:
    return {file.name for file in directory.glob("model*")}


@pytest.mark.parametrize("old", SHARD_BYTES)
@pytest.mark.parametrize("new", SHARD_BYTES)
def test_a_save_leaves_only_its_own_weights(tmp_path: Path, old: str, new: str) -> None:
    save_model(model(1), tmp_path / "saved", max_shard_bytes=SHARD_BYTES[old])
    (tmp_path / "saved" / "model-notes.txt").write_text("the user's")
    save_model(model(2), tmp_path / "saved", max_shard_bytes=SHARD_BYTES[new])
    save_model(model(2), tmp_path / "alone", max_shard_bytes=SHARD_BYTES[new])
    assert weight_files(tmp_path / "saved") == weight_files(tmp_path / "alone") | {"model-notes.txt"}
    peer = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    for loaded in (load_model(tmp_path / "saved").embed_tokens, peer.model.embed_tokens):
        assert torch.equal(loaded.weight, model(2).embed_tokens.weight)


def test_shards_of_other_names_are_gone_with_their_index(tmp_path: Path) -> None:
    save_model(model(1), tmp_path, max_shard_bytes=20_000)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(index.read_text().replace("model-00001-of-", "first-"))
    [first] = tmp_path.glob("model-00001-*")
    first.rename(tmp_path / first.name.replace("model-00001-of-", "first-"))
    assert torch.equal(load_model(tmp_path).norm.weight, model(1).norm.weight)
    save_model(model(2), tmp_path)
    assert [file.name for file in tmp_path.glob("*.safetensors*")] == ["model.safetensors"]


def test_one_file_beside_the_shards_of_another_save_is_read_as_transformers_reads_it(tmp_path: Path) -> None:
    save_model(model(1), tmp_path, max_shard_bytes=20_000)
    save_model(model(2), tmp_path / "new")
    shutil.copy(tmp_path / "new" / "model.safetensors", tmp_path)
    peer = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(load_model(tmp_path).norm.weight, peer.model.norm.weight)


def test_the_checkpoint_of_a_training_run_is_not_saved_over(tmp_path: Path) -> None:
    (tmp_path / "model-rank00000.safetensors").write_bytes(b"weights")
    with pytest.raises(
        CheckpointError, match=r"is a checkpoint of a training run .*; give another directory"
    ):
        save_pretrained(model(1), None, tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["model-rank00000.safetensors"]


OTHER_FILES = (
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "chat_template.jinja",
)


def save_old_tokenizer(directory: Path) -> Tokenizer:
    """Save a tokenizer with all files that other libraries may have put beside it."""
    tokenizer = small_tokenizer([OLD_TEXT])
    tokenizer.save(directory)
    for name in OTHER_FILES:
        (directory / name).write_text("{}")
    (directory / "additional_chat_templates").mkdir()
    (directory / "additional_chat_templates" / "tools.jinja").write_text("{{ old }}")
    return tokenizer


def test_files_of_another_tokenizer_are_gone(tmp_path: Path) -> None:
    save_old_tokenizer(tmp_path)
    new = small_tokenizer([NEW_TEXT])
    save_pretrained(model(1), new, tmp_path)
    assert not [name for name in OTHER_FILES if (tmp_path / name).exists()]
    assert AutoTokenizer.from_pretrained(tmp_path).chat_template is None
    loaded = load_pretrained(tmp_path)[1]
    assert loaded is not None
    assert loaded.fingerprint == new.fingerprint


def test_a_model_without_a_tokenizer_has_none_afterwards(tmp_path: Path) -> None:
    save_old_tokenizer(tmp_path)
    (tmp_path / "README.md").write_text("the user's")
    save_pretrained(model(1), None, tmp_path)
    assert load_pretrained(tmp_path)[1] is None
    assert {file.name for file in tmp_path.iterdir() if file.is_file()} == {
        "README.md", "config.json", "generation_config.json", "model.safetensors",
    }  # fmt: skip


def test_saving_a_model_where_it_came_from_loses_nothing(tmp_path: Path) -> None:
    save_pretrained(model(1), save_old_tokenizer(tmp_path), tmp_path)
    (tmp_path / "tokenizer.model").write_text("the same vocabulary")
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    (tmp_path / "special_tokens_map.json").write_text('{"pad_token": "<|end_of_text|>"}')
    loaded, tokenizer = load_pretrained(tmp_path)
    save_pretrained(loaded, tokenizer, tmp_path)
    assert (tmp_path / "tokenizer.model").read_text() == "the same vocabulary"
    peer = AutoTokenizer.from_pretrained(tmp_path)
    assert (peer.chat_template, peer.pad_token) == ("{{ messages }}", "<|end_of_text|>")


class Killed(BaseException):
    pass


class Killer:
    """Lets this process change a number of names in files' directories, and none after that, as if it were killed."""

    def __init__(self) -> None:
        self.left: int | None = None
        sys.addaudithook(self._watch)

    def _watch(self, event: str, arguments: tuple[object, ...]) -> None:
        if self.left is not None and event in ("os.rename", "os.remove"):
            if self.left == 0:
                raise Killed
            self.left -= 1


@pytest.fixture(scope="module")
def killer() -> Killer:
    # A hook cannot be removed.
    return Killer()


@pytest.mark.parametrize(("old", "new"), [("shards", "one file"), ("one file", "more shards")])
def test_a_save_that_is_killed_never_leaves_a_mix(tmp_path: Path, killer: Killer, old: str, new: str) -> None:
    words, new_words = small_tokenizer([OLD_TEXT]), small_tokenizer([NEW_TEXT])
    small, large = model(1), model(2, hidden_size=48)
    outcomes: list[str] = []
    for changes in range(40):
        directory = tmp_path / str(changes)
        save_model(small, directory, max_shard_bytes=SHARD_BYTES[old], beside=words.files())
        killer.left = changes
        try:
            save_model(large, directory, max_shard_bytes=SHARD_BYTES[new], beside=new_words.files())
            done = True
        except Killed:
            done = False
        killer.left = None
        if not (directory / "config.json").exists():
            with pytest.raises(CheckpointError, match=r"holds no config\.json; its last save was cut short"):
                load_pretrained(directory)
            outcomes.append("refused")
            continue
        found, tokenizer = load_pretrained(directory)
        assert tokenizer is not None
        is_old = found.config == small.config
        for loaded, expected in zip(
            found.parameters(), (small if is_old else large).parameters(), strict=True
        ):
            assert torch.equal(loaded, expected)
        assert tokenizer.fingerprint == (words if is_old else new_words).fingerprint
        outcomes.append("old" if is_old else "new")
        if done:
            break
    # Before the first change all new files are complete.
    assert list(dict.fromkeys(outcomes)) == ["old", "refused", "new"]
    assert outcomes == sorted(outcomes, key=["old", "refused", "new"].index)
    assert outcomes.count("old") == 1


def test_saving_the_same_shape_again_replaces_one_file_and_nothing_else(tmp_path: Path) -> None:
    tokenizer = small_tokenizer([OLD_TEXT])
    save_pretrained(model(1), tokenizer, tmp_path)
    before = {file.name: file.stat().st_ino for file in tmp_path.iterdir()}
    save_pretrained(model(2), tokenizer, tmp_path)
    after = {file.name: file.stat().st_ino for file in tmp_path.iterdir()}
    assert {name for name in before if before[name] != after[name]} == {"model.safetensors"}
    assert before.keys() == after.keys()


def test_a_save_that_fails_leaves_the_old_model_and_no_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_model(model(1), tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    with pytest.raises(TypeError):
        save_model(model(2), tmp_path, eos_id=object())  # type: ignore[arg-type]
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before
    assert json.loads(before["config.json"])["eos_token_id"] is None
