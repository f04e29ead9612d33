from __future__ import annotations

import bz2
import gzip
import io
import lzma
from collections.abc import Callable

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_ray.data.sources.blocks import BLOCK_BYTES, DamagedError, blocks
from llama_ray.data.sources.formats import Compression

COMPRESS: dict[Compression, Callable[[bytes], bytes]] = {
    Compression.GZIP: gzip.compress,
    Compression.BZ2: bz2.compress,
    Compression.XZ: lzma.compress,
    Compression.ZSTD: zstandard.ZstdCompressor(write_checksum=True).compress,
}
each = pytest.mark.parametrize("compression", COMPRESS)


def content(stored: bytes, compression: Compression) -> tuple[bytes, str]:
    """What is read of a file, and the reason why it ends too early, if it does."""
    read = []
    try:
        for block in blocks(io.BytesIO(stored), compression):
            read.append(block)
    except DamagedError as error:
        return b"".join(read), str(error)
    return b"".join(read), ""


@each
@pytest.mark.parametrize("end", [b"", b"\0" * 3000], ids=["plain", "filled up with zeros"])
def test_streams_one_after_the_other_are_one_file(compression: Compression, end: bytes) -> None:
    parts = [b"hello " * 500_000, b"", b"world"]
    stored = b"".join(map(COMPRESS[compression], parts)) + end
    assert content(stored, compression) == (b"".join(parts), "")


@each
@settings(deadline=None)
@given(st.data())
def test_what_comes_before_a_cut_is_read(compression: Compression, data: st.DataObject) -> None:
    parts = [bytes(range(256)) * 20, b"abc" * 1000]
    streams = list(map(COMPRESS[compression], parts))
    stored = b"".join(streams)
    cut = data.draw(st.integers(0, len(stored)))
    read, reason = content(stored[:cut], compression)
    assert b"".join(parts).startswith(read)
    if cut >= len(streams[0]):
        assert read.startswith(parts[0])
    whole = cut in (0, len(streams[0]), len(stored))
    assert reason == ("" if whole else f"{compression} data that end too early; the file is truncated")


@each
@settings(deadline=None)
@given(st.data())
def test_what_is_read_is_what_was_stored_or_the_damage_is_told(
    compression: Compression, data: st.DataObject
) -> None:
    parts = [b"first" * 3000, bytes(range(256)) * 99]
    stored = bytearray(b"".join(map(COMPRESS[compression], parts)))
    stored[data.draw(st.integers(0, len(stored) - 1))] ^= data.draw(st.integers(1, 255))
    read, reason = content(bytes(stored), compression)
    assert reason.startswith(f"{compression} data that ") or read == b"".join(parts)


@each
def test_other_data_are_damaged(compression: Compression) -> None:
    assert content(b"no such data" * 9, compression)[1].startswith(f"{compression} data that are damaged (")


def test_a_small_file_of_gigabytes_comes_in_blocks() -> None:
    compressor = zstandard.ZstdCompressor().compressobj()
    stored = b"".join(compressor.compress(b"a" * 2**20) for _ in range(300)) + compressor.flush()
    assert len(stored) < 20_000
    sizes = [len(block) for block in blocks(io.BytesIO(stored), Compression.ZSTD)]
    assert sum(sizes) == 300 * 2**20
    assert max(sizes) <= 64 * BLOCK_BYTES
