"""What a run counts: samples, not steps, and on which data; and what it says when it has led to nothing."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from llama_ray.data.dataset.info import SPLITS, read_info
from llama_ray.data.dataset.shards import open_shard
from llama_ray.data.dataset.token_dataset import TokenDataset
from llama_ray.data.mixtures.stages import Segment
from llama_ray.data.mixtures.timetable import Timetable
from llama_ray.model.config import LlamaConfig
from llama_ray.storage.run_directory import MARKER, checkpoint_name
from llama_ray.training.checkpointing.progress import load_progress
from llama_ray.training.config import Schedule, TrainConfig
from llama_ray.training.errors import TrainingError
from llama_ray.training.loop import train
from llama_ray.training.optimizers.build import learning_rate
from llama_ray.training.reporting.observer import Console
from tests.token_data import write_documents
from tests.training.helpers import CPU, TWELVE_STEPS, FinishedRun, Recorder, schedule_of

SEQ_LEN = 32
TWO_EPOCHS = TrainConfig(epochs=2, batch_size=16, log_every=1, precision="fp32", checkpoint_every=7)


@pytest.fixture(scope="module")
def two_epochs(tiny: LlamaConfig, dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> FinishedRun:
    directory, recorder = tmp_path_factory.mktemp("two-epochs"), Recorder()
    progress = train(
        tiny, replace(TWO_EPOCHS, keep_checkpoints=99), dataset, device=CPU, observer=recorder,
        output_dir=str(directory),
    )  # fmt: skip
    return FinishedRun(recorder, progress, directory)


@pytest.mark.parametrize(
    "change",
    [{"batch_size": 5}, {"batch_size": 24}, {"gradient_accumulation_steps": 2}],
    ids=str,
)
def test_a_run_in_epochs_takes_as_many_passes_with_another_global_batch(
    two_epochs: FinishedRun, tiny: LlamaConfig, dataset: Path, change: dict[str, Any]
) -> None:
    config, recorder = replace(TWO_EPOCHS, **change), Recorder()
    progress = train(
        tiny, config, dataset, device=CPU, observer=recorder, resume_from=two_epochs.checkpoint(7)
    )
    size = config.batch_size * config.gradient_accumulation_steps
    windows = TokenDataset(dataset, "train").num_windows(SEQ_LEN)
    # No sample is left out but those at the end that are too few for a step.
    assert 2 * windows - size < progress.tokens / SEQ_LEN <= 2 * windows
    [*_, first_epoch, end] = recorder.validations
    assert 7 * 16 + (first_epoch - 7) * size in range(windows, windows + size)
    assert progress.step == end == max(recorder.points)


def test_the_learning_rate_goes_on_where_it_was_with_another_global_batch(
    two_epochs: FinishedRun, tiny: LlamaConfig, dataset: Path
) -> None:
    recorder = Recorder()
    halved = replace(TWO_EPOCHS, batch_size=8)
    train(tiny, halved, dataset, device=CPU, observer=recorder, resume_from=two_epochs.checkpoint(7))
    before = {step: point["train/learning_rate"] for step, point in two_epochs.recorder.points.items()}
    # Two steps of 8 samples are one of 16; the numbers of steps in an epoch are rounded.
    for step in range(8, max(before)):
        now = recorder.points[7 + 2 * (step - 7)]["train/learning_rate"]
        assert now == pytest.approx(before[step], abs=0.03 * halved.peak_learning_rate)


def test_with_the_same_global_batch_steps_are_positions() -> None:
    config = TrainConfig(epochs=3)
    assert schedule_of(config).progress(50) == (50, 120)


def test_max_steps_counts_steps_whatever_they_held() -> None:
    timetable = Timetable([Segment(1, 1, SEQ_LEN, {})], step=40, position=10, begun=[0])
    schedule = Schedule.of(TrainConfig(max_steps=100), timetable, 40)
    assert (schedule.total_steps, schedule.progress(50)) == (100, (50, 100))


def test_epochs_are_counted_in_the_data_whatever_steps_held() -> None:
    timetable = Timetable([Segment(1, 2, SEQ_LEN, {})], step=40, position=10, begun=[0])
    schedule = Schedule.of(TrainConfig(epochs=3), timetable, 41)
    # 113 windows are left, two a step; the 10 that were taken would have been 5 steps.
    assert (schedule.total_steps, schedule.progress(50)) == (96, (15, 61))
    assert [step for step in range(41, 97) if schedule.validates(step)] == [56, 76, 96]


def test_a_change_of_the_global_batch_is_said(
    two_epochs: FinishedRun, tiny: LlamaConfig, dataset: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = replace(TWO_EPOCHS, batch_size=8, max_steps=8)
    train(tiny, config, dataset, device=CPU, observer=Console(), resume_from=two_epochs.checkpoint(7))
    assert "global batch of 8 sequences, 16 up to step 7" in capsys.readouterr().out


def other_documents(dataset: Path, directory: Path, split: str) -> Path:
    """Write the data of a dataset with the documents of one split turned around: as many, with the same tokenizer."""
    splits = {
        name: [[each.tolist() for each in open_shard(dataset / f"{name}-00000.bin").documents()]]
        for name in SPLITS
    }
    splits[split][0].reverse()
    shutil.copytree(dataset, directory)
    return write_documents(directory, splits, read_info(dataset).tokenizer)


@pytest.mark.parametrize("split", ["train", "validation"])
def test_other_documents_are_refused_and_may_be_allowed(
    finished: FinishedRun, tiny: LlamaConfig, dataset: Path, tmp_path: Path, split: str
) -> None:
    other = other_documents(dataset, tmp_path / "data", split)
    start = finished.checkpoint(10)
    with pytest.raises(
        ValueError, match=r"trained with data \w{12}; this run has \w{12}.*--allow_other_data"
    ):
        train(tiny, TWELVE_STEPS, other, device=CPU, observer=Console(), resume_from=start)
    allowed = replace(TWELVE_STEPS, allow_other_data=True)
    run = str(tmp_path / "run")
    train(tiny, allowed, other, device=CPU, observer=Console(), output_dir=run, resume_from=start)
    end = load_progress(tmp_path / "run" / checkpoint_name(12))
    assert end.step == 12
    assert end.loader is not None
    assert (end.loader["step"], end.loader["position"]) == (12, 2 * 8)
    # From now on these are the run's data.
    more = replace(TWELVE_STEPS, max_steps=13)
    train(
        tiny, more, other, device=CPU, observer=Console(), resume_from=tmp_path / "run" / checkpoint_name(12)
    )


def test_the_same_documents_elsewhere_are_the_same_data(
    finished: FinishedRun, tiny: LlamaConfig, dataset: Path, tmp_path: Path
) -> None:
    moved = shutil.copytree(dataset, tmp_path / "moved")
    info = json.loads((moved / "dataset.json").read_text())
    (moved / "dataset.json").write_text(json.dumps(info | {"sources": [], "fingerprint": "later"}))
    train(tiny, TWELVE_STEPS, moved, device=CPU, observer=Console(), resume_from=finished.checkpoint(10))


@pytest.mark.parametrize(
    "change", [{"seed": 1}, {"seq_len": 16}, {"warmup_steps": 13}], ids=["seed", "seq_len", "warm-up"]
)
def test_what_cannot_be_continued_is_refused(
    finished: FinishedRun, tiny: LlamaConfig, dataset: Path, change: dict[str, Any]
) -> None:
    with pytest.raises(ValueError, match=next(iter(change))):
        train(
            tiny, replace(TWELVE_STEPS, **change), dataset, device=CPU, observer=Console(),
            resume_from=finished.checkpoint(10),
        )  # fmt: skip


@pytest.mark.parametrize(("step", "max_steps"), [(5, 5), (10, 10), (10, 3)])
def test_a_run_with_nothing_left_measures_the_weights_that_it_has(
    finished: FinishedRun, tiny: LlamaConfig, dataset: Path, tmp_path: Path, step: int, max_steps: int
) -> None:
    checkpoint = shutil.copytree(finished.checkpoint(step), tmp_path / checkpoint_name(step))
    assert load_progress(checkpoint).validation_step in (None, 6)
    before = {path.name: path.stat().st_mtime_ns for path in checkpoint.iterdir()}
    recorder = Recorder()
    config = replace(TWELVE_STEPS, max_steps=max_steps)
    for _ in range(2):
        progress = train(
            tiny, config, dataset, device=CPU, observer=recorder, output_dir=str(tmp_path),
            resume_from=checkpoint,
        )  # fmt: skip
    assert (progress.step, progress.validation_step) == (step, step)
    assert list(recorder.validations) == [step]
    assert load_progress(checkpoint) == progress
    # Nothing but the marker was written.
    after = {path.name: path.stat().st_mtime_ns for path in checkpoint.iterdir()}
    assert {name for name in after if after[name] != before[name]} == {MARKER}
    assert [path.name for path in tmp_path.iterdir()] == [checkpoint.name]


NEVER_FINITE: dict[str, Any] = {"z_loss": 1e38}
BLOWN_UP: dict[str, Any] = {"learning_rate": 3e38, "max_grad_norm": 0}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            NEVER_FINITE,
            r"all 3 steps had a loss or gradient that is not finite.*initial ones; lower learning_rate",
        ),
        (BLOWN_UP, r"the validation loss after step 3 is (nan|inf).*best loss is kept; lower learning_rate"),
    ],
)
def test_a_run_that_led_to_nothing_is_no_success(
    tiny: LlamaConfig, dataset: Path, tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    config = TrainConfig(max_steps=3, precision="fp32", warmup_steps=0, **settings)
    # A resume finds nothing left to do, which is no success either.
    for resume_from in (None, tmp_path / checkpoint_name(3)):
        with pytest.raises(TrainingError, match=message):
            train(
                tiny, config, dataset, device=CPU, observer=Console(), output_dir=str(tmp_path),
                resume_from=resume_from,
            )  # fmt: skip


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd"])
@pytest.mark.parametrize("steps", [1, 2, 3, 9, 10, 50])
def test_every_run_reaches_its_learning_rate(schedule: Any, steps: int) -> None:
    config = TrainConfig(max_steps=steps, learning_rate=0.5, schedule=schedule)
    plan = schedule_of(config)
    rates = [learning_rate(step, config, plan) for step in range(1, steps + 1)]
    assert max(rates) == 0.5
    # Two steps are too few for wsd to decay in a fifth of them.
    if steps > 2:
        assert rates[-1] == pytest.approx(0.05)
