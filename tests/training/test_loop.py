import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from llama_ray.model.checkpoint import CheckpointError
from llama_ray.model.config import LlamaConfig
from llama_ray.pretrained import load_pretrained
from llama_ray.training.checkpointing.checkpointer import Saved, checkpoint_name
from llama_ray.training.checkpointing.state import load_progress
from llama_ray.training.config import TrainConfig
from llama_ray.training.errors import TrainingError
from llama_ray.training.interrupt import Interrupt, Stopped
from llama_ray.training.loop import train
from llama_ray.training.observer import Console, Metrics
from tests.datasets import write_dataset

CPU = torch.device("cpu")


class Recorder(Console):
    """Keeps what the run told."""

    def __init__(self) -> None:
        super().__init__()
        self.saved: list[Saved] = []
        self.points: dict[int, Metrics] = {}
        self.validations: dict[int, Metrics] = {}

    def logged(self, step: int, metrics: Metrics) -> None:
        self.points[step] = metrics
        super().logged(step, metrics)

    def validated(self, step, metrics, model) -> None:
        self.validations[step] = metrics
        super().validated(step, metrics, model)

    def checkpointed(self, saved: Saved) -> None:
        self.saved.append(saved)
        super().checkpointed(saved)


def losses(recorder: Recorder) -> dict[int, float]:
    return {step: metrics["train/loss"] for step, metrics in recorder.points.items()}


CONFIG = TrainConfig(max_steps=12, learning_rate=3e-3, log_every=1, validate_every=6, checkpoint_every=5)


@pytest.fixture(scope="module")
def finished(tiny: LlamaConfig, dataset: Path, tmp_path_factory) -> tuple[Recorder, Path]:
    directory = tmp_path_factory.mktemp("run")
    recorder = Recorder()
    progress = train(tiny, CONFIG, dataset, device=CPU, observer=recorder, output_dir=str(directory))
    assert (progress.step, progress.tokens) == (12, 12 * 8 * 32)
    return recorder, directory


def test_a_run_learns_and_reports(finished: tuple[Recorder, Path], capsys: pytest.CaptureFixture) -> None:
    recorder, directory = finished
    assert recorder.points[12]["train/loss"] < recorder.points[1]["train/loss"] - 0.5
    assert list(recorder.validations) == [6, 12]
    assert recorder.validations[12]["validation/loss"] < recorder.validations[6]["validation/loss"]
    assert recorder.points[12]["progress/tokens"] == 12 * 8 * 32
    assert recorder.points[12]["throughput/tokens_per_s"] > 0
    assert 0 < recorder.points[12]["throughput/mfu"] < 1
    assert sorted(p.name for p in directory.iterdir()) == ["step_00000005", "step_00000010", "step_00000012"]


def test_a_resumed_run_is_the_same_to_the_bit(
    finished: tuple[Recorder, Path], tiny: LlamaConfig, dataset: Path, tmp_path: Path
) -> None:
    recorder, directory = finished
    resumed = Recorder()
    start = directory / "step_00000005"
    train(tiny, CONFIG, dataset, device=CPU, observer=resumed, output_dir=str(tmp_path), resume_from=start)
    assert losses(resumed) == {step: loss for step, loss in losses(recorder).items() if step > 5}
    ours, theirs = tmp_path / "step_00000012", directory / "step_00000012"
    files = sorted(p.name for p in theirs.iterdir())
    assert sorted(p.name for p in ours.iterdir()) == files
    assert {"model-rank00000.safetensors", "optimizer-rank00000.safetensors", "training.json"} <= set(files)
    for file in (f for f in files if f.endswith(".safetensors")):
        mine, other = load_file(ours / file), load_file(theirs / file)
        assert mine.keys() == other.keys()
        assert all(torch.equal(mine[name], other[name]) for name in mine), file
    assert load_progress(ours) == load_progress(theirs)


def test_a_checkpoint_is_a_model_that_others_open(finished: tuple[Recorder, Path]) -> None:
    checkpoint = finished[1] / "step_00000012"
    model, tokenizer = load_pretrained(checkpoint)
    assert tokenizer is not None
    peer = AutoModelForCausalLM.from_pretrained(checkpoint)
    ids = tokenizer.encode("def f1(x):\n    return x")
    assert (
        AutoTokenizer.from_pretrained(checkpoint).encode("def f1(x):\n    return x", add_special_tokens=False)
        == ids
    )
    with torch.no_grad():
        torch.testing.assert_close(
            model(torch.tensor([ids])), peer(torch.tensor([ids])).logits, atol=1e-4, rtol=0
        )
    assert not list(checkpoint.glob("*.pt")) + list(checkpoint.glob("*.bin")) + list(checkpoint.glob("*.pkl"))


def test_a_loss_that_is_no_number_stops_the_run(tiny: LlamaConfig, dataset: Path) -> None:
    wild = TrainConfig(max_steps=30, learning_rate=1e30, max_grad_norm=0, precision="fp32", warmup_steps=0)
    with pytest.raises(
        TrainingError, match=r"steps in a row up to step 20 .* lower learning_rate \(1e\+30\)"
    ):
        train(tiny, wild, dataset, device=CPU, observer=Console())


