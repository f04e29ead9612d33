"""Each kind of damage to a dataset is one line that names the file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from llama_ray.data.dataset.files import LocalFiles
from llama_ray.data.dataset.info import TokenizerInfo
from llama_ray.data.dataset.verify import verify
from tests.token_data import write_documents

BOS, EOS = 1, 2
DOCUMENTS = [[[BOS, 7, 8, EOS], [BOS, EOS]], [[BOS, *range(100, 150), EOS]]]
TOKENIZER = TokenizerInfo("test", 300, bos_id=BOS, eos_id=EOS)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    (tmp_path / "tokenizer.json").write_text("{}")
    return write_documents(tmp_path, {"train": DOCUMENTS, "validation": [[[BOS, EOS]]]}, TOKENIZER)


def faults(directory: Path) -> list[str]:
    return list(verify(LocalFiles(directory)))


def test_a_dataset_as_it_was_written_has_no_fault(directory: Path) -> None:
    assert faults(directory) == []


def test_every_damaged_byte_is_found(directory: Path) -> None:
    path = directory / "train-00000.bin"
    whole = path.read_bytes()
    for position in np.linspace(0, len(whole) - 1, 9, dtype=np.int64):
        damaged = bytearray(whole)
        damaged[position] ^= 4
        path.write_bytes(damaged)
        [line] = faults(directory)
        assert line.startswith("train-00000.bin has checksum ")
        assert line.endswith(": it was damaged or changed")


def test_cut_off_missing_and_changed_files_are_named(directory: Path) -> None:
    first, second = directory / "train-00000.bin", directory / "train-00001.bin"
    first.write_bytes(first.read_bytes()[:-3])
    second.unlink()
    (directory / "tokenizer.json").write_text("[]")
    changed, cut, missing = faults(directory)
    assert changed.startswith("tokenizer.json has checksum ")
    assert cut.startswith("train-00000.bin has ")
    assert cut.endswith("it was cut off or replaced")
    assert missing == "train-00001.bin is missing"


def test_swapped_files_are_named(tmp_path: Path) -> None:
    parts = [[[BOS, 7, EOS]], [[BOS, 8, EOS]]]
    directory = write_documents(tmp_path, {"train": parts}, TOKENIZER)
    first, second = directory / "train-00000.bin", directory / "train-00001.bin"
    content = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(content)
    assert faults(directory) == [
        "train-00000.bin holds what dataset.json says of train-00001.bin: they were swapped",
        "train-00001.bin holds what dataset.json says of train-00000.bin: they were swapped",
    ]


@pytest.mark.parametrize(
    ("documents", "message"),
    [
        ([[BOS, 7, EOS], [7, 8, EOS]], "does not begin with bos (number 1)"),
        ([[BOS, 7], [BOS, EOS]], "does not end with eos (number 0)"),
        ([[BOS, 300, EOS]], "holds the token id 300; the vocabulary has 300"),
    ],
)
def test_documents_are_between_bos_and_eos(tmp_path: Path, documents: list[list[int]], message: str) -> None:
    [line] = faults(write_documents(tmp_path, {"train": [documents]}, TOKENIZER))
    assert line.startswith("train-00000.bin ")
    assert message in line
