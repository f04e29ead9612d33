from __future__ import annotations

from pathlib import Path
from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_ray.data.dataset.files import LocalFiles
from llama_ray.data.dataset.shards import DatasetError
from llama_ray.data.dataset.token_dataset import TokenDataset
from llama_ray.data.dataset.verify import verify
from llama_ray.model import loss
from llama_ray.utils.targets import IGNORE_INDEX
from tests.token_data import write_documents, write_shard

ALL_SHARDS = st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=6), min_size=1, max_size=4)


def rows_one_by_one(
    documents: list[list[int]], learned: list[bool], index: int, seq_len: int
) -> tuple[list[int], ...]:
    """Inputs, targets and starts of a window, token by token."""
    tokens = [token for document in documents for token in document]
    first_of = [end for document in documents for end in [len(document)] * len(document)]
    place = [number for document in documents for number in range(len(document))]
    assert len(first_of) == len(tokens)
    begin = index * seq_len
    inputs, targets, starts = [], [], []
    for position in range(begin, begin + seq_len):
        inputs.append(tokens[position])
        border = place[position + 1] == 0
        targets.append(IGNORE_INDEX if border or not learned[position + 1] else tokens[position + 1])
        starts.append(max(position - place[position] - begin, 0))
    return inputs, targets, starts


@settings(max_examples=25, deadline=None)
@given(ALL_SHARDS, st.integers(1, 12), st.booleans(), st.randoms(use_true_random=False))
def test_windows_follow_the_documents_over_all_shards(
    tmp_path_factory: pytest.TempPathFactory,
    shards: list[list[int]],
    seq_len: int,
    masked: bool,
    random: Random,
) -> None:
    counter = iter(range(10_000))
    parts = [[[next(counter) for _ in range(length)] for length in shard] for shard in shards]
    learned = [[random.random() < 0.7 or not masked for _ in range(sum(shard))] for shard in shards]
    directory = write_documents(
        tmp_path_factory.mktemp("data"), {"train": parts}, learned={"train": learned} if masked else None
    )
    dataset = TokenDataset(directory, "train")
    documents = [document for part in parts for document in part]
    flat = [each for part in learned for each in part]
    count = dataset.num_windows(seq_len)
    assert count == (len(flat) - 1) // seq_len
    order = random.sample(range(count), count)
    batch = dataset.windows(np.array(order, dtype=np.int64), seq_len)
    assert batch.starts is not None
    for row, index in enumerate(order):
        expected = rows_one_by_one(documents, flat, index, seq_len)
        assert (
            batch.inputs[row].tolist(),
            batch.targets[row].tolist(),
            batch.starts[row].tolist(),
        ) == expected


ROWS = st.lists(
    st.lists(st.integers(1, 5), min_size=1, max_size=4).filter(lambda lengths: sum(lengths) <= 9),
    min_size=1,
    max_size=6,
)


@settings(max_examples=25, deadline=None)
@given(st.lists(ROWS, min_size=1, max_size=3), st.randoms(use_true_random=False))
def test_a_window_of_rows_is_a_row_whose_last_position_has_no_target(
    tmp_path_factory: pytest.TempPathFactory, shards: list[list[list[int]]], random: Random
) -> None:
    row_tokens = 9
    counter = iter(range(10_000))
    # The last document of a row is filled up.
    lengths = [[[*row[:-1], row_tokens - sum(row[:-1])] for row in shard] for shard in shards]
    parts = [[[next(counter) for _ in range(n)] for row in shard for n in row] for shard in lengths]
    learned = [[random.random() < 0.7 for _ in range(row_tokens * len(shard))] for shard in shards]
    directory = write_documents(
        tmp_path_factory.mktemp("data"), {"train": parts}, learned={"train": learned}, row_tokens=row_tokens
    )
    dataset = TokenDataset(directory, "train")
    assert not list(verify(LocalFiles(directory)))
    count = dataset.num_windows(row_tokens)
    assert count == sum(map(len, shards))
    order = random.sample(range(count), count)
    batch = dataset.windows(np.array(order, dtype=np.int64), row_tokens)
    assert batch.starts is not None
    documents = [document for part in parts for document in part]
    flat = [each for part in learned for each in part]
    # One more token, as if another row followed, whose first token is no target.
    documents.append([0])
    flat.append(False)
    for row, index in enumerate(order):
        found = batch.inputs[row].tolist(), batch.targets[row].tolist(), batch.starts[row].tolist()
        assert found == rows_one_by_one(documents, flat, index, row_tokens)
        assert found[1][-1] == IGNORE_INDEX


def test_rows_have_one_length(tmp_path: Path) -> None:
    directory = write_documents(tmp_path, {"train": [[[1, 2, 3, 4]]]}, row_tokens=4)
    with pytest.raises(
        ValueError, match=r"seq_len is 2; it must be 4, the length of the rows of .*; leave it out"
    ):
        TokenDataset(directory, "train").num_windows(2)


def test_rows_that_do_not_begin_with_a_document_are_found(tmp_path: Path) -> None:
    directory = write_documents(tmp_path, {"train": [[[1, 2, 3], [4, 5, 6, 7, 8]]]}, row_tokens=4)
    assert list(verify(LocalFiles(directory))) == [
        "train-00000.bin has rows that do not begin with a document every 4 tokens"
    ]


def test_without_documents_a_row_is_one_document_and_the_loss_mask_still_holds(tmp_path: Path) -> None:
    directory = write_documents(
        tmp_path, {"train": [[[1, 2], [3, 4, 5]]]}, learned={"train": [[True, True, True, False, True]]}
    )
    batch = TokenDataset(directory, "train").windows(np.array([0]), 4, documents=False)
    assert batch.starts is None
    assert batch.targets.tolist() == [[2, 3, IGNORE_INDEX, 5]]


def test_no_windows_are_an_empty_batch(tmp_path: Path) -> None:
    directory = write_documents(tmp_path, {"train": [[[1, 2, 3]]], "validation": []})
    none = np.array([], dtype=np.int64)
    assert TokenDataset(directory, "train").windows(none, 2).inputs.shape == (0, 2)
    assert TokenDataset(directory, "validation").num_windows(2) == 0


def test_a_missing_split_or_changed_shard_is_refused(tmp_path: Path) -> None:
    write_documents(tmp_path, {"train": [[range(100)]], "validation": []})
    with pytest.raises(DatasetError, match="has no split 'test'; choose one of train, validation"):
        TokenDataset(tmp_path, "test")
    write_shard(tmp_path / "train-00000.bin", [range(90)])
    with pytest.raises(DatasetError, match=r"holds 90 tokens; dataset.json says 100"):
        TokenDataset(tmp_path, "train")
    (tmp_path / "train-00000.bin").unlink()
    with pytest.raises(DatasetError, match=r"cannot read shard .*train-00000.bin \(No such file"):
        TokenDataset(tmp_path, "train")


def test_what_is_ignored_is_what_the_loss_ignores() -> None:
    assert IGNORE_INDEX == loss.IGNORE_INDEX
