"""Checkpoints of several real workers: who writes what, and what a crash, a full disk or a flipped bit leaves."""

from __future__ import annotations

import json
import resource
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from llama_ray.model.config import LlamaConfig
from llama_ray.pretrained import load_pretrained
from llama_ray.storage import run_directory
from llama_ray.training.checkpointing.catalog import latest_valid_checkpoint, prune
from llama_ray.training.checkpointing.checkpointer import CheckpointResult
from llama_ray.training.checkpointing.progress import load_progress
from llama_ray.training.config import TrainConfig
from llama_ray.training.errors import TrainingError
from llama_ray.training.loop import train
from tests.training.helpers import Recorder, in_processes, losses

CPU = torch.device("cpu")
CONFIG = TrainConfig(
    max_steps=8, batch_size=4, learning_rate=3e-3, log_every=1, checkpoint_every=4, precision="fp32"
)  # fmt: skip


def _train(config: TrainConfig, model: LlamaConfig, data: Path, run: Path, resume: bool) -> dict[int, float]:
    recorder = Recorder()
    source = latest_valid_checkpoint(str(run), 60) if resume else None
    train(
        model, config, data, device=CPU, observer=recorder, output_dir=str(run),
        resume_from=Path(source) if source else None,
    )  # fmt: skip
    return losses(recorder)


def _run(
    workers: int, config: TrainConfig, model: LlamaConfig, data: Path, run: Path, resume: bool = False
) -> dict[int, float]:
    return in_processes(workers, _train, config, model, data, run, resume)[0]


@pytest.fixture(scope="module")
def sharded(tiny: LlamaConfig, dataset: Path, tmp_path_factory) -> tuple[Path, dict[int, float]]:
    """A run of two workers that hold half of everything each."""
    run = tmp_path_factory.mktemp("fsdp")
    return run, _run(2, replace(CONFIG, parallelism="fsdp"), tiny, dataset, run)


def copy_without_the_last(run: Path, target: Path) -> Path:
    target.mkdir()
    (target / "step_00000004").mkdir()
    for file in (run / "step_00000004").iterdir():
        (target / "step_00000004" / file.name).write_bytes(file.read_bytes())
    return target


def weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    return load_pretrained(checkpoint)[0].state_dict()


def test_each_worker_writes_its_share_and_no_more(sharded: tuple[Path, dict[int, float]]) -> None:
    files = sorted((sharded[0] / "step_00000008").glob("*-rank*.safetensors"))
    assert len(files) == 4
    sizes = [sum(t.nbytes for t in load_file(f).values()) for f in files]
    for kind in (sizes[:2], sizes[2:]):
        assert abs(kind[0] - kind[1]) < 0.05 * sum(kind)


def test_a_model_in_pieces_opens_as_the_whole_one(
    sharded: tuple[Path, dict[int, float]], tiny: LlamaConfig, dataset: Path, tmp_path: Path
) -> None:
    _run(1, replace(CONFIG, batch_size=8), tiny, dataset, tmp_path)
    alone, together = weights(tmp_path / "step_00000008"), weights(sharded[0] / "step_00000008")
    for name in alone:
        torch.testing.assert_close(together[name], alone[name], atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize(("workers", "parallelism"), [(2, "fsdp"), (2, "ddp"), (1, "auto")])
def test_a_run_goes_on_with_other_workers_and_another_layout(
    sharded: tuple[Path, dict[int, float]],
    tiny: LlamaConfig,
    dataset: Path,
    tmp_path: Path,
    workers,
    parallelism,
) -> None:
    run = copy_without_the_last(sharded[0], tmp_path / "run")
    config = replace(CONFIG, parallelism=parallelism, batch_size=8 // workers)
    after = _run(workers, config, tiny, dataset, run, resume=True)
    expected = {step: loss for step, loss in sharded[1].items() if step > 4}
    if (workers, parallelism) == (2, "fsdp"):
        assert after == expected
        ours, theirs = weights(run / "step_00000008"), weights(sharded[0] / "step_00000008")
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert after == pytest.approx(expected, rel=1e-4)
    assert load_progress(run / "step_00000008").loader == load_progress(sharded[0] / "step_00000008").loader


def test_damaged_checkpoints_are_passed_over(sharded: tuple[Path, dict[int, float]], tmp_path: Path) -> None:
    run = copy_without_the_last(sharded[0], tmp_path / "run")
    good = str(run / "step_00000004")
    for step, damage in ((5, "cut"), (6, "flipped bit"), (7, "missing"), (8, "no marker")):
        copy = run / f"step_{step:08d}"
        copy.mkdir()
        for file in (run / "step_00000004").iterdir():
            (copy / file.name).write_bytes(file.read_bytes())
        victim = copy / "optimizer-rank00001.safetensors"
        content = bytearray(victim.read_bytes())
        if damage == "cut":
            victim.write_bytes(content[:-1])
        elif damage == "flipped bit":
            content[-100] ^= 1
            victim.write_bytes(content)
        else:
            (victim if damage == "missing" else copy / run_directory.MARKER).unlink()
    with pytest.warns(UserWarning, match="damaged and passed over"):
        assert latest_valid_checkpoint(str(run), 60) == good
    assert run_directory.list_checkpoints(str(run)) == [good]


def _train_with_little_room(
    config: TrainConfig, model: LlamaConfig, data: Path, run: Path
) -> list[str | None]:
    recorder = Recorder()

    class Full(Recorder):
        def checkpointed(self, result: CheckpointResult) -> None:
            recorder.checkpoints.append(result)
            # After the first checkpoint, no file may grow beyond a few bytes.
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))

    with pytest.raises(TrainingError, match=r"checkpoints? .* could not be stored"):
        train(model, config, data, device=CPU, observer=Full(), output_dir=str(run))
    return [result.error for result in recorder.checkpoints]


def test_a_full_disk_costs_checkpoints_but_not_the_last_good_one(
    tiny: LlamaConfig, dataset: Path, tmp_path: Path
) -> None:
    config = replace(CONFIG, max_steps=60)
    [errors] = in_processes(1, _train_with_little_room, config, tiny, dataset, tmp_path)
    assert errors[0] is None
    assert len(errors) >= 3
    assert all("File too large" in error for error in errors[1:])
    assert [Path(c).name for c in run_directory.list_checkpoints(str(tmp_path))] == ["step_00000004"]
    assert run_directory.latest_checkpoint(str(tmp_path)) == str(tmp_path / "step_00000004")


def test_the_newest_few_and_the_best_are_kept(tmp_path: Path) -> None:
    for step, loss in ((1, 3.0), (2, 1.0), (3, 1.0), (4, 2.0), (5, 2.5)):
        directory = tmp_path / f"step_{step:08d}"
        directory.mkdir()
        (directory / run_directory.MARKER).write_text(json.dumps({"files": {}, "validation_loss": loss}))
    prune(str(tmp_path), step=5, keep=2)
    assert sorted(p.name[-1] for p in tmp_path.iterdir()) == ["2", "4", "5"]
