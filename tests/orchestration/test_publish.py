"""A checkpoint becomes a version of the registry once."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch

from llama_ray.model.adapter_files import save_adapter
from llama_ray.model.adapters import add_adapters
from llama_ray.model.lora_config import LoraConfig
from llama_ray.model.weights_hash import weights_hash
from llama_ray.orchestration.publish import publish
from llama_ray.pretrained import load_pretrained, open_pretrained, resolve
from llama_ray.storage.run_directory import MARKER
from llama_ray.tracking.registry import PromotionDecision, Version
from llama_ray.tracking.runs import Run
from tests.small_models import save_small_model


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    uri = f"sqlite:///{tmp_path_factory.mktemp('mlflow')}/mlflow.db"
    return Run.create(experiment="tests", name="a run", params={}, tags={}, description="", uri=uri)


def test_weights_that_are_registered_are_not_registered_again(run: Run, tmp_path: Path) -> None:
    checkpoint = save_small_model(tmp_path / "checkpoint", max_seq_len=64)

    def publish_weights(sha256: str, loss: float) -> tuple[Version, PromotionDecision]:
        files = {"model-rank00000.safetensors": {"bytes": 1, "sha256": sha256}}
        (checkpoint / MARKER).write_text(json.dumps({"step": 5, "files": files}))
        return publish(
            run,
            checkpoint,
            name="small",
            precision="fp32",
            policy="if_better",
            validation_loss=loss,
            data_fingerprint="books",
            tags={"step": "5"},
            description="",
        )

    first, decision = publish_weights("a1", 2.0)
    assert decision.promoted
    again, decision = publish_weights("a1", 2.0)
    assert again.version == first.version == 1
    assert decision.reason == "version 1 is champion already"
    assert publish_weights("b2", 1.5)[0].version == 2
    assert publish_weights("a1", 2.0)[0].version == 1


def test_an_adapter_is_registered_alone_and_names_the_version_that_it_is_merged_into(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", run.uri)

    def publish_as(name: str, checkpoint: Path) -> Version:
        return publish(
            run,
            checkpoint,
            name=name,
            precision="bf16",
            policy="if_better",
            validation_loss=2.0,
            data_fingerprint="books",
            tags={},
            description="",
        )[0]

    base = publish_as("base", save_small_model(tmp_path / "base"))
    with ExitStack() as stack:
        stored = open_pretrained(base.uri, stack)
        base_weights = weights_hash(stored)
        model, tokenizer = load_pretrained(base.uri)
        assert tokenizer is not None
    add_adapters(model, LoraConfig(rank=2, alpha=4.0, targets=("up_proj",)))
    linear = model.layers[1].mlp.up_proj
    linear.factors()[1].data.fill_(0.1)
    save_adapter(
        tmp_path / "adapter",
        model.lora,
        {"model.layers.1.mlp.up_proj.weight": linear.factors()},
        base=base.uri,
        base_weights=base_weights,
        beside={**tokenizer.files(), "generation_config.json": '{"eos_token_id": [1, 2]}'},
    )
    version = publish_as("tuned", tmp_path / "adapter")
    assert version.tags["base"] == "models:/base/1"
    assert version.tags["base_weights"] == base_weights
    files = {path.name for path in resolve(version.uri).iterdir()}
    assert files >= {
        "adapter_model.safetensors",
        "adapter_config.json",
        "tokenizer.json",
        "generation_config.json",
    }
    assert "model.safetensors" not in files
    merged, own_tokenizer = load_pretrained(version.uri)
    assert own_tokenizer is not None
    assert torch.equal(merged.layers[1].mlp.up_proj.weight, linear.merged_weight())
    assert not torch.equal(merged.layers[1].mlp.up_proj.weight, linear.weight)
