from __future__ import annotations

import threading
from pathlib import Path

import pytest

from llama_ray.data.dataset.batch import Batch
from llama_ray.data.dataset.token_dataset import TokenDataset
from llama_ray.data.mixtures.mixture import Mixture
from tests.data.mixtures.runs import STAGES, WINDOW, Cluster, loaders, take
from tests.token_data import write_documents


def named_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("batches")]


def test_no_thread_is_left_when_a_loader_is_closed(mixture: Mixture) -> None:
    before = named_threads()
    [worker] = loaders(mixture, Cluster(1, 12, 1, prefetch=2), STAGES)
    take([worker])
    assert len(named_threads()) == len(before) + 1
    worker.close()
    assert named_threads() == before


def test_what_was_built_ahead_does_not_count_as_taken(mixture: Mixture) -> None:
    [ahead], [plain] = (loaders(mixture, Cluster(1, 12, 1, prefetch=n), STAGES) for n in (3, 0))
    for _ in range(5):
        assert take([ahead]) == take([plain])
        assert ahead.state_dict() == plain.state_dict()
    ahead.close()


def test_batches_are_built_once_and_before_they_are_asked_for(
    mixture: Mixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    built, enough = [], threading.Event()
    windows = Mixture.windows

    def counted(self: Mixture, *args: object) -> Batch:
        assert threading.current_thread() is not threading.main_thread()
        batch = windows(self, *args)  # type: ignore[arg-type]
        built.append(batch.inputs.tolist())
        if len(built) == 5:
            enough.set()
        return batch

    monkeypatch.setattr(Mixture, "windows", counted)
    [worker] = loaders(mixture, Cluster(1, 12, 1, prefetch=2), [])
    taken = [take([worker]) for _ in range(3)]
    assert enough.wait(10)
    worker.close()
    assert built[:3] == taken
    assert len(built) == 5
    assert all(built.count(batch) == 1 for batch in built)


def test_what_was_built_ahead_of_another_position_is_not_taken(mixture: Mixture) -> None:
    [ahead], [plain] = (loaders(mixture, Cluster(1, 12, 1, prefetch=n), STAGES) for n in (2, 0))
    first = take([plain])
    take([ahead])
    ahead.start_after(1)
    assert [token for row in take([ahead]) for token in row] == [token for row in first for token in row]
    ahead.close()


def test_an_error_in_the_thread_arrives_with_its_batch_and_again(tmp_path: Path) -> None:
    directory = write_documents(tmp_path / "data", {"train": [[list(range(40 * WINDOW))]]})
    dataset = TokenDataset(directory, "train")
    [worker] = loaders(Mixture.of(dataset), Cluster(1, 4, 1, prefetch=2), [])
    (directory / "train-00000.bin").unlink()
    for _ in range(2):
        with pytest.raises(ValueError, match="train-00000"):
            worker.next_global_batch()
    assert worker.position == 0
    worker.close()
