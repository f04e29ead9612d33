"""Copies of remote files: the bound holds, what is in use stays, and processes may die at any time."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import pytest

from llama_ray.storage.file_cache import FileCache


def content(size: int) -> Callable[[BinaryIO], None]:
    def write(file: BinaryIO) -> None:
        file.write(b"x" * size)

    return write


def fill(cache: FileCache, name: str, size: int = 100) -> bool:
    return cache.fill(name, size, content(size)) is not None


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.glob("*/[!.]*"))


def test_a_file_is_written_once(tmp_path: Path) -> None:
    cache = FileCache(tmp_path, "data", 1000)
    assert cache.find("a", 100) is None
    path = cache.fill("a", 100, content(100))
    assert path is not None
    assert path.read_bytes() == b"x" * 100
    assert cache.find("a", 100) == FileCache(tmp_path, "data", 1000).fill("a", 100, pytest.fail) == path


def test_files_in_use_stay_and_the_bound_holds(tmp_path: Path) -> None:
    cache, other = FileCache(tmp_path, "a", 350), FileCache(tmp_path, "b", 350)
    assert [fill(cache, "1"), fill(other, "2"), fill(cache, "3"), fill(cache, "4")] == [
        True,
        True,
        True,
        False,
    ]
    assert not fill(cache, "large", 1000)
    assert names(tmp_path) == ["1", "2", "3"]


def test_what_was_not_used_for_the_longest_time_goes_first(tmp_path: Path) -> None:
    for number, name in enumerate(("first", "second", "third")):
        fill(FileCache(tmp_path, name, 350), name)
        os.utime(tmp_path / name / ".in-use", (number, number))
    # Used again, but not any more.
    FileCache(tmp_path, "first", 350)
    fill(FileCache(tmp_path, "fourth", 350), "fourth")
    assert names(tmp_path) == ["first", "fourth", "third"]


def test_an_error_leaves_nothing_behind(tmp_path: Path) -> None:
    def fail(file: BinaryIO) -> None:
        file.write(b"x")
        raise ValueError("another checksum")

    cache = FileCache(tmp_path, "data", 100)
    with pytest.raises(ValueError, match="another checksum"):
        cache.fill("a", 100, fail)
    assert names(tmp_path) == []
    assert fill(cache, "a")


def test_a_directory_that_was_removed_takes_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache = FileCache(tmp_path, "data", 100)
    shutil.rmtree(cache.directory)
    assert not fill(cache, "a")
    assert "a.partial cannot be written: [Errno 2]" in caplog.text


def test_what_a_killed_process_left_of_a_file_makes_room_for_it(tmp_path: Path) -> None:
    cache = FileCache(tmp_path, "data", 150)
    (cache.directory / "a.partial").write_bytes(b"y" * 100)
    assert fill(cache, "a")


def test_one_process_writes_a_file_and_the_copy_of_a_killed_one_is_removed(tmp_path: Path) -> None:
    begun, write_end = os.pipe()

    def hang(file: BinaryIO) -> None:
        os.write(write_end, b"!")
        signal.pause()

    if (child := os.fork()) == 0:
        FileCache(tmp_path, "data", 150).fill("a", 100, hang)
        os._exit(1)
    os.read(begun, 1)
    cache = FileCache(tmp_path, "data", 150)
    # It is being written, and its place is taken.
    assert not fill(cache, "a")
    assert not fill(cache, "b")
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert names(tmp_path) == ["a.partial"]
    assert fill(cache, "b")
    assert names(tmp_path) == ["b"]
