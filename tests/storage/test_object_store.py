"""Files in an object store: a real S3 server, and Google's without a network."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from pyarrow import fs

from llama_ray.storage import run_directory, store
from tests.object_store import s3_server, uri
from tests.training.helpers import growth, in_processes


@pytest.fixture(scope="module")
def server() -> Iterator[int]:
    with s3_server() as port:
        yield port


def test_a_missing_bucket_is_refused_in_one_line(server: int) -> None:
    missing = uri(server, "x").replace("s3://runs", "s3://none")
    with pytest.raises(store.StorageError, match=r"s3://none/x.* cannot be written .*bucket") as refused:
        run_directory.check_writable(missing)
    assert "\n" not in str(refused.value)


def _upload(source: Path, target: str) -> int:
    return growth(lambda: store.upload(source, target))


def test_an_upload_is_never_in_memory_as_a_whole(server: int, tmp_path: Path) -> None:
    large = tmp_path / "large"
    with large.open("wb") as file:
        for _ in range(12):
            file.write(os.urandom(1 << 24))
    target = uri(server, "large/file")
    [grown] = in_processes(1, _upload, large, target)
    assert store.sha256(target) == store.sha256(str(large))
    assert grown < 150 * 2**20


def test_the_run_that_saved_last_is_found(server: int) -> None:
    for name in ("older", "newer"):
        marker = store.join(uri(server, f"found/{name}/step_00000001"), run_directory.MARKER)
        store.write_text(marker, json.dumps({"files": {}}))
        # S3 gives times of modification in whole seconds.
        time.sleep(1.1)
    assert run_directory.latest_run(uri(server, "found")) == "newer"


def test_a_google_uri_opens_its_own_client() -> None:
    filesystem, path = store.open_storage("gs://bucket/runs")
    assert isinstance(filesystem, fs.GcsFileSystem)
    assert path == "bucket/runs"
    assert not store.is_local("gs://bucket/runs")


def test_an_unreachable_google_bucket_is_refused_in_one_line() -> None:
    unreachable = "gs://anonymous@bucket/runs?scheme=http&endpoint_override=127.0.0.1:1"
    with pytest.raises(store.StorageError, match="cannot be written") as refused:
        run_directory.check_writable(unreachable)
    assert "\n" not in str(refused.value)
