from __future__ import annotations

from pathlib import Path

import datasets
import pytest

from llama_ray.data.sources.data_sets import splits_by_name
from tests.data.records.helpers import taken


def test_what_datasets_saved_to_disk_is_read_without_its_notes(tmp_path: Path) -> None:
    texts = [f"text {number}" for number in range(3000)]
    saved = datasets.Dataset.from_dict({"id": list(range(3000)), "text": texts})
    saved.save_to_disk(tmp_path / "saved", num_shards=2)
    found, lines = taken(tmp_path)
    assert found == texts
    assert lines == [
        "left out 2 files (saved/dataset_info.json, saved/state.json): notes about a data set, not its records"
    ]


def test_of_a_data_set_with_splits_only_train_is_taken(tmp_path: Path) -> None:
    splits = {name: datasets.Dataset.from_dict({"text": [name]}) for name in ("train", "test", "validation")}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "saved")
    for source in (tmp_path, tmp_path / "saved"):
        found, lines = taken(source)
        assert found == ["train"]
        assert any("of another split than train; give their own folder" in line for line in lines)
    assert taken(tmp_path / "saved" / "test")[0] == ["test"]
    datasets.DatasetDict({"a": splits["train"], "b": splits["test"]}).save_to_disk(tmp_path / "other")
    assert taken(tmp_path / "other")[0] == ["train", "test"]


@pytest.mark.parametrize(
    ("names", "others"),
    [
        (["train.csv", "test.csv", "notes.csv"], {"test.csv"}),
        (["data/train-0-of-2.parquet", "data/validation-0-of-1.parquet"], {"data/validation-0-of-1.parquet"}),
        (["training/a.txt", "dev/a.txt", "latest/a.txt", "trainer.txt"], {"dev/a.txt"}),
        (["test.csv", "validation.csv"], set()),
    ],
)
def test_names_tell_the_split(names: list[str], others: set[str]) -> None:
    assert splits_by_name(names) == others
