import json
import math
from dataclasses import replace
from pathlib import Path

import mlflow
import pytest
import torch
from mlflow import MlflowClient
from transformers import AutoModelForCausalLM, AutoTokenizer

from llama_ray.evaluation.evaluate import EvaluationConfig
from llama_ray.evaluation.recording import recorded
from llama_ray.evaluation.results import Evaluation, EvaluationError
from llama_ray.model.config import LlamaConfig
from llama_ray.orchestration.evaluation_tasks import Room, evaluate_on_cluster
from llama_ray.orchestration.launch import LaunchConfig
from llama_ray.orchestration.trainer import train_on_ray
from llama_ray.pretrained import load_pretrained
from llama_ray.storage.claim import claimed
from llama_ray.tracking.errors import TrackingError
from llama_ray.tracking.registry import resolve_version
from llama_ray.training.config import TrainConfig
from tests.e2e.conftest import CONFIG, MODEL, Trained
from tests.e2e.helpers import artifacts, curve


def test_one_run_holds_everything(trained: Trained, tracking: str) -> None:
    client = MlflowClient(tracking)
    run = client.get_run(trained.outcome.run_id)
    assert run.info.status == "FINISHED"
    assert run.info.run_name == "first"
    assert {m.split("/")[0] for m in run.data.metrics} >= {
        "train", "validation", "throughput", "memory", "progress"
    }  # fmt: skip
    groups = sorted(name.rpartition("/")[0] for name in run.data.metrics if not name.startswith("system/"))
    assert groups[0] == "loss", "MLflow sorts groups of charts by name"
    losses = curve(client, run.info.run_id, "loss/train")
    assert list(losses) == [1, *range(2, 61, 2)]
    assert losses[60] < losses[1] - 0.5
    assert list(curve(client, run.info.run_id, "loss/validation")) == [25, 50, 60]
    assert curve(client, run.info.run_id, "progress/tokens")[60] == 60 * 2 * 4 * 64
    assert run.data.params["model.num_layers"] == "2"
    assert run.data.params["training.learning_rate"] == "0.003"
    assert run.data.tags["world_size"] == "2"
    assert run.data.tags["device"] == "cpu"
    assert "Global batch" in run.data.tags["mlflow.note.content"]
    assert {"config.yaml", "loss_curve.png", "samples"} <= artifacts(client, run.info.run_id)
    assert artifacts(client, run.info.run_id, "samples") == {
        f"samples/step_{step:06d}.md" for step in (25, 50, 60)
    }


def test_the_version_is_the_champion_and_predicts(trained: Trained, tracking: str) -> None:
    version = resolve_version("models:/tiny@champion")
    assert version.run_id == trained.outcome.run_id
    assert version.validation_loss == trained.outcome.validation_loss
    model = mlflow.pyfunc.load_model("models:/tiny@champion")
    [text] = model.predict(["def f("], params={"max_tokens": 5, "temperature": 0.0})
    assert text
    loaded, tokenizer = load_pretrained("models:/tiny@champion")
    assert tokenizer is not None
    assert loaded.lm_head.weight.dtype == torch.bfloat16


def test_checkpoints_are_evaluated_beside_the_training(trained: Trained, tracking: str) -> None:
    client = MlflowClient(tracking)
    bits = curve(client, trained.outcome.run_id, "scores/validation/bits_per_byte")
    # A run as short as this one may be over before the first evaluation, but not without one.
    assert max(bits) == 60
    assert set(bits) <= {27, 36, 45, 54, 60}
    directory = Path(trained.launch.output_dir) / "first" / "evaluations"
    kept = Evaluation.from_json((directory / "step_00000060.json").read_text())
    assert kept.scores[0].value == pytest.approx(bits[60])
    perplexity = kept.score("validation/perplexity")
    assert perplexity is not None
    assert math.log(perplexity.value) == pytest.approx(trained.outcome.validation_loss, abs=0.5)


def test_an_evaluation_takes_what_workers_leave_and_fails_in_one_line(
    ray_cluster: str, trained: Trained
) -> None:
    assert Room.beside(3, gpu=False) == Room(cpus=1, gpus=0)
    assert Room.beside(4, gpu=False) is None
    with pytest.raises(EvaluationError, match="/nowhere is") as failed:
        evaluate_on_cluster("/nowhere", EvaluationConfig(data=(str(trained.data),), limit=1), gpu=False)
    assert "\n" not in str(failed.value)


def test_a_rule_promotes_the_version_by_its_evaluation(trained: Trained, tracking: str) -> None:
    assert trained.outcome.decision is not None
    assert trained.outcome.decision.promoted
    version = resolve_version("models:/tiny@champion")
    assert version.tags["promotion.rule"] == "bits_per_byte < champion"
    assert version.tags["promotion.decision"].startswith("promoted: validation/bits_per_byte ")
    evaluated = recorded(version)
    assert evaluated is not None
    assert evaluated.model == version.uri
    # The version has the weights of the last checkpoint in bf16.
    last = curve(MlflowClient(tracking), trained.outcome.run_id, "scores/validation/bits_per_byte")[60]
    assert evaluated.scores[0].value == pytest.approx(last, rel=0.02)


