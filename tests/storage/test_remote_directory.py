"""Files in an object store that are read in parts: what ends the reading, in which words."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import closing

import pytest

from llama_ray.storage import store
from llama_ray.storage.remote_directory import RemoteDirectory
from tests.object_store import StallingProxy, s3_server, uri


@pytest.fixture(scope="module")
def server() -> Iterator[int]:
    with s3_server() as port:
        yield port


def directory(server: int, **files: str) -> str:
    location = uri(server, "data")
    for name, text in files.items():
        store.write_text(store.join(location, name), text)
    return location


def test_parts_are_read_and_sizes_known(server: int) -> None:
    files = RemoteDirectory(directory(server, a="0123456789", b="xyz"))
    assert (files.sizes["a"], files.sizes["b"]) == (10, 3)
    assert files.read("a", 3, 7) == b"3456"


def test_a_missing_directory_holds_nothing(server: int) -> None:
    assert RemoteDirectory(uri(server, "nowhere")).sizes == {}


def test_a_missing_bucket_or_file_is_one_line(server: int) -> None:
    location = directory(server, a="0123456789")
    with pytest.raises(
        store.StorageError, match=r"^the bucket of s3://none/data.* does not exist; correct the URI$"
    ):
        RemoteDirectory(location.replace("s3://runs", "s3://none"))
    with pytest.raises(store.StorageError, match=r"data/c\?.* does not exist; put it back"):
        RemoteDirectory(location).read("c", 0, 1)


@pytest.mark.parametrize("text", [None, "other and longer", "short"], ids=["deleted", "longer", "shorter"])
def test_a_file_that_changes_while_it_is_read_is_one_line(server: int, text: str | None) -> None:
    location = directory(server, a="0123456789" * 100)
    files = RemoteDirectory(location)
    files.read("a", 0, 10)
    store.delete(store.join(location, "a"))
    if text is not None:
        store.write_text(store.join(location, "a"), text)
    message = "does not exist any more" if text is None else "has changed since it was read first"
    with pytest.raises(store.StorageError, match=rf"data/a\?.* {message}; ") as refused:
        files.read("a", 500, 510)
    assert "\n" not in str(refused.value)


def test_an_outage_is_waited_for_and_said(server: int, caplog: pytest.LogCaptureFixture) -> None:
    directory(server, a="0123456789")
    with closing(StallingProxy(server)) as proxy:
        files = RemoteDirectory(uri(proxy.port, "data").replace("s3://", "s3://key:hidden@"))
        proxy.break_off()

        def ends(record: logging.LogRecord) -> bool:
            proxy.restore()
            return True

        # The first attempt has failed for good after six seconds of pyarrow's own.
        caplog.handler.addFilter(ends)
        assert files.read("a", 3, 7) == b"3456"
    [line] = caplog.messages
    assert "NETWORK_CONNECTION" in line
    assert line.startswith("s3://***@runs/data/a?")
    assert line.endswith("; trying again")


def test_missing_access_is_one_line() -> None:
    with s3_server(check_keys=True) as port, pytest.raises(store.StorageError) as refused:
        RemoteDirectory(uri(port, "data").replace("s3://", "s3://key:secret@"))
    # With an OSError as its cause, a run would take it for an outage and start again.
    assert refused.value.__cause__ is None
    assert "s3://***@runs/data" in str(refused.value)
    assert "may not be read" in str(refused.value)
    assert "\n" not in str(refused.value)
