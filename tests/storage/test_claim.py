from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from llama_ray.storage import store
from llama_ray.storage.claim import claimed
from llama_ray.storage.store import StorageError
from tests.object_store import s3_server, uri

HOLD = """
import sys
from llama_ray.storage.claim import claimed

with claimed(sys.argv[1], renew_s=0.2):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture(scope="module")
def server() -> Iterator[int]:
    with s3_server() as port:
        yield port


@pytest.fixture(params=["path", "object store"])
def directory(request: pytest.FixtureRequest, tmp_path: Path, server: int) -> str:
    """A run's directory that nobody has used."""
    return str(tmp_path / "run") if request.param == "path" else uri(server, f"{tmp_path.name}/run")


def claim(directory: str, stale_s: float = 20.0) -> AbstractContextManager[None]:
    # S3 gives times of modification in whole seconds.
    return claimed(directory, renew_s=0.2, stale_s=stale_s)


def test_a_second_launch_is_refused_while_the_first_one_lives(directory: str) -> None:
    with (
        claim(directory),
        pytest.raises(StorageError, match=r"run.* is in use by another launch; .*--run_name"),
        claim(directory),
    ):
        pytest.fail("held twice")
    with claim(directory):
        pass


def test_of_launches_at_the_same_moment_one_wins(directory: str) -> None:
    together = threading.Barrier(4)
    results: list[str] = []
    ended = threading.Event()

    def note(result: str) -> None:
        results.append(result)
        if len(results) == 4:
            ended.set()

    def launch() -> None:
        together.wait()
        try:
            with claim(directory):
                note("won")
                ended.wait(30)
        except StorageError as error:
            note(str(error))

    threads = [threading.Thread(target=launch) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(result == "won" for result in results) == [False, False, False, True]


def test_a_killed_launch_holds_nothing(directory: str) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, directory], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as killed:
        assert killed.stdout is not None
        assert killed.stdout.readline() == "held\n"
        os.kill(killed.pid, signal.SIGKILL)
    with claim(directory, stale_s=1.5):
        names = store.list_files(directory)
    assert len(names) == 1
    assert all(name.startswith(".") for name in names)


def test_an_error_in_the_block_frees_the_directory(directory: str) -> None:
    with pytest.raises(RuntimeError), claim(directory):
        raise RuntimeError("broken")
    with claim(directory):
        pass


def test_a_directory_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with (
        pytest.raises(StorageError, match=r"cannot be written .* give another --output_dir") as refused,
        claim(f"{tmp_path}/file/run"),
    ):
        pytest.fail("held")
    assert "\n" not in str(refused.value)


def test_a_launch_that_takes_over_holds_the_directory_beside_the_other(directory: str) -> None:
    with (
        claim(directory),
        claimed(directory, take_over=True),
        pytest.raises(StorageError, match="in use"),
        claim(directory),
    ):
        pytest.fail("held thrice")
