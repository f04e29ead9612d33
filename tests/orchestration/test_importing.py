from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from mlflow import MlflowClient

from llama_ray.data.chat.template import ChatPrompt
from llama_ray.data.tokenizing.tokenizer import Tokenizer
from llama_ray.generation.engine import Engine
from llama_ray.model.weight_files import CheckpointError
from llama_ray.orchestration.importing import ImportConfig, import_checkpoint
from llama_ray.orchestration.peer_check import check_against_transformers
from llama_ray.pretrained import load_pretrained, resolve, save_pretrained
from llama_ray.tracking.registry import PromotionDecision, Version, resolve_version
from tests.small_models import random_model, small_config, small_tokenizer

TEMPLATE = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}[assistant]"
CONFIG = ImportConfig(register_as="imported")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tied model in bf16, with a chat template and two tokens that end an answer."""
    directory = tmp_path_factory.mktemp("source")
    tokenizer = small_tokenizer()
    tokenizer.save(directory)
    (directory / "chat_template.jinja").write_text(TEMPLATE)
    tokenizer = Tokenizer.load(directory)
    model = random_model(small_config(tokenizer.vocab_size, tie_embeddings=True))
    save_pretrained(model.to(torch.bfloat16), tokenizer, directory)
    generation = {"eos_token_id": [tokenizer.eos_id, 9], "temperature": 0.6}
    (directory / "generation_config.json").write_text(json.dumps(generation))
    return directory


@pytest.fixture(scope="module")
def registry(store: str) -> Iterator[str]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", store)
        yield store


@pytest.fixture(scope="module")
def imported(source: Path, registry: str) -> tuple[Version, PromotionDecision | None, list[str]]:
    lines: list[str] = []
    version, decision = import_checkpoint(str(source), replace(CONFIG, promote=True), lines.append)
    return version, decision, lines


Imported = tuple[Version, PromotionDecision | None, list[str]]


def test_a_version_answers_as_the_model_that_was_imported(imported: Imported, source: Path) -> None:
    version, decision, _ = imported
    assert decision is not None
    assert decision.promoted
    assert resolve_version("models:/imported@champion") == version
    engine, peer = (Engine.from_pretrained(ref, device="cpu") for ref in (version.uri, source))
    assert engine.eos_ids == peer.eos_ids == {9, *_eos(source)}
    for name, weight in load_pretrained(source)[0].state_dict().items():
        assert torch.equal(load_pretrained(version.uri)[0].state_dict()[name], weight), name
    assert engine.tokenizer is not None
    prompt = ChatPrompt([{"role": "user", "content": "Hi"}])
    assert engine.tokenizer.render_chat(prompt).text == "[user]Hi[assistant]"


def test_what_it_was_made_from_is_seen_in_mlflow(imported: Imported, source: Path, registry: str) -> None:
    version, _, lines = imported
    assert version.tags["parent"] == str(source)
    assert f"Imported from `{source}`" in version.description
    assert lines[0].endswith("parameters in bfloat16")
    assert lines[1].startswith("logits as those of transformers, to ")
    assert lines[1] in version.description
    run = MlflowClient(registry).get_run(version.run_id)
    assert (run.info.status, run.data.tags["parent"]) == ("FINISHED", str(source))


def test_other_servers_find_the_settings_of_generation(imported: Imported) -> None:
    file = resolve(imported[0].uri) / "generation_config.json"
    generation = json.loads(file.read_text())
    assert generation["temperature"] == 0.6
    assert 9 in generation["eos_token_id"]


def test_the_same_weights_are_registered_once(imported: Imported, source: Path) -> None:
    again, decision = import_checkpoint(str(source), replace(CONFIG, verify=False), print)
    assert (again, decision) == (imported[0], None)


def test_a_dtype_may_be_chosen_and_is_compared_as_rounded(source: Path, registry: str) -> None:
    lines: list[str] = []
    version, _ = import_checkpoint(str(source), replace(CONFIG, dtype="float16"), lines.append)
    assert load_pretrained(version.uri)[0].embed_tokens.weight.dtype == torch.float16
    assert "bfloat16 to float16" in lines[0]
    assert lines[1].startswith("logits as those of transformers")


def test_a_model_without_a_tokenizer_is_refused(registry: str, tmp_path: Path) -> None:
    save_pretrained(random_model(small_config(300)), None, tmp_path)
    with pytest.raises(CheckpointError, match=r"holds no tokenizer, which a served model needs; add its"):
        import_checkpoint(str(tmp_path), CONFIG, print)


def test_another_number_than_transformers_is_refused(source: Path, tmp_path: Path) -> None:
    model, tokenizer = load_pretrained(source)
    assert tokenizer is not None
    save_pretrained(model, tokenizer, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "rope_theta": 20_000.0}))
    found = check_against_transformers(source, tokenizer).difference
    assert found is not None
    assert found < 1e-5
    with pytest.raises(
        CheckpointError, match=r"logits differ from those of transformers by 0\.\d+ of the largest"
    ):
        check_against_transformers(source, tokenizer, tmp_path)


def _eos(source: Path) -> set[int]:
    tokenizer = Tokenizer.load(source)
    return {id for id in (tokenizer.eos_id,) if id is not None}
