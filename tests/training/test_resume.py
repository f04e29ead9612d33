"""A run that continues from a checkpoint on one worker."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from llama_ray.model.config import LlamaConfig
from llama_ray.model.weight_files import CheckpointError
from llama_ray.storage.run_directory import checkpoint_name
from llama_ray.training.checkpointing.progress import load_progress
from llama_ray.training.loop import train
from llama_ray.training.reporting.observer import Console
from tests.training.helpers import CPU, TWELVE_STEPS, FinishedRun, Recorder, losses, losses_after


@pytest.fixture(scope="module")
def resumed(
    finished: FinishedRun, tiny: LlamaConfig, dataset: Path, tmp_path_factory: pytest.TempPathFactory
) -> FinishedRun:
    """The finished run again, from its fifth step."""
    directory, recorder = tmp_path_factory.mktemp("resumed"), Recorder()
    progress = train(
        tiny, TWELVE_STEPS, dataset, device=CPU, observer=recorder, output_dir=str(directory),
        resume_from=finished.checkpoint(5),
    )  # fmt: skip
    return FinishedRun(recorder, progress, directory)


def test_a_resumed_run_has_the_same_losses_to_the_bit(finished: FinishedRun, resumed: FinishedRun) -> None:
    assert losses(resumed.recorder) == losses_after(5, losses(finished.recorder))


def test_a_resumed_run_saves_the_same_state_to_the_bit(finished: FinishedRun, resumed: FinishedRun) -> None:
    ours, theirs = resumed.checkpoint(12), finished.checkpoint(12)
    files = sorted(p.name for p in theirs.iterdir())
    assert sorted(p.name for p in ours.iterdir()) == files
    assert {"model-rank00000.safetensors", "optimizer-rank00000.safetensors", "training.json"} <= set(files)
    for file in (f for f in files if f.endswith(".safetensors")):
        mine, other = load_file(ours / file), load_file(theirs / file)
        assert mine.keys() == other.keys()
        assert all(torch.equal(mine[name], other[name]) for name in mine), file
    assert load_progress(ours) == load_progress(theirs)


def test_progress_is_plain_json(finished: FinishedRun) -> None:
    checkpoint = finished.checkpoint(10)
    content = json.loads((checkpoint / "training.json").read_text())
    assert content["step"] == load_progress(checkpoint).step == 10


def test_a_damaged_checkpoint_is_refused(
    finished: FinishedRun, tiny: LlamaConfig, dataset: Path, tmp_path: Path
) -> None:
    broken = shutil.copytree(finished.checkpoint(5), tmp_path / "broken")
    file = broken / "optimizer-rank00000.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"is damaged .* resume from an earlier"):
        train(tiny, TWELVE_STEPS, dataset, device=CPU, observer=Console(), resume_from=broken)


def test_a_directory_without_a_marker_is_refused(
    finished: FinishedRun, tiny: LlamaConfig, dataset: Path, tmp_path: Path
) -> None:
    unmarked = shutil.copytree(finished.checkpoint(5), tmp_path / "unmarked")
    (unmarked / "training.json").unlink()
    with pytest.raises(CheckpointError, match="is not a training checkpoint"):
        train(tiny, TWELVE_STEPS, dataset, device=CPU, observer=Console(), resume_from=unmarked)


def test_the_loss_scale_of_fp16_continues_where_it_was(
    tiny: LlamaConfig, dataset: Path, tmp_path: Path
) -> None:
    # A loss so large that the first scale is too large.
    config = replace(
        TWELVE_STEPS, precision="fp16", z_loss=20.0, max_steps=6, batch_size=2, checkpoint_every=4
    )
    whole, resumed = Recorder(), Recorder()
    train(tiny, config, dataset, device=CPU, observer=whole, output_dir=str(tmp_path / "whole"))
    start, end = (tmp_path / "whole" / checkpoint_name(step) for step in (4, 6))
    assert load_progress(start).scaler["scale"] < 2.0**16
    assert load_progress(start).skipped_steps > 0
    again = tmp_path / "again"
    train(tiny, config, dataset, device=CPU, observer=resumed, output_dir=str(again), resume_from=start)
    assert losses(resumed) == losses_after(4, losses(whole))
    assert load_progress(again / end.name) == load_progress(end)


def test_files_that_the_user_put_into_a_checkpoint_are_neither_read_nor_recorded(
    finished: FinishedRun, tiny: LlamaConfig, dataset: Path, tmp_path: Path
) -> None:
    start = shutil.copytree(finished.checkpoint(10), tmp_path / checkpoint_name(10))
    end = tmp_path / checkpoint_name(12)
    end.mkdir()
    model = load_file(start / "model-rank00000.safetensors")
    for directory in (start, end):
        save_file(
            {name: torch.zeros_like(weight) for name, weight in model.items()},
            directory / "zeros.safetensors",
        )
        (directory / "notes.json").write_text("{}")
    recorder = Recorder()
    train(
        tiny,
        TWELVE_STEPS,
        dataset,
        device=CPU,
        observer=recorder,
        output_dir=str(tmp_path),
        resume_from=start,
    )
    assert losses(recorder) == losses_after(10, losses(finished.recorder))
    recorded = json.loads((end / "training.json").read_text())["files"]
    assert recorded.keys() == json.loads((start / "training.json").read_text())["files"].keys()
    assert {"zeros.safetensors", "notes.json"} <= {path.name for path in end.iterdir()} - recorded.keys()
