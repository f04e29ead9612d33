import json
import os
import signal
import threading
from dataclasses import replace
from pathlib import Path

import mlflow
import psutil
import pytest
import ray
import torch
from mlflow import MlflowClient
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from llama_ray.model.config import LlamaConfig
from llama_ray.orchestration.launch import LaunchConfig
from llama_ray.orchestration.trainer import train_on_ray
from llama_ray.pretrained import load_pretrained
from llama_ray.storage import run_directory
from llama_ray.tracking.registry import resolve_version
from llama_ray.training.checkpointing.files import local_copy
from llama_ray.training.config import TrainConfig
from tests.e2e.conftest import CONFIG, MODEL, Trained


def curve(client: MlflowClient, run_id: str, metric: str) -> dict[int, float]:
    points = client.get_metric_history(run_id, metric)
    assert len({p.step for p in points}) == len(points), f"{metric} has a step twice"
    return {p.step: p.value for p in points}


def artifacts(client: MlflowClient, run_id: str, path: str = "") -> set[str]:
    return {f.path for f in client.list_artifacts(run_id, path)}


def test_one_run_holds_everything(trained: Trained, tracking: str) -> None:
    client = MlflowClient(tracking)
    run = client.get_run(trained.outcome.run_id)
    assert run.info.status == "FINISHED"
    assert run.info.run_name == "first"
    assert {m.split("/")[0] for m in run.data.metrics} >= {
        "train", "validation", "throughput", "memory", "progress"
    }  # fmt: skip
    losses = curve(client, run.info.run_id, "train/loss")
    assert list(losses) == [1, *range(2, 25, 2)]
    assert losses[24] < losses[1] - 0.5
    assert list(curve(client, run.info.run_id, "validation/loss")) == [10, 20, 24]
    assert curve(client, run.info.run_id, "progress/tokens")[24] == 24 * 2 * 4 * 64
    assert run.data.params["model.num_layers"] == "2"
    assert run.data.params["training.learning_rate"] == "0.003"
    assert run.data.tags["world_size"] == "2"
    assert run.data.tags["device"] == "cpu"
    assert "Global batch" in run.data.tags["mlflow.note.content"]
    assert {"config.yaml", "loss_curve.png", "samples"} <= artifacts(client, run.info.run_id)
    assert artifacts(client, run.info.run_id, "samples") == {
        f"samples/step_{step:06d}.md" for step in (10, 20, 24)
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


def test_the_last_checkpoint_opens_in_transformers(trained: Trained) -> None:
    peer = AutoModelForCausalLM.from_pretrained(trained.outcome.checkpoint)
    ids = AutoTokenizer.from_pretrained(trained.outcome.checkpoint)(
        "import os", return_tensors="pt"
    ).input_ids
    model, _ = load_pretrained(trained.outcome.checkpoint)
    with torch.no_grad():
        torch.testing.assert_close(model(ids), peer(ids).logits, atol=1e-4, rtol=0)


def test_workers_that_are_killed_or_hang_cost_nothing(trained: Trained, tracking: str) -> None:
    """One is killed after the first checkpoint, one stopped after the second: the run ends as the undisturbed one."""
    directory = Path(trained.launch.output_dir) / "hit"
    ended = threading.Event()
    hits: list[signal.Signals] = []
    ray_session = ray._private.worker._global_node.get_session_dir_path()

    def hit_workers() -> None:
        for step, number in ((9, signal.SIGKILL), (18, signal.SIGSTOP)):
            while not (directory / f"step_{step:08d}" / run_directory.MARKER).exists():
                if ended.wait(0.02):
                    return
            os.kill(_workers(ray_session)[0].pid, number)
            hits.append(number)

    watcher = threading.Thread(target=hit_workers, daemon=True)
    watcher.start()
    try:
        config = replace(CONFIG, collective_timeout_s=10)
        outcome = trained.again(config, run_name=directory.name, register_as="")
    finally:
        ended.set()
        watcher.join()
    assert hits == [signal.SIGKILL, signal.SIGSTOP]
    client = MlflowClient(tracking)
    first = curve(client, trained.outcome.run_id, "train/loss")
    second = curve(client, outcome.run_id, "train/loss")
    assert second == {step: loss for step, loss in first.items() if step <= 24}
    assert client.get_run(outcome.run_id).data.tags["restarts"] == "2"
    assert_same_state(outcome.checkpoint, trained.outcome.checkpoint)


def assert_same_state(checkpoint: str, other: str) -> None:
    """Weights and optimizer state of two checkpoints of whole tensors are the same to the bit."""
    ours, theirs = _state(checkpoint), _state(other)
    assert ours.keys() == theirs.keys()
    assert sum(t.numel() for t in ours.values()) > 3 * MODEL.num_parameters()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


def _state(checkpoint: str) -> dict[str, torch.Tensor]:
    with local_copy(checkpoint) as local:
        files = [load_file(path) for path in local.glob("*-rank*.safetensors")]
    return {name: tensor for file in files for name, tensor in file.items()}


def _workers(session: str) -> list[psutil.Process]:
    return [
        p for p in psutil.process_iter(["cmdline"])
        if "RayTrainWorker" in "".join(p.info["cmdline"] or []) and _belongs_to(p, session)
    ]  # fmt: skip


def _belongs_to(process: psutil.Process, session: str) -> bool:
    return any(session in part for parent in process.parents() for part in parent.cmdline())


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
    launch("holds no checkpoint of run 'none'", resume="none")
    launch("holds no run to resume", output_dir=str(tmp_path / "empty"), resume="latest")
    launch("num_layers 2 there, 3 here", model=replace(MODEL, num_layers=3), resume="first")
    assert len(MlflowClient(tracking).search_runs(["1"])) == runs
    with pytest.raises(ValueError, match="cannot name a registered model"):
        LaunchConfig(register_as="a/b")


def test_checkpoints_are_kept_to_the_newest_few(trained: Trained) -> None:
    directory = Path(trained.launch.output_dir) / "first"
    kept = sorted(p.name for p in directory.glob("step_*"))
    assert kept == ["step_00000018", "step_00000024"]
    progress = json.loads((directory / kept[-1] / "training.json").read_text())
    assert progress["run_id"] == trained.outcome.run_id
