"""Runs and checkpoints in a local directory; `test_object_store` has those in object stores."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from llama_ray.storage import run_directory
from llama_ray.storage.run_directory import MARKER
from llama_ray.storage.store import StorageError

FILES = {"model.safetensors": b"weights" * 100, "optimizer.safetensors": b"state" * 100}


def write_checkpoint(run: Path, step: int, saved_at: float | None = None) -> Path:
    directory = run / f"step_{step:08d}"
    directory.mkdir(parents=True)
    for name, content in FILES.items():
        (directory / name).write_bytes(content)
    records = {n: {"bytes": len(c), "sha256": hashlib.sha256(c).hexdigest()} for n, c in FILES.items()}
    (directory / MARKER).write_text(json.dumps({"files": records}))
    if saved_at is not None:
        os.utime(directory / MARKER, (saved_at, saved_at))
    return directory


def truncate(checkpoint: Path) -> None:
    (checkpoint / "optimizer.safetensors").write_bytes(b"state")


def remove_file(checkpoint: Path) -> None:
    (checkpoint / "optimizer.safetensors").unlink()


def empty_marker(checkpoint: Path) -> None:
    (checkpoint / MARKER).write_text("")


def change_content(checkpoint: Path) -> None:
    (checkpoint / "optimizer.safetensors").write_bytes(b"STATE" * 100)


def test_a_writable_directory_is_created_and_left_empty(tmp_path: Path) -> None:
    run_directory.check_writable(f"{tmp_path}/new/directory")
    assert list((tmp_path / "new" / "directory").iterdir()) == []


@pytest.mark.parametrize("location", ["{tmp}/file", "{tmp}/file/below", "relative", "gopher://host/runs"])
def test_a_location_that_cannot_be_written_is_refused_in_one_line(tmp_path: Path, location: str) -> None:
    (tmp_path / "file").write_text("a file")
    with pytest.raises(StorageError, match=r"cannot be written \(.+\); give another --output_dir") as refused:
        run_directory.check_writable(location.format(tmp=tmp_path))
    assert "\n" not in str(refused.value)


def test_the_latest_run_is_the_one_that_saved_last(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "b", 9, saved_at=1000)
    write_checkpoint(tmp_path / "a", 1, saved_at=3000)
    write_checkpoint(tmp_path / "c", 5, saved_at=2000)
    (tmp_path / "d").mkdir()
    assert run_directory.latest_run(str(tmp_path)) == "a"


@pytest.mark.parametrize("location", ["{tmp}", "{tmp}/nowhere"])
def test_without_a_checkpoint_there_is_no_run_to_resume(tmp_path: Path, location: str) -> None:
    (tmp_path / "run" / "step_00000001").mkdir(parents=True)
    with pytest.raises(StorageError, match="holds no run to resume; check --output_dir"):
        run_directory.latest_run(location.format(tmp=tmp_path))


def test_checkpoints_are_directories_with_a_marker_newest_first(tmp_path: Path) -> None:
    checkpoints = [str(write_checkpoint(tmp_path, step)) for step in (2, 11, 9)]
    (write_checkpoint(tmp_path, 12) / MARKER).unlink()
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / MARKER).write_text("{}")
    assert run_directory.list_checkpoints(str(tmp_path)) == [checkpoints[i] for i in (1, 2, 0)]


@pytest.mark.parametrize("damage", [truncate, remove_file, empty_marker])
def test_an_incomplete_checkpoint_is_skipped_with_a_warning(
    tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    complete = write_checkpoint(tmp_path, 1)
    damage(write_checkpoint(tmp_path, 2))
    with pytest.warns(UserWarning, match="step_00000002 is damaged and skipped"):
        assert run_directory.latest_checkpoint(str(tmp_path)) == str(complete)


def test_a_run_without_checkpoints_has_no_latest_one(tmp_path: Path) -> None:
    assert run_directory.latest_checkpoint(str(tmp_path)) is None
    assert run_directory.latest_checkpoint(f"{tmp_path}/nowhere") is None


def test_a_complete_checkpoint_has_no_difference_to_its_marker(tmp_path: Path) -> None:
    checkpoint = str(write_checkpoint(tmp_path, 1))
    assert run_directory.missing_or_truncated(checkpoint) is None
    assert run_directory.changed_content(checkpoint, FILES) is None


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (change_content, "the content of optimizer.safetensors is not what was written"),
        (remove_file, "optimizer.safetensors cannot be read"),
    ],
)
def test_changed_content_names_the_first_damaged_file(
    tmp_path: Path, damage: Callable[[Path], None], reason: str
) -> None:
    checkpoint = write_checkpoint(tmp_path, 1)
    damage(checkpoint)
    with pytest.warns(UserWarning, match=reason):
        assert reason in (run_directory.changed_content(str(checkpoint), FILES) or "")


@pytest.mark.parametrize("content", ["", "{", "[]", "3", "{}", '{"files": []}'])
def test_an_invalid_marker_is_none(tmp_path: Path, content: str) -> None:
    (tmp_path / MARKER).write_text(content)
    assert run_directory.read_marker(str(tmp_path)) is None


def test_a_removed_checkpoint_is_gone_and_may_be_removed_again(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path, 1)
    for _ in range(2):
        run_directory.remove_checkpoint(str(checkpoint))
        assert list(tmp_path.iterdir()) == []


def test_the_users_files_in_a_removed_checkpoint_stay(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path, 1)
    (checkpoint / "notes.txt").write_text("the good one")
    (checkpoint / "config.json.bak").write_text("{}")
    run_directory.remove_checkpoint(str(checkpoint))
    assert sorted(path.name for path in checkpoint.iterdir()) == ["config.json.bak", "notes.txt"]


def test_what_a_killed_run_left_of_a_checkpoint_is_removed(tmp_path: Path) -> None:
    checkpoint = tmp_path / "step_00000001"
    checkpoint.mkdir()
    for name in ("model-rank00003.safetensors", "tokenizer.json", ".training.json.0123abcd"):
        (checkpoint / name).write_text("half")
    run_directory.remove_checkpoint(str(checkpoint))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("step", [0, 1, 12_345_678, 123_456_789])
@pytest.mark.parametrize("attempt", [None, 2, 10])
def test_a_name_gives_back_its_step(step: int, attempt: int | None) -> None:
    assert run_directory.checkpoint_step(run_directory.checkpoint_name(step, attempt)) == step


@pytest.mark.parametrize(
    "name", ["step_00000001-", "step_00000001-0", "step_00000001-02", "step_00000001-2-3"]
)
def test_no_other_name_is_one_of_an_attempt(name: str) -> None:
    assert run_directory.checkpoint_step(name) is None


def test_of_one_step_the_newest_attempt_counts_and_copies_do_not(tmp_path: Path) -> None:
    for name, attempt in (
        ("step_00000001", 1),
        ("step_00000001-2", 2),
        ("step_00000001-10", 10),
        ("step_00000001-11", 2),
    ):
        marker = write_checkpoint(tmp_path / "written", 1) / MARKER
        marker.write_text(json.dumps(json.loads(marker.read_text()) | {"step": 1, "attempt": attempt}))
        marker.parent.rename(tmp_path / name)
    assert [Path(c).name for c in run_directory.list_checkpoints(str(tmp_path))] == [
        "step_00000001-10", "step_00000001-2", "step_00000001"
    ]  # fmt: skip


def test_a_copy_of_a_run_is_not_the_latest_run(tmp_path: Path) -> None:
    for name, run, id, saved_at in (
        ("a", "a", "1", 1000),
        ("a.bak", "a", "1", 3000),
        ("renamed", "b", "2", 2000),
    ):
        marker = write_checkpoint(tmp_path / name, 1) / MARKER
        marker.write_text(json.dumps(json.loads(marker.read_text()) | {"run": run, "run_id": id}))
        os.utime(marker, (saved_at, saved_at))
    assert run_directory.latest_run(str(tmp_path)) == "renamed"
    shutil.rmtree(tmp_path / "renamed")
    assert run_directory.latest_run(str(tmp_path)) == "a"
    shutil.rmtree(tmp_path / "a")
    assert run_directory.latest_run(str(tmp_path)) == "a.bak"
