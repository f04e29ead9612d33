r"""Datasets that Megatron's `preprocess_data.py` wrote: pairs of `NAME.bin` (token ids) and `NAME.idx` (their index).

The index (`megatron/core/datasets/indexed_dataset.py`, little-endian):

    b"MMIDIDX\0\0", version 1 (uint64), type of the ids (uint8), number of sequences, of document borders (uint64)
    lengths of the sequences in tokens (int32), where they begin in the .bin file in bytes (int64)
    borders: the number of the first sequence of each document, and last that of all sequences (int64)
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from llama_ray.data.dataset.files import MountedFiles, Place, read_spans
from llama_ray.data.dataset.info import INFO_FILE, DatasetInfo, SourceInfo, TokenizerInfo
from llama_ray.data.dataset.shards import DatasetError, OpenShard, Shard, Span, Starts
from llama_ray.data.tokenizing.tokenizer import Tokenizer
from llama_ray.utils.integers import ceil_div
from llama_ray.utils.mapped_file import MappedFile

VALIDATION_SHARE = 100
"""Where no pair is for validation, one of so many documents is: the last ones of each pair."""

_MAGIC = b"MMIDIDX\0\0"
_HEADER = struct.Struct("<9sQBQQ")
# Of the types that Megatron knows, those that it chooses for token ids.
_DTYPES: dict[int, np.dtype[np.integer]] = {4: np.dtype("<i4"), 8: np.dtype("<u2")}
# At most so many windows of so many bytes tell the content of a file: 64 MiB.
_WINDOWS, _WINDOW_BYTES = 4096, 1 << 14


def find_pairs(location: str) -> list[Path]:
    """Return the pairs at `location`, as paths without suffix; none if there are none.

    It is the path of a pair, with or without suffix, or a directory that holds pairs and no `dataset.json`.
    """
    path = Path(location)
    if path.is_dir():
        if (path / INFO_FILE).exists():
            return []
        return sorted(
            index.with_suffix("") for index in path.glob("*.idx") if index.with_suffix(".bin").is_file()
        )
    if path.suffix in (".bin", ".idx"):
        path = path.with_suffix("")
    # Not with_suffix: the name may hold a dot.
    return [path] if path.with_name(f"{path.name}.idx").is_file() else []


class MegatronFiles(MountedFiles):
    """Pairs of Megatron, with a tokenizer beside them; see `DatasetFiles`.

    Pairs whose names contain `valid` are for validation. Without one, the last documents of each pair are: one in
    VALIDATION_SHARE, and at least one. There are no checksums, so the fingerprint is that of the indices and of windows
    of the token ids.
    """

    def __init__(self, location: str, pairs: Sequence[Path]) -> None:
        """Raise DatasetError for pairs that cannot be read, TokenizerError if there is no tokenizer."""
        super().__init__(pairs[0].parent)
        self.location = location
        tokenizer = Tokenizer.load(self._directory)
        opened = {pair.name: _open(pair) for pair in pairs}
        widths = {shard.tokens.itemsize for shard in opened.values()}
        self._shards = _divide(opened)
        self.info = DatasetInfo(
            fingerprint=_fingerprint(pairs),
            seed=0,
            token_bytes=max(widths),
            tokenizer=TokenizerInfo(
                tokenizer.fingerprint,
                tokenizer.vocab_size,
                eos_id=tokenizer.eos_id,
                origin=str(self._directory),
            ),
            sources=tuple(SourceInfo(pair.name, str(pair)) for pair in pairs),
            splits={
                split: tuple(_entry(name, shard) for name, shard in parts)
                for split, parts in self._shards.items()
            },
        )

    def check(self, split: str) -> None:
        """See `DatasetFiles`; all was checked when the files were opened."""

    def read(self, split: str, places: Sequence[Place]) -> list[Span]:
        """See `DatasetFiles`."""
        return read_spans([self._shards[split][place.shard][1] for place in places], places)

    def starts(self, split: str, shard: int) -> Starts:
        """See `DatasetFiles`."""
        return self._shards[split][shard][1].starts


def _open(pair: Path) -> OpenShard:
    """Map a pair into memory; it becomes one shard."""
    index, content = pair.with_name(f"{pair.name}.idx"), pair.with_name(f"{pair.name}.bin")
    try:
        with index.open("rb") as file:
            header = file.read(_HEADER.size)
        dtype, sequences, borders = _read_header(index, header)
        lengths_at = _HEADER.size
        pointers_at, borders_at = lengths_at + 4 * sequences, lengths_at + 12 * sequences
        size = borders_at + 8 * borders
        if index.stat().st_size < size:
            raise DatasetError(
                f"{index} has {index.stat().st_size} bytes; its header says {size}; copy it again"
            )
        mapped = MappedFile(index, size)
        lengths = mapped.array(np.dtype("<i4"), sequences, lengths_at)
        pointers = mapped.array(np.dtype("<i8"), sequences, pointers_at)
        first_sequences = mapped.array(np.dtype("<i8"), borders, borders_at)
        ends = np.cumsum(lengths, dtype=np.int64)
        in_order = (np.diff(first_sequences, prepend=0, append=sequences) >= 0).all()
        whole = first_sequences[0] == 0 and first_sequences[-1] == sequences and in_order
        if (lengths < 0).any() or (pointers != (ends - lengths) * dtype.itemsize).any() or not whole:
            raise DatasetError(f"{index} is damaged: its sequences do not follow each other; copy it again")
        tokens = int(ends[-1])
        if content.stat().st_size != tokens * dtype.itemsize:
            raise DatasetError(
                f"{content} has {content.stat().st_size} bytes; {index.name} says {tokens * dtype.itemsize}; copy both "
                "again"
            )
        data = MappedFile(content, tokens * dtype.itemsize)
    except OSError as error:
        raise DatasetError(f"cannot read {pair}.bin and .idx ({error.strerror}); copy both again") from error
    # An empty document has no tokens that begin.
    starts = np.unique(np.append(ends - lengths, tokens)[first_sequences[:-1]])
    return OpenShard(data.array(dtype, tokens, 0), starts[starts < tokens], None, data, 0)


def _read_header(index: Path, header: bytes) -> tuple[np.dtype[np.integer], int, int]:
    """Return the type of the token ids, and the numbers of sequences and of borders."""
    if len(header) < _HEADER.size or not header.startswith(_MAGIC):
        raise DatasetError(
            f"{index} is not an index of Megatron; give --data the path of NAME.bin and NAME.idx"
        )
    _, version, code, sequences, borders = _HEADER.unpack(header)
    if version != 1 or code not in _DTYPES or sequences == 0 or borders == 0:
        raise DatasetError(
            f"{index} has version {version}, ids of type {code} and {sequences} sequences; it must have version 1, "
            "type 4 (int32) or 8 (uint16), and sequences; write it again with Megatron's preprocess_data.py"
        )
    return _DTYPES[code], sequences, borders


Parts = list[tuple[str, OpenShard]]


def _divide(opened: dict[str, OpenShard]) -> dict[str, Parts]:
    """Return the shards of each split, with the names of their pairs."""
    validation = [(name, shard) for name, shard in opened.items() if "valid" in name.lower()]
    train = [(name, shard) for name, shard in opened.items() if "valid" not in name.lower()]
    if validation:
        return {"train": train, "validation": validation}
    parts: dict[str, Parts] = {"train": [], "validation": []}
    for name, shard in train:
        cut = len(shard.starts) - ceil_div(len(shard.starts), VALIDATION_SHARE)
        border = int(shard.starts[cut])
        if border:
            parts["train"].append((name, _part(shard, 0, border)))
        parts["validation"].append((name, _part(shard, border, len(shard.tokens))))
    return parts


def _part(shard: OpenShard, start: int, stop: int) -> OpenShard:
    """Return the documents of `shard` between two borders as a shard."""
    first, last = np.searchsorted(shard.starts, [start, stop])
    offset = start * shard.tokens.itemsize
    return OpenShard(shard.tokens[start:stop], shard.starts[first:last] - start, None, shard.file, offset)


def _entry(name: str, shard: OpenShard) -> Shard:
    tokens = len(shard.tokens)
    return Shard(
        file=f"{name}.bin",
        source=name,
        tokens=tokens,
        documents=len(shard.starts),
        trained=tokens,
        masked=False,
        bytes=shard.file.size,
        sha256="",
    )


def _fingerprint(pairs: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for pair in pairs:
        for path in (pair.with_name(f"{pair.name}.idx"), pair.with_name(f"{pair.name}.bin")):
            size = path.stat().st_size
            digest.update(f"{path.name} {size}\n".encode())
            with path.open("rb") as file:
                for start in range(0, size, max(_WINDOW_BYTES, size // _WINDOWS)):
                    file.seek(start)
                    digest.update(file.read(_WINDOW_BYTES))
    return digest.hexdigest()
