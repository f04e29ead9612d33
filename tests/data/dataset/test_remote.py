"""Datasets in an object store give what the directory gives, with any cache."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from llama_ray.data.dataset.batch import Batch
from llama_ray.data.dataset.files import LocalFiles
from llama_ray.data.dataset.info import read_info
from llama_ray.data.dataset.remote import RemoteFiles
from llama_ray.data.dataset.shards import DatasetError
from llama_ray.data.dataset.token_dataset import TokenDataset
from llama_ray.data.dataset.verify import verify
from llama_ray.data.tokenizing.tokenizer import Tokenizer
from llama_ray.storage import store
from tests.object_store import s3_server, uri
from tests.token_data import write_dataset, write_documents

PARTS = [[range(100, 130), range(5), range(60)], [range(7)], [range(200, 299)]]
LEARNED = [[token % 3 > 0 for document in part for token in document] for part in PARTS]
LARGE = 2**30


@pytest.fixture(scope="module")
def server() -> Iterator[int]:
    with s3_server() as port:
        yield port


@pytest.fixture
def local(tmp_path: Path) -> Path:
    splits = {"train": PARTS, "validation": [[range(50)]]}
    return write_documents(tmp_path / "data", splits, learned={"train": LEARNED})


@pytest.fixture
def remote(local: Path, server: int) -> str:
    return copy(local, uri(server, "sets/data"))


def copy(directory: Path, location: str) -> str:
    store.make_directory(location)
    for path in directory.iterdir():
        store.upload(path, store.join(location, path.name))
    return location


def all_windows(files: LocalFiles | RemoteFiles) -> Batch:
    dataset = TokenDataset(files, "train")
    return dataset.windows(np.arange(dataset.num_windows(8))[::-1], 8)


def assert_equal(one: Batch, other: Batch) -> None:
    assert torch.equal(one.inputs, other.inputs)
    assert torch.equal(one.targets, other.targets)
    assert one.starts is not None
    assert other.starts is not None
    assert torch.equal(one.starts, other.starts)


@pytest.mark.parametrize("cache_bytes", [0, 600, LARGE], ids=["no cache", "room for a part", "room for all"])
def test_windows_are_those_of_the_directory(
    local: Path, remote: str, tmp_path: Path, cache_bytes: int
) -> None:
    expected = all_windows(LocalFiles(local))
    files = RemoteFiles(remote, cache_bytes, tmp_path / "cache")
    for _ in range(3):
        assert_equal(all_windows(files), expected)
    files.close()
    assert_equal(all_windows(RemoteFiles(remote, cache_bytes, tmp_path / "cache")), expected)
    assert sum(path.stat().st_size for path in (tmp_path / "cache").glob("*/*")) <= cache_bytes
    assert files.info.content_fingerprint == read_info(local).content_fingerprint


def test_shards_that_are_read_often_are_read_from_this_machine_then(
    local: Path, remote: str, tmp_path: Path
) -> None:
    first = RemoteFiles(remote, LARGE, tmp_path / "cache")
    all_windows(first)
    first.close()
    second = RemoteFiles(remote, LARGE, tmp_path / "cache")
    for shard in second.info.splits["train"]:
        store.delete(store.join(remote, shard.file))
    assert_equal(all_windows(second), all_windows(LocalFiles(local)))


def test_reading_goes_on_when_somebody_removes_the_cache(
    local: Path, remote: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    files, expected = RemoteFiles(remote, LARGE, tmp_path / "cache"), all_windows(LocalFiles(local))
    shutil.rmtree(tmp_path / "cache")
    assert_equal(all_windows(files), expected)
    assert "train-00001.bin.starts.partial cannot be written" in caplog.text
    caplog.clear()
    assert_equal(all_windows(files), expected)
    files.close()
    # It is not asked again, which would take long for each window where a large cache is full.
    assert ".starts" not in caplog.text


def test_threads_may_share_it(local: Path, remote: str, tmp_path: Path) -> None:
    expected = all_windows(LocalFiles(local))
    files = RemoteFiles(remote, LARGE, tmp_path / "cache")
    with ThreadPoolExecutor(8) as threads:
        for batch in threads.map(lambda _: all_windows(files), range(16)):
            assert_equal(batch, expected)


def test_a_shard_that_vanishes_ends_the_run_in_one_line(remote: str, tmp_path: Path) -> None:
    files = RemoteFiles(remote, 0, tmp_path / "cache")
    all_windows(files)
    store.delete(store.join(remote, "train-00002.bin"))
    with pytest.raises(store.StorageError, match=r"train-00002.bin\?.* does not exist any more; ") as ended:
        all_windows(files)
    assert "\n" not in str(ended.value)


def test_a_copy_with_another_checksum_ends_the_run(local: Path, remote: str, tmp_path: Path) -> None:
    shard = bytearray((local / "train-00000.bin").read_bytes())
    shard[20] ^= 1
    (tmp_path / "damaged").write_bytes(shard)
    store.upload(tmp_path / "damaged", store.join(remote, "train-00000.bin"))
    files = RemoteFiles(remote, LARGE, tmp_path / "cache")
    all_windows(files)
    files.close()
    with pytest.raises(DatasetError, match=r"train-00000.bin\?.* does not have the checksum"):
        all_windows(files)
    assert not list((tmp_path / "cache").glob("*/train-00000.bin*[!s]"))


def test_what_is_missing_or_incomplete_is_refused_at_once(
    local: Path, remote: str, tmp_path: Path, server: int
) -> None:
    with pytest.raises(DatasetError, match=r"sets/none\?.* is not a prepared dataset \(no dataset.json\)"):
        RemoteFiles(uri(server, "sets/none"), 0, tmp_path / "cache")
    store.write_text(store.join(remote, "train-00001.bin"), "cut off")
    with pytest.raises(DatasetError, match=r"train-00001.bin\?.* has 7 bytes; dataset.json says"):
        TokenDataset(RemoteFiles(remote, 0, tmp_path / "cache"), "train")
    store.delete(store.join(remote, "train-00001.bin"))
    with pytest.raises(DatasetError, match=r"train-00001.bin\?.* is missing"):
        TokenDataset(RemoteFiles(remote, 0, tmp_path / "cache"), "train")


def test_the_tokenizer_comes_along(tmp_path: Path, server: int) -> None:
    local = write_dataset(tmp_path / "texts")
    files = RemoteFiles(copy(local, uri(server, "sets/texts")), 0, tmp_path / "cache")
    for _ in range(2):
        fetched = Tokenizer.load(files.tokenizer_directory())
        assert fetched.files() == Tokenizer.load(local).files()


def test_what_was_changed_there_is_named(local: Path, remote: str, tmp_path: Path) -> None:
    files = RemoteFiles(remote, 0, tmp_path / "cache")
    assert list(verify(files)) == []
    store.delete(store.join(remote, "train-00001.bin"))
    store.upload(local / "train-00000.bin", store.join(remote, "validation-00000.bin"))
    [missing, other] = verify(RemoteFiles(remote, 0, tmp_path / "cache"))
    assert missing == "train-00001.bin is missing"
    assert other.startswith("validation-00000.bin has ")
