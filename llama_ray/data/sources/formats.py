"""What a file holds and how it is compressed, by its suffixes: the one table of what can be read."""

from __future__ import annotations

from enum import StrEnum
from pathlib import PurePosixPath
from typing import NamedTuple


class Format(StrEnum):
    """How the texts of a file are laid out."""

    TEXT = "text"
    JSON_LINES = "JSON Lines"
    JSON = "JSON"
    CSV = "CSV"
    TSV = "TSV"
    PARQUET = "parquet"
    ARROW = "Arrow"


class Compression(StrEnum):
    """How the bytes of a file are compressed."""

    NONE = "none"
    GZIP = "gzip"
    ZSTD = "zstd"
    BZ2 = "bz2"
    XZ = "xz"


class Layout(NamedTuple):
    """What the name of a file says: `format` is None where its suffix is of none of them."""

    format: Format | None
    compression: Compression

    @property
    def in_ranges(self) -> bool:
        """Whether a range of bytes of the file can be read without the bytes before it."""
        return self.compression is Compression.NONE and self.format in (Format.TEXT, Format.JSON_LINES, None)


_FORMATS = {
    ".txt": Format.TEXT,
    ".text": Format.TEXT,
    ".md": Format.TEXT,
    ".markdown": Format.TEXT,
    ".rst": Format.TEXT,
    ".py": Format.TEXT,
    ".jsonl": Format.JSON_LINES,
    ".ndjson": Format.JSON_LINES,
    ".json": Format.JSON,
    ".csv": Format.CSV,
    ".tsv": Format.TSV,
    ".parquet": Format.PARQUET,
    ".arrow": Format.ARROW,
    ".feather": Format.ARROW,
}
_COMPRESSIONS = {
    ".gz": Compression.GZIP,
    ".gzip": Compression.GZIP,
    ".zst": Compression.ZSTD,
    ".zstd": Compression.ZSTD,
    ".bz2": Compression.BZ2,
    ".xz": Compression.XZ,
    ".lzma": Compression.XZ,
}
_ARCHIVES = frozenset(
    {".7z", ".br", ".cab", ".jar", ".lz4", ".rar", ".sz", ".tar", ".tbz", ".tbz2", ".tgz", ".txz"}
    | {".tzst", ".whl", ".z", ".zip"}
)


def layout(name: str) -> Layout:
    """Return the format and the compression of a file of this name; case does not matter."""
    path = PurePosixPath(name.lower())
    compression = _COMPRESSIONS.get(path.suffix, Compression.NONE)
    if compression is not Compression.NONE:
        path = path.with_suffix("")
    return Layout(_FORMATS.get(path.suffix), compression)


def is_archive(name: str) -> bool:
    """Whether a file of this name holds several files, or is compressed in a way that is not read."""
    suffixes = PurePosixPath(name.lower()).suffixes
    if suffixes and suffixes[-1] in _COMPRESSIONS:
        suffixes.pop()
        # Parquet and Arrow compress what they hold by themselves, and are not read from the beginning to the end.
        if layout(name).format in (Format.PARQUET, Format.ARROW):
            return True
    return bool(suffixes) and suffixes[-1] in _ARCHIVES
