"""The content of a file as a stream of blocks, decompressed."""

from __future__ import annotations

import bz2
import lzma
import zlib
from collections.abc import Iterator
from typing import Any, Protocol

from llama_ray.data.sources.formats import Compression

BLOCK_BYTES = 1024 * 1024
_FEED_BYTES = 2 * 1024
"""Compressed bytes at a time: what grows most, a repeated byte in zstd, becomes 64 MiB."""

_MAX_WINDOW_BYTES = 256 * 1024 * 1024
"""What xz may take; `xz -9` takes 65 MiB, and zstd has a limit of 128 MiB by itself."""


class DamagedError(Exception):
    """Compressed data that end too early or hold what cannot be: the message is the reason."""


class Stream(Protocol):
    """An opened file."""

    def read(self, size: int, /) -> bytes:
        """Return at most `size` bytes; none at the end."""
        ...


def blocks(stream: Stream, compression: Compression) -> Iterator[bytes]:
    """Yield the decompressed content of a file in blocks of about BLOCK_BYTES, one after the other.

    A file may hold several compressed streams one after the other, as `cat a.gz b.gz` makes them. Raises DamagedError,
    after all that comes before the damage.
    """
    read = iter(lambda: stream.read(BLOCK_BYTES), b"")
    return read if compression is Compression.NONE else _decompressed(read, compression)


def _decompressed(compressed: Iterator[bytes], compression: Compression) -> Iterator[bytes]:
    gathered: list[bytes] = []
    size = 0
    try:
        for content in _Decompression(compression).run(compressed):
            gathered.append(content)
            size += len(content)
            if size >= BLOCK_BYTES:
                yield b"".join(gathered)
                gathered, size = [], 0
    except DamagedError:
        if size:
            yield b"".join(gathered)
        raise
    if size:
        yield b"".join(gathered)


class _Decompression:
    """Decompresses stream after stream, until what follows is none: zeros that fill up a tape, or rubbish."""

    def __init__(self, compression: Compression) -> None:
        self._compression = compression
        self._decoder: Any = None
        self._streams = 0

    def run(self, compressed: Iterator[bytes]) -> Iterator[bytes]:
        """Yield what the blocks hold. Raises DamagedError."""
        for block in compressed:
            for start in range(0, len(block), _FEED_BYTES):
                yield from self._feed(block[start : start + _FEED_BYTES])
        if self._decoder is not None:
            raise DamagedError(f"{self._compression} data that end too early; the file is truncated")

    def _feed(self, content: bytes) -> Iterator[bytes]:
        while content:
            if self._decoder is None:
                if self._streams:
                    # Programs fill up the last block with zeros.
                    content = content.lstrip(b"\0")
                if not content:
                    return
                self._decoder = _decoder(self._compression)
                self._streams += 1
            try:
                yield self._decoder.decompress(content)
            except _errors(self._compression) as error:
                raise DamagedError(f"{self._compression} data that are damaged ({error})") from error
            content = b""
            if self._decoder.eof:
                content, self._decoder = self._decoder.unused_data, None


def _decoder(compression: Compression) -> Any:
    """Return an object with `decompress`, `eof` and `unused_data`."""
    if compression is Compression.GZIP:
        return zlib.decompressobj(wbits=31)
    if compression is Compression.BZ2:
        return bz2.BZ2Decompressor()
    if compression is Compression.XZ:
        return lzma.LZMADecompressor(memlimit=_MAX_WINDOW_BYTES)
    # Imported at its first use, because models train and generate on machines that lack it.
    import zstandard

    return zstandard.ZstdDecompressor().decompressobj()


def _errors(compression: Compression) -> tuple[type[Exception], ...]:
    if compression is Compression.ZSTD:
        import zstandard

        return (zstandard.ZstdError,)
    return (zlib.error, lzma.LZMAError, OSError, EOFError, ValueError, MemoryError)
