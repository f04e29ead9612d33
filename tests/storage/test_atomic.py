from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from llama_ray.storage import atomic
from llama_ray.storage.atomic import replacing, replacing_path

CRASH = """
import os, sys
from pathlib import Path
from llama_ray.storage.atomic import replacing

with replacing(Path(sys.argv[1])) as stream:
    stream.write(b"half")
    stream.flush()
    os._exit(9)
"""


@pytest.fixture(params=["absent", "present"])
def target(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A path with or without an old file."""
    path = tmp_path / "file"
    if request.param == "present":
        path.write_bytes(b"old")
    return path


def content(path: Path) -> bytes | None:
    return path.read_bytes() if path.exists() else None


def test_readers_see_the_old_file_until_the_block_ends(target: Path) -> None:
    old = content(target)
    with replacing(target) as stream:
        stream.write(b"new")
        stream.flush()
        assert content(target) == old
    assert content(target) == b"new"
    assert list(target.parent.iterdir()) == [target]


def test_an_error_in_the_block_leaves_the_old_file_and_nothing_else(target: Path) -> None:
    old = content(target)
    files = list(target.parent.iterdir())

    def fail() -> None:
        with replacing(target) as stream:
            stream.write(b"half")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        fail()
    assert content(target) == old
    assert list(target.parent.iterdir()) == files


def test_a_crash_in_the_block_leaves_the_old_file(target: Path) -> None:
    old = content(target)
    crashed = subprocess.run([sys.executable, "-c", CRASH, str(target)], check=False)
    assert crashed.returncode == 9
    assert content(target) == old
    # What the process wrote has a hidden name.
    assert all(path == target or path.name.startswith(".") for path in target.parent.iterdir())


def test_the_content_is_on_disk_before_the_file_has_its_name(
    target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, synced = content(target), []

    def sync(path: Path) -> None:
        synced.append((path.read_bytes(), content(target)))

    monkeypatch.setattr(atomic, "sync", sync)
    with replacing(target) as stream:
        stream.write(b"new")
    assert synced == [(b"new", old)]


def test_a_block_that_writes_no_file_raises_and_keeps_the_old_one(target: Path) -> None:
    old = content(target)
    with pytest.raises(FileNotFoundError), replacing_path(target):
        pass
    assert content(target) == old


def test_two_writers_do_not_disturb_each_other(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with replacing(path) as first:
        with replacing(path) as second:
            second.write(b"second")
        first.write(b"first")
        assert path.read_bytes() == b"second"
    assert path.read_bytes() == b"first"


def test_sync_accepts_files_and_directories(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"x")
    descriptors = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    for each in (path, tmp_path):
        atomic.sync(each)
    assert len(os.listdir("/proc/self/fd")) == descriptors  # noqa: PTH208
