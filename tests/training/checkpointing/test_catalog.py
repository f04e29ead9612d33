"""Which checkpoint of a run is continued from, and which ones are deleted."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from llama_ray.storage import run_directory
from llama_ray.storage.run_directory import checkpoint_name
from llama_ray.training.checkpointing.catalog import latest_valid_checkpoint, prune

FILES = {"model-rank00000.safetensors": b"weights" * 100, "optimizer-rank00000.safetensors": b"state" * 100}


def write_checkpoint(run: Path, step: int, **progress: object) -> Path:
    directory = run / checkpoint_name(step)
    directory.mkdir()
    for name, content in FILES.items():
        (directory / name).write_bytes(content)
    records = {n: {"bytes": len(c), "sha256": hashlib.sha256(c).hexdigest()} for n, c in FILES.items()}
    (directory / run_directory.MARKER).write_text(json.dumps({"step": step, "files": records, **progress}))
    return directory


def cut(checkpoint: Path) -> None:
    victim = checkpoint / "optimizer-rank00000.safetensors"
    victim.write_bytes(victim.read_bytes()[:-1])


def flip_a_bit(checkpoint: Path) -> None:
    victim = checkpoint / "optimizer-rank00000.safetensors"
    content = bytearray(victim.read_bytes())
    content[-100] ^= 1
    victim.write_bytes(content)


def remove_a_file(checkpoint: Path) -> None:
    (checkpoint / "optimizer-rank00000.safetensors").unlink()


@pytest.mark.parametrize("damage", [cut, flip_a_bit, remove_a_file])
def test_a_damaged_checkpoint_is_skipped_and_never_considered_again(
    tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    good = write_checkpoint(tmp_path, 4)
    damage(write_checkpoint(tmp_path, 5))
    with pytest.warns(UserWarning, match="is damaged and"):
        assert latest_valid_checkpoint(str(tmp_path), 60) == str(good)
    assert run_directory.list_checkpoints(str(tmp_path)) == [str(good)]


def test_a_checkpoint_that_could_not_be_read_can_be_had_again(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, 4)
    newest = write_checkpoint(tmp_path, 5)
    weights, marker = newest / "model-rank00000.safetensors", newest / run_directory.MARKER
    content, written = weights.read_bytes(), marker.read_text()
    weights.unlink()
    with pytest.warns(UserWarning, match="is damaged and"):
        latest_valid_checkpoint(str(tmp_path), 60)
    # The storage is whole again.
    weights.write_bytes(content)
    [aside] = [path for path in newest.iterdir() if path.name.endswith(".damaged")]
    assert aside.read_text() == written
    aside.rename(marker)
    assert latest_valid_checkpoint(str(tmp_path), 60) == str(newest)


def test_a_directory_without_a_marker_is_not_a_checkpoint(tmp_path: Path) -> None:
    good = write_checkpoint(tmp_path, 4)
    (write_checkpoint(tmp_path, 5) / run_directory.MARKER).unlink()
    assert latest_valid_checkpoint(str(tmp_path), 60) == str(good)
    assert run_directory.list_checkpoints(str(tmp_path)) == [str(good)]


def test_several_damaged_checkpoints_in_a_row_are_skipped(tmp_path: Path) -> None:
    good = write_checkpoint(tmp_path, 4)
    for step, damage in enumerate((cut, flip_a_bit, remove_a_file), 5):
        damage(write_checkpoint(tmp_path, step))
    with pytest.warns(UserWarning, match="is damaged and"):
        assert latest_valid_checkpoint(str(tmp_path), 60) == str(good)
    assert run_directory.list_checkpoints(str(tmp_path)) == [str(good)]


def test_a_run_without_checkpoints_has_no_valid_one(tmp_path: Path) -> None:
    assert latest_valid_checkpoint(str(tmp_path), 60) is None


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_the_newest_few_and_the_best_are_kept(tmp_path: Path) -> None:
    for step, loss in ((1, 3.0), (2, 1.0), (3, 1.0), (4, 2.0), (5, 2.5)):
        write_checkpoint(tmp_path, step, validation_loss=loss)
    prune(str(tmp_path), step=5, keep=2)
    assert [name[-1] for name in names(tmp_path)] == ["2", "4", "5"]


@pytest.mark.parametrize("position", [0, 1, 2, 3, 4])
@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf, None])
def test_a_loss_that_is_not_a_finite_number_is_never_the_best(
    tmp_path: Path, loss: float | None, position: int
) -> None:
    losses: list[float | None] = [3.0, 1.0, 2.0, 2.5]
    losses.insert(position, loss)
    for step, measured in enumerate(losses, 1):
        write_checkpoint(tmp_path, step, validation_loss=measured)
    prune(str(tmp_path), step=5, keep=1)
    assert names(tmp_path) == sorted({checkpoint_name(losses.index(1.0) + 1), checkpoint_name(5)})


def test_without_a_finite_loss_the_newest_are_kept(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        write_checkpoint(tmp_path, step, validation_loss=math.nan)
    prune(str(tmp_path), step=3, keep=2)
    assert [name[-1] for name in names(tmp_path)] == ["2", "3"]


def test_a_loss_on_other_data_is_not_compared(tmp_path: Path) -> None:
    for step, (loss, data) in enumerate([(1.0, "old"), (3.0, "new"), (4.0, "new"), (5.0, "new")], 1):
        write_checkpoint(
            tmp_path, step, validation_loss=loss, loader={"sources": {"web": {"data": data, "windows": 9}}}
        )
    prune(str(tmp_path), step=4, keep=1)
    assert [name[-1] for name in names(tmp_path)] == ["2", "4"]


def test_steps_are_ordered_as_numbers(tmp_path: Path) -> None:
    for step in (99_999_998, 99_999_999, 100_000_000):
        write_checkpoint(tmp_path, step)
    prune(str(tmp_path), step=100_000_000, keep=2)
    assert names(tmp_path) == ["step_100000000", "step_99999999"]
    assert latest_valid_checkpoint(str(tmp_path), 60) == str(tmp_path / "step_100000000")


# What a user may have beside the checkpoints: copies under names that are not ours.
USERS = (
    "step_best",
    "step_00000003.bak",
    "step_000000099",
    "step_99",
    "step_00000099 (copy)",
    "step_0000009９",
)


def test_copies_under_other_names_are_neither_continued_from_nor_deleted(tmp_path: Path) -> None:
    newest = write_checkpoint(tmp_path, 3)
    for name in USERS:
        shutil.copytree(newest, tmp_path / name)
    # A name of ours, but the content of another step.
    shutil.copytree(newest, tmp_path / "step_00000099")
    (tmp_path / "step_last").symlink_to(newest)
    for step in (4, 5):
        newest = write_checkpoint(tmp_path, step)
        assert latest_valid_checkpoint(str(tmp_path), 60) == str(newest)
        prune(str(tmp_path), step, keep=1)
    assert names(tmp_path) == sorted([*USERS, "step_00000099", "step_last", "step_00000005"])
    assert all(names(tmp_path / name) == names(newest) for name in USERS)


def test_a_link_is_pruned_without_what_it_leads_to(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (tmp_path / "elsewhere").mkdir()
    moved = write_checkpoint(tmp_path / "elsewhere", 3)
    (run / moved.name).symlink_to(moved)
    assert latest_valid_checkpoint(str(run), 60) == str(run / moved.name)
    write_checkpoint(run, 4)
    prune(str(run), 4, keep=1)
    assert names(run) == ["step_00000004"]
    assert names(moved) == names(run / "step_00000004")
