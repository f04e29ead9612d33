"""A run on one worker: what it reports, how it is interrupted, and when it gives up."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from llama_ray.model.config import LlamaConfig
from llama_ray.pretrained import load_pretrained
from llama_ray.storage.run_directory import checkpoint_name
from llama_ray.training.config import TrainConfig
from llama_ray.training.errors import TrainingError
from llama_ray.training.hosts.interrupt import Interrupt, Stopped
from llama_ray.training.loop import train
from llama_ray.training.reporting.observer import Console
from tests.training.helpers import CPU, TWELVE_STEPS, FinishedRun, Recorder, losses


def test_a_run_returns_how_far_it_got(finished: FinishedRun) -> None:
    assert (finished.progress.step, finished.progress.tokens) == (12, 12 * 8 * 32)


def test_the_training_loss_falls(finished: FinishedRun) -> None:
    points = finished.recorder.points
    assert points[12]["loss/train"] < points[1]["loss/train"] - 0.5


def test_validations_come_on_schedule_and_improve(finished: FinishedRun) -> None:
    validations = finished.recorder.validations
    assert list(validations) == [6, 12]
    assert validations[12]["loss/validation"] < validations[6]["loss/validation"]


def test_points_hold_progress_and_throughput(finished: FinishedRun) -> None:
    last = finished.recorder.points[12]
    assert last["progress/tokens"] == 12 * 8 * 32
    assert last["throughput/tokens_per_s"] > 0
    assert 0 < last["throughput/mfu"] < 1


def test_checkpoints_come_on_schedule_and_at_the_end(finished: FinishedRun) -> None:
    names = sorted(p.name for p in finished.directory.iterdir())
    assert names == ["step_00000005", "step_00000010", "step_00000012"]


def test_transformers_opens_a_checkpoint_and_computes_the_same(finished: FinishedRun) -> None:
    checkpoint = finished.checkpoint(12)
    model, tokenizer = load_pretrained(checkpoint)
    assert tokenizer is not None
    text = "def f1(x):\n    return x"
    ids = tokenizer.encode(text)
    assert AutoTokenizer.from_pretrained(checkpoint).encode(text, add_special_tokens=False) == ids
    peer = AutoModelForCausalLM.from_pretrained(checkpoint)
    tokens = torch.tensor([ids])
    with torch.no_grad():
        torch.testing.assert_close(model(tokens), peer(tokens).logits, atol=1e-4, rtol=0)


def test_a_checkpoint_contains_no_pickle(finished: FinishedRun) -> None:
    suffixes = {p.suffix for p in finished.checkpoint(12).iterdir()}
    assert not suffixes & {".pt", ".bin", ".pkl"}


def test_a_loss_that_is_not_finite_stops_the_run(tiny: LlamaConfig, dataset: Path) -> None:
    wild = TrainConfig(max_steps=30, learning_rate=1e30, max_grad_norm=0, precision="fp32", warmup_steps=0)
    expected = r"steps in a row up to step 20 .* lower learning_rate \(1e\+30\)"
    with pytest.raises(TrainingError, match=expected):
        train(tiny, wild, dataset, device=CPU, observer=Console())


def test_a_stop_saves_at_once_and_resuming_loses_nothing(
    finished: FinishedRun, tiny: LlamaConfig, dataset: Path, tmp_path: Path
) -> None:
    first, second = Recorder(), Recorder()

    def stop_after_six() -> Interrupt:
        return Interrupt.STOP if len(first.points) >= 6 else Interrupt.NONE

    with pytest.raises(Stopped, match="after step 7") as stopped:
        train(
            tiny, TWELVE_STEPS, dataset, device=CPU, observer=first, output_dir=str(tmp_path),
            poll_interrupt=stop_after_six,
        )  # fmt: skip
    checkpoint = tmp_path / checkpoint_name(stopped.value.step)
    train(
        tiny, TWELVE_STEPS, dataset, device=CPU, observer=second, output_dir=str(tmp_path),
        resume_from=checkpoint,
    )  # fmt: skip
    assert losses(first) | losses(second) == losses(finished.recorder)
    assert not losses(first).keys() & losses(second).keys()
    ours, theirs = (
        load_file(directory / checkpoint_name(12) / "model-rank00000.safetensors")
        for directory in (tmp_path, finished.directory)
    )
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_preemption_notice_saves_once_and_training_continues(
    tiny: LlamaConfig, dataset: Path, tmp_path: Path
) -> None:
    recorder = Recorder()
    config = replace(TWELVE_STEPS, checkpoint_every=100)

    def preempted_after_four() -> Interrupt:
        return Interrupt.CHECKPOINT if len(recorder.points) >= 4 else Interrupt.NONE

    train(
        tiny, config, dataset, device=CPU, observer=recorder, output_dir=str(tmp_path),
        poll_interrupt=preempted_after_four,
    )  # fmt: skip
    assert [result.step for result in recorder.checkpoints] == [5, 12]
