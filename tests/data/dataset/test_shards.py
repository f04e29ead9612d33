from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from llama_ray.data.dataset.shards import (
    INFO_FILE,
    DatasetError,
    open_shard,
    read_info,
    token_bytes,
    write_shard,
)

MakeDataset = Callable[..., Path]


@pytest.mark.parametrize(("vocab_size", "width"), [(300, 2), (65536, 2), (65537, 4), (128256, 4)])
def test_a_shard_gives_back_the_tokens_that_were_written(tmp_path: Path, vocab_size: int, width: int) -> None:
    tokens = np.array([0, 1, vocab_size - 1, 7], dtype=np.int64)
    path = tmp_path / "train-00000.bin"
    assert token_bytes(vocab_size) == width
    assert write_shard(path, [tokens[:1], tokens[1:]], width) == 4
    assert path.stat().st_size == 24 + 4 * width
    assert open_shard(path).tolist() == tokens.tolist()
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_a_shard_may_be_empty(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.bin", [], 2)
    assert len(open_shard(tmp_path / "a.bin")) == 0


def test_a_failed_writer_leaves_the_old_shard_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    write_shard(path, [np.arange(3)], 2)

    def broken() -> object:
        yield np.arange(5)
        raise OSError("disk on fire")

    with pytest.raises(OSError, match="disk on fire"):
        write_shard(path, broken(), 2)  # type: ignore[arg-type]
    assert open_shard(path).tolist() == [0, 1, 2]
    assert list(tmp_path.iterdir()) == [path]


def test_mapped_tokens_are_read_only(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.bin", [np.arange(3)], 2)
    with pytest.raises(ValueError, match="read-only"):
        open_shard(tmp_path / "a.bin")[0] = 1


def test_damaged_shards_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    with pytest.raises(DatasetError, match="cannot read shard"):
        open_shard(path)
    write_shard(path, [np.arange(100)], 2)
    whole = path.read_bytes()
    for content, message in (
        (whole[:-1], "has 223 bytes; 100 tokens need 224"),
        (whole + b"x", "has 225 bytes"),
        (b"NOTASHARD" + whole[9:], "is not a token shard"),
        (whole[:10], "is not a token shard"),
        (whole[:8] + b"\x09" + whole[9:], "format version 9"),
    ):
        path.write_bytes(content)
        with pytest.raises(DatasetError, match=message):
            open_shard(path)


def test_info_is_read_as_it_was_written(make_dataset: MakeDataset) -> None:
    info = read_info(make_dataset([100, 50], [20]))
    assert (info.tokens("train"), info.documents("train"), info.tokens("validation")) == (150, 2, 20)
    assert [shard.file for shard in info.splits["train"]] == ["train-00000.bin", "train-00001.bin"]


def test_missing_or_damaged_info_is_refused(tmp_path: Path, make_dataset: MakeDataset) -> None:
    with pytest.raises(DatasetError, match=r"is not a prepared dataset \(no dataset.json\)"):
        read_info(tmp_path)
    directory = make_dataset([100])
    text = (directory / INFO_FILE).read_text()
    for content, message in (
        (text[:-10], "is damaged"),
        (text.replace('"splits"', '"spilt"'), "is damaged"),
        (
            text.replace('"format_version": 1', '"format_version": 2'),
            "has format version 2; it must have version 1",
        ),
        ("[]", "is damaged"),
    ):
        (directory / INFO_FILE).write_text(content)
        with pytest.raises(DatasetError, match=message):
            read_info(directory)
