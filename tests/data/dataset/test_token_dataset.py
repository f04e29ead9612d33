from __future__ import annotations

from pathlib import Path
from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_ray.data.dataset.shards import DatasetError
from llama_ray.data.dataset.token_dataset import TokenDataset
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
