from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest

from llama_ray.data.dataset.shards import DatasetError, ShardWriter, open_shard, token_bytes
from tests.token_data import write_shard

LENGTHS = np.array([3])


@pytest.mark.parametrize(("vocab_size", "width"), [(300, 2), (65536, 2), (65537, 4), (128256, 4)])
def test_a_shard_gives_back_what_was_added(tmp_path: Path, vocab_size: int, width: int) -> None:
    assert token_bytes(vocab_size) == width
    path = tmp_path / "train-00000.bin"
    mask = np.arange(11) % 3 > 0
    with ShardWriter(path, width, source="books", masks=True) as writer:
        writer.add(np.array([0, 1, vocab_size - 1, 7, 8]), np.array([3, 2]), mask[:5])
        writer.add(np.array([], dtype=np.int64), np.array([], dtype=np.int64), mask[:0])
        writer.add(np.arange(6), np.array([6]), mask[5:])
    shard = open_shard(path)
    assert shard.tokens.tolist() == [0, 1, vocab_size - 1, 7, 8, *range(6)]
    assert shard.starts.tolist() == [0, 3, 5]
    assert shard.mask is not None
    assert shard.mask.tolist() == mask.tolist()
    found = writer.shard
    assert found is not None
    assert (found.file, found.source, found.tokens, found.documents) == (path.name, "books", 11, 3)
    assert (found.trained, found.masked, found.bytes) == (int(mask.sum()), True, path.stat().st_size)
    assert found.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(("start", "stop"), [(0, 40), (3, 4), (8, 16), (7, 33), (39, 40), (5, 5)])
def test_a_part_of_the_mask_is_that_part(tmp_path: Path, start: int, stop: int) -> None:
    learned = [number % 5 < 2 for number in range(40)]
    write_shard(tmp_path / "a.bin", [range(40)], learned=learned)
    part = open_shard(tmp_path / "a.bin").span(start, stop).learned
    assert part is not None
    assert part.tolist() == learned[start:stop]


def test_without_masks_every_token_is_learned(tmp_path: Path) -> None:
    shard = write_shard(tmp_path / "a.bin", [range(9)])
    assert shard is not None
    assert (shard.trained, shard.masked, open_shard(tmp_path / "a.bin").mask) == (9, False, None)


def test_the_documents_of_a_shard_are_those_that_were_added(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.bin", [[1, 2], [3], [4, 5, 6]])
    assert [each.tolist() for each in open_shard(tmp_path / "a.bin").documents()] == [[1, 2], [3], [4, 5, 6]]


def test_where_nothing_is_added_there_is_no_file(tmp_path: Path) -> None:
    assert write_shard(tmp_path / "a.bin", []) is None
    assert list(tmp_path.iterdir()) == []


def test_a_failed_writer_leaves_the_old_shard_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    write_shard(path, [range(3)])

    def fail(writer: ShardWriter) -> None:
        with writer:
            writer.add(np.arange(5), np.array([5]))
            raise OSError("disk on fire")

    with pytest.raises(OSError, match="disk on fire"):
        fail(writer := ShardWriter(path, 2))
    assert writer.shard is None
    assert open_shard(path).tokens.tolist() == [0, 1, 2]
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("tokens", "lengths", "mask", "message"),
    [
        (np.arange(3), np.array([2]), None, "lengths add up to 2"),
        (np.arange(3), np.array([3, 0]), None, "the least is 0"),
        (np.arange(3), LENGTHS, np.ones(3, np.bool_), "one of 3 tokens; it must be none"),
        (np.array([1, 2, 65536]), LENGTHS, None, "1 to 65536; they must fit in 2 bytes"),
        (np.array([1, 2, -1]), LENGTHS, None, "-1 to 2"),
    ],
)
def test_what_does_not_fit_together_is_refused(
    tmp_path: Path, tokens: np.ndarray, lengths: np.ndarray, mask: np.ndarray | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message), ShardWriter(tmp_path / "a.bin", 2) as writer:
        writer.add(tokens, lengths, mask)
    with (
        pytest.raises(ValueError, match="must be one of 3"),
        ShardWriter(tmp_path / "a.bin", 2, masks=True) as writer,
    ):
        writer.add(np.arange(3), LENGTHS)


def test_mapped_tokens_are_read_only(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.bin", [range(3)])
    with pytest.raises(ValueError, match="read-only"):
        open_shard(tmp_path / "a.bin").tokens[0] = 1


def test_damaged_shards_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    with pytest.raises(DatasetError, match="cannot read shard"):
        open_shard(path)
    write_shard(path, [range(100)])
    whole = path.read_bytes()
    for content, message in (
        (whole[:-1], "is cut off"),
        (whole[:100], "is cut off"),
        (whole[:16] + whole[24:], "has 244 bytes; 100 tokens in 1 documents need 252"),
        (b"NOTASHARD" + whole[9:], "is not a token shard"),
        (whole[:10], "is not a token shard"),
        (b"", "is not a token shard"),
        (whole[:8] + b"\x01" + whole[9:], "format version 1 .* it must have version 2"),
        (whole[:12] + b"\x03" + whole[13:], "3-byte tokens"),
    ):
        path.write_bytes(content)
        with pytest.raises(DatasetError, match=message):
            open_shard(path)
