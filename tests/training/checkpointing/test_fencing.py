"""Attempts at a run that overlap: an older one that was suspended comes back while, or after, a newer one trains.

The older one is a real process, stopped by SIGSTOP at each of the moments when it looks whether it may go on.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path

import psutil
import pytest
import torch

from llama_ray.model.config import LlamaConfig
from llama_ray.pretrained import load_pretrained
from llama_ray.storage import run_directory, store
from llama_ray.storage.attempts import Attempt, Superseded, attempt
from llama_ray.training.checkpointing.catalog import latest_valid_checkpoint
from llama_ray.training.checkpointing.files import local_copy
from llama_ray.training.loop import train
from tests.object_store import s3_server, uri
from tests.processes import fresh_processes
from tests.training.helpers import CPU, EIGHT_STEPS, Recorder, in_processes

CONFIG = replace(EIGHT_STEPS, keep_checkpoints=1)


@dataclass(frozen=True, repr=False)
class Suspended(Attempt):
    """Stops its process at a look, counted from 1: before it looks, or after it has seen no newer attempt."""

    at: int = 1
    seen: bool = False

    def check(self) -> None:
        looks.append(self.number)
        if len(looks) == self.at and not self.seen:
            signal.raise_signal(signal.SIGSTOP)
        super().check()
        if len(looks) == self.at and self.seen:
            signal.raise_signal(signal.SIGSTOP)


looks: list[int] = []


def older(model: LlamaConfig, data: Path, run: str, at: int, seen: bool, result: Connection) -> None:
    """Begin an attempt at `run`, train, and send how that ended."""
    torch.set_num_threads(1)
    with attempt(run) as mine:
        suspended = Suspended(mine.run, mine.number, mine.apart, at=at, seen=seen)
        try:
            train(model, CONFIG, data, device=CPU, observer=Recorder(), output_dir=suspended)
            result.send("finished")
        except Superseded as error:
            result.send(str(error))


def newer(model: LlamaConfig, data: Path, run: str) -> None:
    """Go on with `run` in a newer attempt, from its newest checkpoint, to the end."""
    with attempt(run) as mine:
        checkpoint = latest_valid_checkpoint(run, 60)
        if checkpoint is None:
            train(model, CONFIG, data, device=CPU, observer=Recorder(), output_dir=mine)
        else:
            with local_copy(checkpoint) as local:
                train(
                    model, CONFIG, data, device=CPU, observer=Recorder(), output_dir=mine, resume_from=local
                )


def weights(checkpoint: str) -> dict[str, torch.Tensor]:
    with local_copy(checkpoint) as local:
        return load_pretrained(local)[0].state_dict()


@pytest.fixture(scope="module")
def server() -> Iterator[int]:
    with s3_server() as port:
        yield port


@pytest.fixture(scope="module")
def undisturbed(tiny: LlamaConfig, dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The last checkpoint of a run that nothing happens to."""
    run = str(tmp_path_factory.mktemp("undisturbed"))
    newer(tiny, dataset, run)
    return store.join(run, "step_00000008")


# A checkpoint makes two looks: before its marker, and before it deletes what is older. The run makes two checkpoints.
@pytest.mark.parametrize(
    ("place", "at", "seen"),
    [
        ("path", 1, False), ("path", 1, True), ("path", 2, True), ("path", 3, True), ("path", 4, False),
        ("object store", 1, True), ("object store", 3, False),
    ],
)  # fmt: skip
def test_nothing_of_the_newer_attempt_is_lost(
    tiny: LlamaConfig,
    dataset: Path,
    tmp_path: Path,
    server: int,
    undisturbed: str,
    place: str,
    at: int,
    seen: bool,
) -> None:
    run = str(tmp_path / "run") if place == "path" else uri(server, f"{tmp_path.name}/run")
    ours, theirs = fresh_processes().Pipe(duplex=False)
    process = fresh_processes().Process(
        target=older, args=(tiny, dataset, run, at, seen, theirs), daemon=True
    )
    process.start()
    theirs.close()
    wait_until_suspended(process.pid)
    assert len(run_directory.list_checkpoints(run)) == at // 2

    newer(tiny, dataset, run)
    last = run_directory.list_checkpoints(run)[0]
    # At the last look the older attempt had completed the run, which is kept.
    assert store.name_of(last) == ("step_00000008" if at == 4 else "step_00000008-2")

    psutil.Process(process.pid).resume()
    assert ours.recv().startswith("attempt 1 at run run ends, because attempt 2 on ")
    process.join()

    assert latest_valid_checkpoint(run, 60) == last
    expected = weights(undisturbed)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(last).items())


def wait_until_suspended(pid: int | None) -> None:
    deadline = time.monotonic() + 60
    while (status := psutil.Process(pid).status()) != psutil.STATUS_STOPPED:
        assert status != psutil.STATUS_ZOMBIE
        assert time.monotonic() < deadline
        time.sleep(0.01)


def _superseded_together(model: LlamaConfig, data: Path, run: Path) -> str:
    """Train, with the other workers, until a newer attempt is found, which begins after the first checkpoint."""

    class BeginsAnother(Recorder):
        def checkpointed(self, result: object) -> None:
            with attempt(str(run)):
                pass

    with pytest.raises(Superseded) as ended:
        train(
            model, replace(CONFIG, max_steps=100, batch_size=2), data, device=CPU, observer=BeginsAnother(),
            output_dir=Attempt(str(run), 1),
        )  # fmt: skip
    return str(ended.value)


def test_all_workers_end_together(tiny: LlamaConfig, dataset: Path, tmp_path: Path) -> None:
    said = in_processes(2, _superseded_together, tiny, dataset, tmp_path)
    assert len(set(said)) == 1
    assert said[0].startswith("attempt 1 at run ")
