"""A dataset in an object store: the parts that windows need are fetched, and shards that are read often are kept."""

from __future__ import annotations

import hashlib
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO

import numpy as np

from llama_ray.data.dataset.files import Place
from llama_ray.data.dataset.info import INFO_FILE, DatasetInfo, parse_info
from llama_ray.data.dataset.shards import (
    PREPARE_AGAIN,
    DatasetError,
    OpenShard,
    Sections,
    Shard,
    Span,
    Starts,
    Tokens,
    dtype_of,
    open_shard,
    unpack,
)
from llama_ray.storage import store
from llama_ray.storage.atomic import replacing
from llama_ray.storage.file_cache import FileCache
from llama_ray.storage.paths import DATA_CACHE
from llama_ray.storage.remote_directory import RemoteDirectory
from llama_ray.utils.mapped_file import MappedFile

_REQUESTS = 16
"""Parts of files that are fetched at once."""
_CHUNK_BYTES, _CHUNKS_AHEAD = 8 * 2**20, 4
_REQUEST_COST_BYTES = 2**20
"""A request for a few bytes takes about as long as the transfer of so many."""
_INDICES_IN_MEMORY = 64


class RemoteFiles:
    """A dataset at a URI; see `DatasetFiles`.

    A span of a shard that is not on this machine is fetched by itself. Once the spans of a shard have cost as much as
    the whole shard would, it is copied in the background into a cache that all processes of the machine share, if that
    has room: so no order of reading costs more than twice the best.
    """

    def __init__(self, location: str, cache_bytes: int, cache: Path | None = None) -> None:
        """Read `dataset.json`; `cache` is by default DATA_CACHE, of which shards take `cache_bytes` at most.

        Raises DatasetError or StorageError for a location that cannot be read or holds no dataset.
        """
        self.location = location
        self._directory = RemoteDirectory(location)
        if INFO_FILE not in self._directory.sizes:
            raise DatasetError(
                f"{location} is not a prepared dataset (no {INFO_FILE}); run jobs/prepare_data.py and copy its output "
                "there"
            )
        content = self._directory.read(INFO_FILE, 0, self._directory.sizes[INFO_FILE])
        self.info: DatasetInfo = parse_info(content, store.join(location, INFO_FILE))
        root = (cache or DATA_CACHE).expanduser()
        try:
            self._cache = FileCache(root, self.info.content_fingerprint[:32], cache_bytes)
        except OSError as error:
            raise DatasetError(
                f"{location} needs a cache at {root}, which cannot be written ({error.strerror}); give its user a home "
                "directory that can, or copy the data to storage that all nodes mount"
            ) from error
        self._mapped: dict[str, OpenShard] = {}
        self._requests = ThreadPoolExecutor(_REQUESTS, "data-request")
        self._copying = ThreadPoolExecutor(1, "data-copy")
        # What the spans of each shard have cost so far, in bytes; from the cost of the whole on it is copied.
        self._cost: dict[str, int] = {}
        self._cost_lock = threading.Lock()
        self._starts_in_memory = lru_cache(_INDICES_IN_MEMORY)(self._read_starts)
        # Indices that the cache did not take; asking takes a look at all of its files.
        self._starts_refused: set[str] = set()
        self._failure: Exception | None = None

    def tokenizer_directory(self) -> Path:
        """See `DatasetFiles`; the files are fetched now."""
        directory = self._cache.directory / "tokenizer"
        directory.mkdir(exist_ok=True)
        for name, file in self.info.files.items():
            path = directory / name
            if not name.endswith((".json", ".jinja")) or (path.is_file() and _sha256(path) == file.sha256):
                continue
            content = self._directory.read(name, 0, self._expect_size(name, file.bytes))
            self._check_sum(name, hashlib.sha256(content).hexdigest(), file.sha256)
            with replacing(path) as stream:
                stream.write(content)
        return directory

    def check(self, split: str) -> None:
        """See `DatasetFiles`."""
        for shard in self.info.splits[split]:
            self._expect_size(shard.file, shard.bytes)

    def read(self, split: str, places: Sequence[Place]) -> list[Span]:
        """See `DatasetFiles`."""
        if self._failure is not None:
            raise self._failure
        shards = [self.info.splits[split][place.shard] for place in places]
        # All requests are on their way before the first answer is waited for.
        pending = [self._begin(shard, place) for shard, place in zip(shards, places, strict=True)]
        return [finish() for finish in pending]

    def starts(self, split: str, shard: int) -> Starts:
        """See `DatasetFiles`."""
        entry = self.info.splits[split][shard]
        mapped = self._copy_of(entry)
        return self._starts(entry) if mapped is None else mapped.starts

    def size(self, name: str) -> int | None:
        """See `DatasetFiles`."""
        return self._directory.sizes.get(name)

    def read_file(self, name: str, start: int, stop: int) -> bytes:
        """See `DatasetFiles`."""
        return self._directory.read(name, start, stop)

    def close(self) -> None:
        """Wait for copies under way, and end the threads."""
        self._copying.shutdown()
        self._requests.shutdown()

    def _begin(self, shard: Shard, place: Place) -> Callable[[], Span]:
        """Begin to read a span, and return what waits for it."""
        start, stop = place.start, place.stop
        if (mapped := self._copy_of(shard)) is not None:
            mapped.read_ahead(start, stop)
            return lambda: mapped.span(start, stop)
        width, sections = self.info.token_bytes, _sections(shard, self.info.token_bytes)
        tokens = self._request(shard, sections.tokens + start * width, sections.tokens + stop * width)
        starts = self._requests.submit(self._starts, shard)
        mask: Future[bytes] | None = None
        if shard.masked:
            mask = self._request(shard, sections.mask + start // 8, sections.mask + -(-stop // 8))
        self._count_cost(shard, (stop - start) * width)

        def finish() -> Span:
            borders = starts.result()
            low, high = borders.searchsorted(np.array([start, stop], dtype=borders.dtype))
            return Span(
                _tokens(tokens.result(), width),
                borders[low:high].astype(np.int64) - start,
                None if mask is None else unpack(np.frombuffer(mask.result(), np.uint8), start, stop),
            )

        return finish

    def _request(self, shard: Shard, start: int, stop: int) -> Future[bytes]:
        return self._requests.submit(self._directory.read, shard.file, start, stop)

    def _copy_of(self, shard: Shard) -> OpenShard | None:
        """Return the shard from the cache; None if it is not there."""
        mapped = self._mapped.get(shard.file)
        if mapped is None and (path := self._cache.find(shard.file, shard.bytes)) is not None:
            mapped = self._mapped[shard.file] = open_shard(path)
        return mapped

    def _starts(self, shard: Shard) -> Starts:
        """Return where the documents of a shard begin, from the cache or, where that has no room, from memory."""
        name, size = f"{shard.file}.starts", 8 * shard.documents

        def write(file: BinaryIO) -> None:
            file.write(self._read_starts(shard).tobytes())

        path = self._cache.find(name, size)
        if path is None and name not in self._starts_refused:
            path = self._cache.fill(name, size, write)
        if path is None:
            self._starts_refused.add(name)
            return self._starts_in_memory(shard)
        starts: Starts = MappedFile(path, size).array(np.dtype("<u8"), shard.documents, 0)
        return starts

    def _read_starts(self, shard: Shard) -> Starts:
        sections = _sections(shard, self.info.token_bytes)
        content = self._directory.read(shard.file, sections.starts, sections.starts + 8 * shard.documents)
        starts = np.frombuffer(content, np.dtype("<u8"))
        if starts[0] != 0 or (starts[1:] <= starts[:-1]).any():
            raise DatasetError(
                f"the document index of {store.join(self.location, shard.file)} is damaged; {PREPARE_AGAIN}"
            )
        return starts

    def _count_cost(self, shard: Shard, size: int) -> None:
        with self._cost_lock:
            before = self._cost.get(shard.file, 0)
            after = self._cost[shard.file] = before + size + _REQUEST_COST_BYTES
        if before < shard.bytes <= after:
            self._copying.submit(self._copy, shard)

    def _copy(self, shard: Shard) -> None:
        """Copy a shard into the cache, in a thread of its own."""

        def write(file: BinaryIO) -> None:
            digest = hashlib.sha256()

            def append(content: bytes) -> None:
                digest.update(content)
                file.write(content)

            pending: deque[Future[bytes]] = deque()
            for start in range(0, shard.bytes, _CHUNK_BYTES):
                # Once the interpreter ends, it takes no more requests, which ends the copy.
                pending.append(self._request(shard, start, min(start + _CHUNK_BYTES, shard.bytes)))
                if len(pending) == _CHUNKS_AHEAD:
                    append(pending.popleft().result())
            while pending:
                append(pending.popleft().result())
            self._check_sum(shard.file, digest.hexdigest(), shard.sha256)

        try:
            if self._cache.fill(shard.file, shard.bytes, write) is None:
                # No room yet, or another process copies it and may die: ask again after the same cost.
                self._cost[shard.file] = 0
        except ValueError as error:
            # The next call of `read` raises it.
            self._failure = error

    def _expect_size(self, name: str, expected: int) -> int:
        """Return the size of a file. Raises DatasetError if it is missing or not of the `expected` size."""
        found = self._directory.sizes.get(name)
        if found != expected:
            state = "is missing" if found is None else f"has {found} bytes; dataset.json says {expected}"
            raise DatasetError(f"{store.join(self.location, name)} {state}; copy the dataset again")
        return expected

    def _check_sum(self, name: str, found: str, expected: str) -> None:
        if found != expected:
            raise DatasetError(
                f"{store.join(self.location, name)} does not have the checksum that {INFO_FILE} names; copy the "
                "dataset again"
            )


def _sections(shard: Shard, width: int) -> Sections:
    return Sections.of(width, shard.tokens, shard.documents, shard.masked)


def _tokens(content: bytes, width: int) -> Tokens:
    return np.frombuffer(content, dtype_of(width))


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