def test_the_last_checkpoint_opens_in_transformers(trained: Trained) -> None:
    peer = AutoModelForCausalLM.from_pretrained(trained.outcome.checkpoint)
    ids = AutoTokenizer.from_pretrained(trained.outcome.checkpoint)(
        "import os", return_tensors="pt"
    ).input_ids
    model, _ = load_pretrained(trained.outcome.checkpoint)
    with torch.no_grad():
        torch.testing.assert_close(model(ids), peer(ids).logits, atol=1e-4, rtol=0)


def test_a_run_that_begins_with_a_version_names_it_as_its_parent(trained: Trained, tracking: str) -> None:
    parent = resolve_version("models:/tiny@champion")
    config = replace(CONFIG, init_from="models:/tiny@champion", max_steps=2, learning_rate=1e-5)
    outcome = trained.again(config, register_as="continued")
    run = MlflowClient(tracking).get_run(outcome.run_id)
    # The weights of the version are rounded to bf16.
    assert outcome.validation_loss == pytest.approx(parent.validation_loss, abs=0.02)
    assert run.data.params["training.init_from"] == run.data.tags["parent"] == parent.uri
    assert f"- **Begun with**: the weights of `{parent.uri}`" in run.data.tags["mlflow.note.content"]
    assert outcome.version is not None
    assert outcome.version.tags["parent"] == parent.uri
    assert parent.uri in outcome.version.description


def test_a_branch_goes_on_from_a_checkpoint_in_a_run_of_its_own(trained: Trained, tracking: str) -> None:
    parent = trained.outcome.checkpoint
    config = replace(CONFIG, branch_from=parent, max_steps=2, schedule="linear", log_every=1)
    outcome = trained.again(config, run_name="branch", register_as="branched")
    client = MlflowClient(tracking)
    assert outcome.checkpoint.endswith("branch/step_00000062")
    assert curve(client, outcome.run_id, "train/learning_rate")[61] == CONFIG.learning_rate
    assert client.get_run(outcome.run_id).data.tags["parent"] == parent
    assert outcome.version is not None
    assert outcome.version.tags["parent"] == parent
    assert f"- **Branched from**: `{parent}`" in outcome.version.description


def test_bad_launches_are_refused_before_a_worker_starts(
    trained: Trained, tracking: str, tmp_path: Path
) -> None:
    def launch(
        match: str, model: LlamaConfig = MODEL, config: TrainConfig = CONFIG, **changes: object
    ) -> None:
        with pytest.raises(ValueError, match=match) as caught:
            train_on_ray(model, config, replace(trained.launch, **changes), str(trained.data))
        assert "\n" not in str(caught.value)

    runs = len(MlflowClient(tracking).search_runs(["1"]))
    launch("world_size is 9, but this cluster has at most 4 CPUs", world_size=9)
    launch("--vocab_size 1024", model=replace(MODEL, vocab_size=512))
    (tmp_path / "file").write_text("in the way")
    launch("cannot be written", output_dir=str(tmp_path / "file" / "below"))
    launch("holds run 'first' already; use --resume first", run_name="first")
    with claimed(f"{trained.launch.output_dir}/taken"):
        launch(r"checkpoints/taken is in use by another launch", run_name="taken")
    with claimed(f"{trained.launch.output_dir}/first"):
        launch(r"checkpoints/first is in use by another launch", resume="first")
    launch("holds no checkpoint of run 'none'", resume="none")
    launch("holds no run to resume", output_dir=str(tmp_path / "empty"), resume="latest")
    launch("num_layers 2 there, 3 here", model=replace(MODEL, num_layers=3), resume="first")
    launch(
        "promote_if names news/bits_per_byte, but what is measured is validation",
        promote_if="news/bits_per_byte < 1",
        evaluate_tasks=("none",),
    )
    launch("no-such-text", evaluate_every=1, evaluate_text=("no-such-text",))
    assert len(MlflowClient(tracking).search_runs(["1"])) == runs
    with pytest.raises(ValueError, match="cannot name a registered model"):
        LaunchConfig(register_as="a/b")
    with pytest.raises(ValueError, match="promote_if is 'bits_per_byte'"):
        LaunchConfig(promote_if="bits_per_byte")
    with pytest.raises(ValueError, match="give --register_as NAME"):
        LaunchConfig(promote_if="bits_per_byte < champion", register_as="")


def test_a_run_whose_artifacts_cannot_be_stored_is_refused_and_marked_failed(
    trained: Trained, tracking: str, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("in the way")
    client = MlflowClient(tracking)
    experiment = client.create_experiment("no room", artifact_location=(tmp_path / "file").as_uri())
    with pytest.raises(
        TrackingError, match=r"artifacts cannot be stored at file:.*another --experiment"
    ) as refused:
        trained.again(experiment="no room", register_as="")
    assert "\n" not in str(refused.value)
    [run] = client.search_runs([experiment])
    assert run.info.status == "FAILED"


def test_checkpoints_are_kept_to_the_newest_few(trained: Trained) -> None:
    directory = Path(trained.launch.output_dir) / "first"
    kept = sorted(p.name for p in directory.glob("step_*"))
    assert kept == ["step_00000054", "step_00000060"]
    progress = json.loads((directory / kept[-1] / "training.json").read_text())
    assert progress["run_id"] == trained.outcome.run_id
