"""A checkpoint becomes a version of the registry once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llama_ray.orchestration.publish import publish
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
