"""Which checkpoint of a run is continued from, and which ones are deleted."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from llama_ray.storage import run_directory
from llama_ray.training.checkpointing.catalog import checkpoint_name, latest_valid_checkpoint, prune

FILES = {"model-rank00000.safetensors": b"weights" * 100, "optimizer-rank00000.safetensors": b"state" * 100}


def write_checkpoint(run: Path, step: int, **progress: float) -> Path:
    directory = run / checkpoint_name(step)
    directory.mkdir()
    for name, content in FILES.items():
        (directory / name).write_bytes(content)
    records = {n: {"bytes": len(c), "sha256": hashlib.sha256(c).hexdigest()} for n, c in FILES.items()}
    (directory / run_directory.MARKER).write_text(json.dumps({"files": records, **progress}))
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


def test_the_newest_few_and_the_best_are_kept(tmp_path: Path) -> None:
    for step, loss in ((1, 3.0), (2, 1.0), (3, 1.0), (4, 2.0), (5, 2.5)):
        write_checkpoint(tmp_path, step, validation_loss=loss)
    prune(str(tmp_path), step=5, keep=2)
    assert sorted(p.name[-1] for p in tmp_path.iterdir()) == ["2", "4", "5"]