def test_a_stop_saves_at_once_and_a_resume_loses_nothing(
    finished: tuple[Recorder, Path], tiny: LlamaConfig, dataset: Path, tmp_path: Path
) -> None:
    recorder, directory = finished
    first, second = Recorder(), Recorder()

    def asked() -> Interrupt:
        return Interrupt.STOP if len(first.points) >= 6 else Interrupt.NONE

    with pytest.raises(Stopped, match="after step 7") as stopped:
        train(tiny, CONFIG, dataset, device=CPU, observer=first, output_dir=str(tmp_path), asked=asked)
    checkpoint = tmp_path / checkpoint_name(stopped.value.step)
    train(
        tiny, CONFIG, dataset, device=CPU, observer=second, output_dir=str(tmp_path), resume_from=checkpoint
    )
    assert losses(first) | losses(second) == losses(recorder)
    assert not losses(first).keys() & losses(second).keys()
    ours, theirs = (
        load_file(d / "step_00000012" / "model-rank00000.safetensors") for d in (tmp_path, directory)
    )
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_preemption_notice_saves_once_and_training_goes_on(
    tiny: LlamaConfig, dataset: Path, tmp_path: Path
) -> None:
    recorder = Recorder()
    config = replace(CONFIG, checkpoint_every=100)

    def asked() -> Interrupt:
        return Interrupt.CHECKPOINT if len(recorder.points) >= 4 else Interrupt.NONE

    train(tiny, config, dataset, device=CPU, observer=recorder, output_dir=str(tmp_path), asked=asked)
    assert [saved.step for saved in recorder.saved] == [5, 12]


@pytest.mark.parametrize(
    ("model", "config", "message"),
    [
        ({"vocab_size": 300}, {}, r"vocab_size 300 is smaller than the \d+ tokens .* --vocab_size"),
        ({}, {"seq_len": 64}, "seq_len 64 is above the model's max_seq_len 32"),
        ({}, {"batch_size": 4096}, "one step takes 4096"),
    ],
)
def test_what_does_not_fit_is_refused(
    tiny: LlamaConfig, dataset: Path, model: dict, config: dict, message: str
) -> None:
    shape = LlamaConfig.from_dict(tiny.to_dict() | model)
    with pytest.raises(ValueError, match=message):
        train(shape, TrainConfig(**config), dataset, device=CPU, observer=Console())


def test_resuming_refuses_another_shape_tokenizer_or_a_damaged_file(
    finished: tuple[Recorder, Path], tiny: LlamaConfig, dataset: Path, tmp_path: Path
) -> None:
    checkpoint = finished[1] / "step_00000005"

    def resume(shape: LlamaConfig = tiny, data: Path = dataset, source: Path = checkpoint) -> None:
        train(shape, CONFIG, data, device=CPU, observer=Console(), resume_from=source)

    other = LlamaConfig.from_dict(tiny.to_dict() | {"num_layers": 3})
    with pytest.raises(ValueError, match="num_layers 2 there, 3 here"):
        resume(shape=other)
    with pytest.raises(ValueError, match="another tokenizer"):
        resume(data=write_dataset(tmp_path / "other", vocab_size=300))
    broken = shutil.copytree(checkpoint, tmp_path / "broken")
    file = broken / "optimizer-rank00000.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"is damaged .* resume from an earlier"):
        resume(source=broken)
    (broken / "training.json").unlink()
    with pytest.raises(CheckpointError, match="no training checkpoint"):
        resume(source=broken)


def test_progress_is_plain_json(finished: tuple[Recorder, Path]) -> None:
    checkpoint = finished[1] / "step_00000010"
    content = json.loads((checkpoint / "training.json").read_text())
    assert content["step"] == load_progress(checkpoint).step == 10


def test_data_tokenised_with_another_tokenizer_is_refused(tiny: LlamaConfig, tmp_path: Path) -> None:
    data = write_dataset(tmp_path / "a")
    other = write_dataset(tmp_path / "b", vocab_size=300)
    shutil.copy(other / "tokenizer.json", data / "tokenizer.json")
    with pytest.raises(ValueError, match="tokenised with another tokenizer"):
        train(tiny, CONFIG, data, device=CPU, observer=Console())


def test_the_loss_scale_of_fp16_goes_on_where_it_was(
    tiny: LlamaConfig, dataset: Path, tmp_path: Path
) -> None:
    # A loss so large that the first scale is too much.
    config = replace(CONFIG, precision="fp16", z_loss=20.0, max_steps=6, batch_size=2, checkpoint_every=4)
    whole, resumed = Recorder(), Recorder()
    train(tiny, config, dataset, device=CPU, observer=whole, output_dir=str(tmp_path / "whole"))
    start, end = (tmp_path / "whole" / checkpoint_name(step) for step in (4, 6))
    assert load_progress(start).scaler["scale"] < 2.0**16
    assert load_progress(start).skipped_steps > 0
    again = tmp_path / "again"
    train(tiny, config, dataset, device=CPU, observer=resumed, output_dir=str(again), resume_from=start)
    assert losses(resumed) == {step: loss for step, loss in losses(whole).items() if step > 4}
    assert load_progress(again / end.name) == load_progress(end)
