"""Attempts at a run: which one is the newest, and which ones must write apart from others."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from llama_ray.storage import store
from llama_ray.storage.attempts import Attempt, Superseded, attempt, current, lives_here
from tests.object_store import s3_server, uri

BEGIN = """
import sys
from llama_ray.storage.attempts import attempt

with attempt(sys.argv[1]):
    print("begun", flush=True)
    sys.stdin.read()
"""


@pytest.fixture(scope="module")
def server() -> Iterator[int]:
    with s3_server() as port:
        yield port


@pytest.fixture(params=["path", "object store"])
def run(request: pytest.FixtureRequest, tmp_path: Path, server: int) -> str:
    """A run's directory that nobody has used."""
    return str(tmp_path / "run") if request.param == "path" else uri(server, f"{tmp_path.name}/run")


def begin_and_kill(run: str) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", BEGIN, run], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "begun\n"
        os.kill(process.pid, signal.SIGKILL)


def test_the_newest_attempt_fences_the_others_off(run: str) -> None:
    with attempt(run) as first:
        first.check()
        with attempt(run) as second:
            assert (first.number, second.number) == (1, 2)
            second.check()
            with pytest.raises(
                Superseded, match=r"^attempt 1 at run run ends, because attempt 2 on \S+ goes on with it$"
            ):
                first.check()
        # Nor may it go on when the newer one has ended.
        assert not first.is_newest()
    assert current(run).number == 2


def test_attempts_of_the_same_moment_have_different_numbers(run: str) -> None:
    together = threading.Barrier(3, timeout=60)
    begun: list[Attempt] = []

    def begin() -> None:
        together.wait()
        with attempt(run) as mine:
            begun.append(mine)
            together.wait()

    threads = [threading.Thread(target=begin) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    numbers = [each.number for each in begun]
    assert len(set(numbers)) == 3
    assert [each.number for each in begun if each.is_newest()] == [max(numbers)]


def test_an_attempt_writes_apart_unless_all_before_it_have_ended(run: str) -> None:
    with attempt(run) as first:
        assert not first.apart
    with pytest.raises(ValueError, match="wrong"), attempt(run):
        raise ValueError("wrong")
    with attempt(run) as third:
        assert not third.apart
        assert lives_here(run)
    assert not lives_here(run)
    with pytest.raises(KeyboardInterrupt), attempt(run):
        # Its workers may be at work for a moment longer.
        raise KeyboardInterrupt
    for _ in range(2):
        with attempt(run) as later:
            assert later.apart


def test_a_killed_attempt_may_still_be_writing(run: str) -> None:
    begin_and_kill(run)
    assert lives_here(run)
    with attempt(run) as second:
        assert second.apart


def test_an_attempt_elsewhere_does_not_live_here(run: str) -> None:
    with ExitStack() as begun:
        begun.enter_context(attempt(run))
        [name] = store.list_files(store.join(run, "attempts"))
        file = store.join(store.join(run, "attempts"), name)
        for content in ('{"host": "elsewhere", "boot": "", "ended": false}', "cut off by a power cut"):
            store.write_text(file, content)
            assert not lives_here(run)
            with attempt(run) as second:
                assert second.apart
