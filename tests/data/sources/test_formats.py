from __future__ import annotations

import pytest

from llama_ray.data.sources.formats import Compression, Format, is_archive, layout


@pytest.mark.parametrize(
    ("name", "format", "compression"),
    [
        ("a.txt", Format.TEXT, Compression.NONE),
        ("a.b/README", None, Compression.NONE),
        ("README.gz", None, Compression.GZIP),
        ("sub/A.JSONL.GZ", Format.JSON_LINES, Compression.GZIP),
        ("a.ndjson.zst", Format.JSON_LINES, Compression.ZSTD),
        ("a.json.bz2", Format.JSON, Compression.BZ2),
        ("a.1.csv.xz", Format.CSV, Compression.XZ),
        ("a.tsv", Format.TSV, Compression.NONE),
        ("a.parquet", Format.PARQUET, Compression.NONE),
        ("data-00000-of-00001.arrow", Format.ARROW, Compression.NONE),
        (".gz", None, Compression.NONE),
    ],
)
def test_suffixes_tell_the_layout(name: str, format: Format | None, compression: Compression) -> None:
    assert layout(name) == (format, compression)
    assert not is_archive(name)


@pytest.mark.parametrize(
    "name", ["a.zip", "a.tar", "a.TAR.GZ", "a.tgz", "a.txt.lz4", "a.parquet.gz", "a.arrow.zst"]
)
def test_archives_are_none_of_them(name: str) -> None:
    assert is_archive(name)
