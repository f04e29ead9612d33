"""A token shard, format 2: the token ids of documents, where each document begins, and which tokens are learned.

    header     MAGIC, format version (uint32), bytes a token (uint32)
    tokens     uint16 if the vocabulary allows it, else uint32
    padding    to a multiple of 8 bytes
    starts     uint64, the index of each document's first token
    mask       optional: a bit a token, the first token in the lowest bit; 0 where the loss skips the token
    trailer    number of tokens and of documents (uint64), whether there is a mask (uint32), MAGIC

All numbers are little-endian. Each document is bos, its tokens, eos. What is only known at the end stands at the end,
so that a shard is written in one pass and its checksum is that of the file. It is memory-mapped: nothing is built to
read it.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

import numpy as np
import numpy.typing as npt

from llama_ray.storage.atomic import replacing
from llama_ray.utils.errors import UserError
from llama_ray.utils.mapped_file import MappedFile

MAGIC = b"LLAMARAY"
FORMAT_VERSION = 2
PREPARE_AGAIN = "prepare the data again (--overwrite)"
_HEADER = struct.Struct("<8sII")
_TRAILER = struct.Struct("<QQI8s")
_DTYPES: dict[int, np.dtype[np.unsignedinteger]] = {2: np.dtype("<u2"), 4: np.dtype("<u4")}

Tokens = npt.NDArray[np.integer]
Starts = npt.NDArray[np.integer]
"""Where documents begin; sorted."""


class DatasetError(UserError):
    """A dataset directory that cannot be used."""


@dataclass(frozen=True)
class Shard:
    """A file of tokens of one source: its entry in `dataset.json`.

    `source` is the name of the source, `bytes` the size of the file, `sha256` its checksum in hexadecimal. `masked`
    says whether it has a loss mask, and `trained` counts the tokens that are learned.
    """

    file: str
    source: str
    tokens: int
    documents: int
    trained: int
    masked: bool
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Sections:
    """Where the parts of a shard lie: byte offsets of the tokens, starts, mask and trailer, and the file's size."""

    tokens: int
    starts: int
    mask: int
    trailer: int
    size: int

    @classmethod
    def of(cls, width: int, tokens: int, documents: int, masked: bool) -> Sections:
        """Return those of a shard with so many tokens of `width` bytes, and documents."""
        end_of_tokens = _HEADER.size + tokens * width
        starts = end_of_tokens + -end_of_tokens % 8
        mask = starts + 8 * documents
        trailer = mask + (-(-tokens // 8) if masked else 0)
        return cls(_HEADER.size, starts, mask, trailer, trailer + _TRAILER.size)


def token_bytes(vocab_size: int) -> int:
    """Return the size of a token id on disk in bytes."""
    return 2 if vocab_size <= 2**16 else 4


def dtype_of(width: int) -> np.dtype[np.unsignedinteger]:
    """Return the type of token ids of `width` bytes on disk."""
    return _DTYPES[width]


def shard_name(split: str, index: int) -> str:
    """Return the name of a shard's file, such as `train-00000.bin`."""
    return f"{split}-{index:05d}.bin"


class ShardWriter:
    """Writes the shard `path` while documents are added; `shard` describes it after the block.

    The file gets its name only when it is complete and on disk, so a killed writer leaves no incomplete shard. Where
    nothing was added there is no file, and `shard` stays None.

        with ShardWriter(path, width, source="books") as writer:
            writer.add(tokens, lengths)
        shard = writer.shard
    """

    def __init__(self, path: Path, width: int, *, source: str = "", masks: bool = False) -> None:
        """`width` is the size of a token id in bytes; with `masks`, each call of `add` brings a loss mask."""
        self.shard: Shard | None = None
        self._path, self._dtype, self._source = path, _DTYPES[width], source
        self._mask = _PackedBits() if masks else None
        self._starts: list[npt.NDArray[np.uint64]] = []
        self._tokens = self._documents = self._bytes = 0
        self._digest = hashlib.sha256()
        self._file: BinaryIO | None = None
        self._open = ExitStack()

    def add(
        self, tokens: Tokens, lengths: npt.NDArray[np.integer], mask: npt.NDArray[np.bool_] | None = None
    ) -> None:
        """Append documents of `lengths` tokens, which follow each other in `tokens`; `mask` is as long as `tokens`.

        Raises ValueError for lengths or a mask that do not fit, and for a token id that does not fit in `width` bytes.
        """
        self._check(tokens, lengths, mask)
        if len(tokens) == 0:
            return
        self._write(tokens.astype(self._dtype, copy=False).tobytes())
        self._starts.append((self._tokens + np.cumsum(lengths) - lengths).astype(np.uint64))
        if self._mask is not None and mask is not None:
            self._mask.append(mask)
        self._tokens += len(tokens)
        self._documents += len(lengths)

    def _check(
        self, tokens: Tokens, lengths: npt.NDArray[np.integer], mask: npt.NDArray[np.bool_] | None
    ) -> None:
        if int(lengths.sum()) != len(tokens) or (lengths < 1).any():
            raise ValueError(
                f"lengths add up to {int(lengths.sum())}, the least is {lengths.min(initial=1)}; they must be at "
                f"least 1 and add up to the {len(tokens)} tokens"
            )
        if (mask is None) != (self._mask is None) or (mask is not None and len(mask) != len(tokens)):
            given = "none" if mask is None else f"one of {len(mask)} tokens"
            wanted = "none" if self._mask is None else f"one of {len(tokens)}"
            raise ValueError(f"the loss mask is {given}; it must be {wanted}")
        if len(tokens) and (int(tokens.max()) >> (8 * self._dtype.itemsize) or int(tokens.min()) < 0):
            raise ValueError(
                f"token ids are {tokens.min()} to {tokens.max()}; they must fit in {self._dtype.itemsize} bytes"
            )

    def _write(self, data: bytes) -> None:
        if self._file is None:
            self._file = self._open.enter_context(replacing(self._path))
            self._write(_HEADER.pack(MAGIC, FORMAT_VERSION, self._dtype.itemsize))
        self._file.write(data)
        self._digest.update(data)
        self._bytes += len(data)

    def _finish(self) -> None:
        masked = self._mask is not None
        sections = Sections.of(self._dtype.itemsize, self._tokens, self._documents, masked)
        self._write(bytes(sections.starts - self._bytes))
        for starts in self._starts:
            self._write(starts.astype("<u8").tobytes())
        if self._mask is not None:
            self._write(self._mask.tobytes())
        self._write(_TRAILER.pack(self._tokens, self._documents, masked, MAGIC))
        trained = self._tokens if self._mask is None else self._mask.ones
        name, digest = self._path.name, self._digest.hexdigest()
        self.shard = Shard(
            name, self._source, self._tokens, self._documents, trained, masked, self._bytes, digest
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # An error here, such as a full disk, removes the unfinished file as one in the block does.
        with self._open:
            if kind is None and self._file is not None:
                self._finish()
            elif error is not None:
                raise error


class _PackedBits:
    """Bits that are appended, eight to a byte, the first one lowest."""

    def __init__(self) -> None:
        self.ones = 0
        self._bytes = bytearray()
        # Fewer than eight, which do not fill a byte yet.
        self._rest = np.empty(0, dtype=np.bool_)

    def append(self, bits: npt.NDArray[np.bool_]) -> None:
        self.ones += int(np.count_nonzero(bits))
        bits = np.concatenate([self._rest, bits])
        whole = len(bits) // 8 * 8
        self._bytes += np.packbits(bits[:whole], bitorder="little").tobytes()
        self._rest = bits[whole:]

    def tobytes(self) -> bytes:
        return bytes(self._bytes) + np.packbits(self._rest, bitorder="little").tobytes()


@dataclass(frozen=True)
class Span:
    """Consecutive tokens of a shard: their ids, and where among them documents begin.

    `learned` says for each token whether it is to be learned; None if all are.
    """

    tokens: Tokens
    starts: npt.NDArray[np.int64]
    learned: npt.NDArray[np.bool_] | None = None


@dataclass(frozen=True)
class OpenShard:
    """A shard mapped into memory: its `tokens` and the `starts` of its documents, both read-only.

    The tokens begin at byte `offset` of `file`. `mask_bits` are the bytes of the loss mask, if there is one.
    """

    tokens: Tokens
    starts: Starts
    mask_bits: npt.NDArray[np.uint8] | None
    file: MappedFile
    offset: int

    @property
    def mask(self) -> npt.NDArray[np.bool_] | None:
        """Whether each token is learned, in a byte each; None if all are."""
        return self.span(0, len(self.tokens)).learned

    def span(self, start: int, stop: int) -> Span:
        """Return the tokens from `start` to `stop`."""
        first, last = self.starts.searchsorted(np.array([start, stop], dtype=self.starts.dtype))
        starts = self.starts[first:last].astype(np.int64) - start
        learned = None
        if self.mask_bits is not None:
            learned = unpack(self.mask_bits[start // 8 : -(-stop // 8)], start, stop)
        return Span(self.tokens[start:stop], starts, learned)

    def read_ahead(self, start: int, stop: int) -> None:
        """Have the system read the tokens from `start` to `stop` in the background."""
        width = self.tokens.itemsize
        self.file.will_need(self.offset + start * width, self.offset + stop * width)

    def documents(self) -> Iterator[Tokens]:
        """Yield the tokens of each document."""
        ends = [*self.starts[1:].tolist(), len(self.tokens)]
        for start, end in zip(self.starts.tolist(), ends, strict=True):
            yield self.tokens[start:end]


def unpack(mask: npt.NDArray[np.uint8], start: int, stop: int) -> npt.NDArray[np.bool_]:
    """Return whether the tokens from `start` to `stop` are learned, from the bytes of the mask that hold their bits."""
    bits = np.unpackbits(mask, bitorder="little", count=stop - start // 8 * 8)
    return bits[start % 8 :].astype(np.bool_)


def open_shard(path: Path) -> OpenShard:
    """Map a shard into memory.

    Raises DatasetError for a missing file, a file that is not a shard, another format version, and a file that is
    shorter or longer than its trailer says.
    """
    try:
        with path.open("rb") as file:
            width = _checked_width(path, file.read(_HEADER.size))
            size = path.stat().st_size
            file.seek(max(size - _TRAILER.size, 0))
            tokens, documents, masked = _read_trailer(path, file.read(_TRAILER.size))
        sections = Sections.of(width, tokens, documents, masked)
        if size != sections.size:
            raise DatasetError(
                f"{path} has {size} bytes; {tokens} tokens in {documents} documents need {sections.size}; "
                f"{PREPARE_AGAIN}"
            )
        mapped = MappedFile(path, size)
    except OSError as error:
        raise DatasetError(f"cannot read shard {path} ({error.strerror}); {PREPARE_AGAIN}") from error
    # Each window is looked up in the index, which is small.
    mapped.will_need(sections.starts, sections.mask)
    mask_bytes = sections.trailer - sections.mask
    return OpenShard(
        tokens=mapped.array(_DTYPES[width], tokens, sections.tokens),
        starts=mapped.array(np.dtype("<u8"), documents, sections.starts),
        mask_bits=mapped.array(np.dtype(np.uint8), mask_bytes, sections.mask) if masked else None,
        file=mapped,
        offset=sections.tokens,
    )


def _checked_width(path: Path, header: bytes) -> int:
    if len(header) < _HEADER.size or not header.startswith(MAGIC):
        raise DatasetError(f"{path} is not a token shard; {PREPARE_AGAIN}")
    _, version, width = _HEADER.unpack(header)
    if version != FORMAT_VERSION or width not in _DTYPES:
        raise DatasetError(
            f"{path} has format version {version} with {width}-byte tokens; it must have version "
            f"{FORMAT_VERSION} with 2 or 4 bytes; {PREPARE_AGAIN}"
        )
    return int(width)


def _read_trailer(path: Path, trailer: bytes) -> tuple[int, int, bool]:
    """Return the numbers of tokens and documents, and whether there is a mask."""
    if len(trailer) < _TRAILER.size or not trailer.endswith(MAGIC):
        raise DatasetError(f"{path} is cut off: its end is not that of a shard; {PREPARE_AGAIN}")
    tokens, documents, masked, _ = _TRAILER.unpack(trailer)
    return tokens, documents, bool(masked)
