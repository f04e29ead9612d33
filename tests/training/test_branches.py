"""Runs that go on from a checkpoint of another run with a schedule of their own."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from llama_ray.data.mixtures.sources import parse_sources
from llama_ray.data.mixtures.stages import Segment
from llama_ray.data.mixtures.timetable import Timetable
from llama_ray.model.config import LlamaConfig
from llama_ray.model.weight_files import CheckpointError
from llama_ray.pretrained import load_pretrained
from llama_ray.training.checkpointing.progress import load_progress
from llama_ray.training.config import Schedule, TrainConfig
from llama_ray.training.loop import train
from llama_ray.training.optimizers.build import learning_rate
from llama_ray.training.preflight import check_run
from llama_ray.training.starting_point import starting_point
from tests.training.helpers import CPU, TWELVE_STEPS, FinishedRun, Recorder, losses, losses_after

FLAT: dict[str, Any] = {"schedule": "linear", "min_learning_rate_ratio": 1.0, "warmup_steps": 0}


def branch_of(finished: FinishedRun, step: int = 5, **changes: Any) -> TrainConfig:
    """A branch of `finished` after `step`, of four steps unless `changes` say otherwise."""
    settings: dict[str, Any] = {"branch_from": str(finished.checkpoint(step)), "max_steps": 4, **changes}
    return replace(TWELVE_STEPS, **settings)


def test_a_branch_takes_the_steps_that_the_run_itself_takes(
    tiny: LlamaConfig, dataset: Path, tmp_path: Path
) -> None:
    """At the same rate its weights, optimizer and data are those of the run that went on."""
    config = replace(TWELVE_STEPS, max_steps=9, **FLAT)
    whole, branch = Recorder(), Recorder()
    train(tiny, config, dataset, device=CPU, observer=whole, output_dir=str(tmp_path / "run"))
    other = replace(config, branch_from=str(tmp_path / "run" / "step_00000005"), max_steps=4)
    train(tiny, other, dataset, device=CPU, observer=branch, output_dir=str(tmp_path / "branch"))
    assert losses(branch) == losses_after(5, losses(whole))
    ours, theirs = (load_pretrained(tmp_path / name / "step_00000009")[0] for name in ("branch", "run"))
    assert all(bool((a == b).all()) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))


def test_its_learning_rate_begins_where_the_branch_does(
    tiny: LlamaConfig, dataset: Path, finished: FinishedRun
) -> None:
    recorder = Recorder()
    config = branch_of(finished, schedule="linear", learning_rate=1e-3, min_learning_rate_ratio=0)
    progress = train(tiny, config, dataset, device=CPU, observer=recorder)
    rates = {step: metrics["train/learning_rate"] for step, metrics in recorder.points.items()}
    assert rates == pytest.approx({6: 1e-3, 7: 2e-3 / 3, 8: 1e-3 / 3, 9: 0})
    assert (progress.step, progress.branched_at) == (9, 5)


def test_a_branch_has_no_warm_up_unless_it_is_asked_for() -> None:
    config = TrainConfig(max_steps=100, learning_rate=1.0, schedule="linear", min_learning_rate_ratio=0)
    timetable = Timetable([Segment(1, 1, 32, {})], 50, 50, [0])
    schedule = Schedule.of(config, timetable, 40, branched_at=50)
    assert (schedule.total_steps, schedule.warmup_steps) == (150, 0)
    assert [learning_rate(step, config, schedule) for step in (51, 150)] == [1.0, 0.0]
    slower = replace(config, warmup_steps=10)
    schedule = Schedule.of(slower, timetable, 40, branched_at=50)
    assert [learning_rate(step, slower, schedule) for step in (51, 60, 150)] == [0.1, 1.0, 0.0]


def test_its_checkpoints_name_what_it_goes_on_from(
    tiny: LlamaConfig, dataset: Path, finished: FinishedRun, tmp_path: Path
) -> None:
    config = branch_of(finished)
    train(tiny, config, dataset, device=CPU, observer=Recorder(), output_dir=str(tmp_path), run_id="new")
    progress = load_progress(tmp_path / "step_00000009")
    assert (progress.parent, progress.branched_at, progress.run_id) == (config.branch_from, 5, "new")
    before, position = load_progress(finished.checkpoint(5)), progress.loader
    assert before.loader is not None
    assert position is not None
    assert position["position"] == before.loader["position"] + 4 * position["windows_per_step"]


def test_a_branch_resumes_exactly_without_what_it_began_with(
    tiny: LlamaConfig, dataset: Path, finished: FinishedRun, tmp_path: Path
) -> None:
    config = branch_of(finished, checkpoint_every=1, schedule="cosine", learning_rate=2e-3)
    whole, again = Recorder(), Recorder()
    train(tiny, config, dataset, device=CPU, observer=whole, output_dir=str(tmp_path))
    gone = replace(config, branch_from=str(tmp_path / "gone"))
    train(tiny, gone, dataset, device=CPU, observer=again, resume_from=tmp_path / "step_00000007")
    assert losses(again) == losses_after(7, losses(whole))
    assert again.points[9]["train/learning_rate"] == whole.points[9]["train/learning_rate"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"init_from": "somewhere"}, "init_from and branch_from are both given; .* leave out one of them"),
        ({"max_steps": None}, "max_steps is None; a branch has a schedule of its own; give the number"),
    ],
)
def test_settings_that_make_no_branch_are_refused(
    finished: FinishedRun, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        branch_of(finished, **changes)


@pytest.mark.parametrize(
    ("ref", "message"),
    [
        ("models:/name/1", "has weights alone; it must be a checkpoint of a run"),
        ("{run}", r"is no checkpoint of a run \(no training.json\); name a step_\* directory"),
        ("{run}/nowhere", "is no checkpoint of a run"),
    ],
)
def test_what_is_no_checkpoint_is_refused(
    tiny: LlamaConfig, dataset: Path, finished: FinishedRun, ref: str, message: str
) -> None:
    config = branch_of(finished, branch_from=ref.format(run=finished.directory))
    with pytest.raises(CheckpointError, match=message):
        train(tiny, config, dataset, device=CPU, observer=Recorder())


def test_a_branch_with_another_optimizer_is_refused(
    tiny: LlamaConfig, dataset: Path, finished: FinishedRun
) -> None:
    with pytest.raises(
        CheckpointError, match=r"optimizer is muon; the checkpoint was trained with adamw; give --opt"
    ):
        train(tiny, branch_of(finished, optimizer="muon"), dataset, device=CPU, observer=Recorder())


def test_a_branch_may_begin_other_data(tiny: LlamaConfig, dataset: Path, finished: FinishedRun) -> None:
    config = branch_of(finished, seed=1)
    with (
        starting_point(config, None) as start,
        pytest.raises(ValueError, match=r"trained with seed 0; this run has 1; .* --allow_other_data"),
    ):
        check_run(tiny, config, parse_sources(dataset), 1, start)
    allowed = replace(config, allow_other_data=True)
    progress = train(tiny, allowed, dataset, device=CPU, observer=Recorder())
    assert progress.step == 9
