"""Files that Megatron's tools wrote are read as they are; the format is written here by its description."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from llama_ray.data.dataset.files import Place
from llama_ray.data.dataset.locations import dataset_info, load_tokenizer, open_files
from llama_ray.data.dataset.shards import DatasetError
from llama_ray.data.dataset.token_dataset import TokenDataset
from llama_ray.data.dataset.verify import verify
from llama_ray.data.tokenizing.tokenizer import Tokenizer, TokenizerError
from llama_ray.utils.targets import IGNORE_INDEX
from tests.token_data import TEXTS

CODES = {"<i4": 4, "<u2": 8, "<i8": 5}


def write_pair(prefix: Path, documents: Sequence[Sequence[Sequence[int]]], dtype: str = "<u2") -> Path:
    """Write documents, of one or more sequences each, as Megatron does."""
    sequences = [sequence for document in documents for sequence in document]
    Path(f"{prefix}.bin").write_bytes(b"".join(np.array(ids, dtype).tobytes() for ids in sequences))
    lengths = [len(sequence) for sequence in sequences]
    pointers = [sum(lengths[:number]) * np.dtype(dtype).itemsize for number in range(len(lengths))]
    borders = [sum(len(document) for document in documents[:number]) for number in range(len(documents) + 1)]
    with Path(f"{prefix}.idx").open("wb") as index:
        index.write(b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, CODES[dtype], len(lengths), len(borders)))
        index.write(np.array(lengths, "<i4").tobytes())
        index.write(np.array(pointers, "<i8").tobytes())
        index.write(np.array(borders, "<i8").tobytes())
    return prefix


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(iter(TEXTS), 400)


@pytest.fixture
def prefix(tmp_path: Path, tokenizer: Tokenizer) -> Path:
    tokenizer.save(tmp_path)
    documents = [[tokenizer.encode(text, eos=True)] for text in TEXTS]
    return write_pair(tmp_path / "corpus.v1_text_document", documents)


@pytest.mark.parametrize("name", ["corpus.v1_text_document", "corpus.v1_text_document.bin", "."])
def test_the_documents_are_those_that_were_written(prefix: Path, tokenizer: Tokenizer, name: str) -> None:
    files = open_files(str(prefix.parent / name))
    found = {
        split: [
            tokenizer.decode(ids)
            for number, shard in enumerate(shards)
            for ids in np.split(
                files.read(split, [Place(number, 0, shard.tokens)])[0].tokens, files.starts(split, number)[1:]
            )
        ]
        for split, shards in files.info.splits.items()
    }
    assert found["train"] == TEXTS[:-1]
    assert found["validation"] == TEXTS[-1:]
    assert list(verify(files)) == []
    assert (
        load_tokenizer(str(prefix)).fingerprint == files.info.tokenizer.fingerprint == tokenizer.fingerprint
    )


@pytest.mark.parametrize("dtype", ["<u2", "<i4"])
def test_sequences_of_a_document_belong_together(tmp_path: Path, tokenizer: Tokenizer, dtype: str) -> None:
    tokenizer.save(tmp_path)
    write_pair(tmp_path / "train_document", [[[1, 2], [3]], [], [[4, 5, 6, 7]]], dtype)
    write_pair(tmp_path / "valid_document", [[[9, 8, 7]]], dtype)
    batch = TokenDataset(tmp_path, "train").windows(np.array([0]), 6)
    assert batch.inputs.tolist() == [[1, 2, 3, 4, 5, 6]]
    assert batch.targets.tolist() == [[2, 3, IGNORE_INDEX, 5, 6, 7]]
    assert batch.starts is not None
    assert batch.starts.tolist() == [[0, 0, 0, 3, 3, 3]]
    assert TokenDataset(tmp_path, "validation").windows(np.array([0]), 2).inputs.tolist() == [[9, 8]]


def test_the_fingerprint_tells_contents_apart(tmp_path: Path, tokenizer: Tokenizer) -> None:
    found = []
    for number, documents in enumerate(
        ([[[1, 2]], [[3]]], [[[1, 2]], [[3]]], [[[1, 2]], [[4]]], [[[1]], [[2, 3]]])
    ):
        directory = tmp_path / str(number)
        tokenizer.save(directory)
        write_pair(directory / "data", documents)
        found.append(dataset_info(str(directory)).content_fingerprint)
    assert found[0] == found[1]
    assert len(set(found)) == 3


def test_what_cannot_be_read_is_refused_in_one_line(prefix: Path, tokenizer: Tokenizer) -> None:
    index, content = Path(f"{prefix}.idx"), Path(f"{prefix}.bin")
    whole = index.read_bytes()
    for changed, message in (
        (b"MMIDIDY" + whole[7:], "is not an index of Megatron"),
        (whole[:17] + b"\x05" + whole[18:], r"ids of type 5 .* must have version 1, type 4 \(int32\) or 8"),
        (whole[:9] + b"\x02" + whole[10:], "has version 2"),
        (whole[:-8], "bytes; its header says"),
        (whole[:40] + b"\x01" + whole[41:], "its sequences do not follow each other"),
    ):
        index.write_bytes(changed)
        with pytest.raises(DatasetError, match=message):
            open_files(str(prefix))
    index.write_bytes(whole)
    content.write_bytes(content.read_bytes()[:-2])
    with pytest.raises(DatasetError, match=r"\.bin has \d+ bytes; corpus.v1_text_document.idx says"):
        open_files(str(prefix))


def test_a_tokenizer_must_lie_beside_them(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match="no tokenizer at"):
        open_files(str(write_pair(tmp_path / "data", [[[1, 2]]])))


@pytest.mark.parametrize("borders", [[0, 9, 3], [0, -5, 3], [0, 2, 1, 3], [1, 2, 3]])
def test_an_index_whose_documents_are_not_in_order_is_refused(prefix: Path, borders: list[int]) -> None:
    write_pair(prefix, [[[1, 2]], [[3]], [[4]]])
    index = prefix.with_name(f"{prefix.name}.idx")
    content = index.read_bytes()[: 34 + 12 * 3]
    count = struct.pack("<Q", len(borders))
    index.write_bytes(content[:26] + count + content[34:] + np.array(borders, "<i8").tobytes())
    with pytest.raises(DatasetError, match="is damaged: its sequences do not follow each other"):
        open_files(str(prefix))
