from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from llama_ray.data.dataset.info import DatasetInfo, TokenizerInfo, read_info, write_info
from llama_ray.data.dataset.shards import DatasetError, Shard
from llama_ray.data.preparing.output_directory import (
    exclusive,
    finish_publishing,
    finished_dataset,
    is_complete,
    staging_directory,
)
from tests.data.helpers import folder_without_root

HOLD = """
import sys, time
from pathlib import Path
from llama_ray.data.preparing.output_directory import exclusive, staging_directory
with exclusive(Path(sys.argv[1]), print), staging_directory(Path(sys.argv[1]), "f" * 64, print):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_killed_process_holds_nobody_up(tmp_path: Path) -> None:
    output = tmp_path / "data"
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(output)], stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        holder.kill()
    assert len(list(output.iterdir())) == 2  # What it left.
    assert finished_dataset(output, "f", overwrite=False) is None
    lines: list[str] = []
    with exclusive(output, lines.append):
        assert lines == []
    assert not (output / ".lock").exists()


def test_an_output_that_cannot_be_written_to_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(
            DatasetError, match=r"cannot write to .*file/data \(Not a directory\); choose another output"
        ),
        exclusive(tmp_path / "file" / "data", print),
    ):
        pass


def test_an_output_without_access_is_refused() -> None:
    with folder_without_root() as folder:
        (folder / "data").mkdir(mode=0)
        with pytest.raises(
            DatasetError, match=r"cannot read output .*data \(Permission denied\); choose another"
        ):
            finished_dataset(folder / "data", "f", overwrite=False)
        (folder / "data").chmod(0o500)
        with (
            pytest.raises(DatasetError, match=r"cannot write to .*data \(Permission denied\)"),
            exclusive(folder / "data", print),
        ):
            pass


def test_what_fails_to_be_written_is_said(tmp_path: Path) -> None:
    def fill() -> None:
        with Path("/dev/full").open("w") as full:
            full.write("x")

    message = r"cannot write to .*\(No space left on device\); choose another output"
    with pytest.raises(DatasetError, match=message), staging_directory(tmp_path, "f" * 64, print):
        fill()


def test_unfinished_files_stay_for_the_same_preparation_alone(tmp_path: Path) -> None:
    lines: list[str] = []
    with staging_directory(tmp_path, "f" * 64, lines.append) as staging:
        (staging / "train-00000.bin").write_text("whole")
        (staging / ".train-00001.bin.0123abcd").write_text("half")
    with staging_directory(tmp_path, "f" * 64, lines.append) as again:
        assert again == staging
        assert [path.name for path in again.glob("*.bin")] == ["train-00000.bin"]
        assert not list(again.glob(".*"))
    assert lines == []
    with staging_directory(tmp_path, "e" * 64, lines.append) as other:
        assert list(tmp_path.iterdir()) == [other]
    assert lines == [f"removed {staging}, which another preparation left unfinished"]


@pytest.mark.parametrize("moved", [0, 1, 2, 3])
def test_publishing_goes_on_where_it_was_killed(tmp_path: Path, moved: int) -> None:
    info = DatasetInfo(
        fingerprint="f",
        seed=0,
        token_bytes=2,
        tokenizer=TokenizerInfo("t", 300),
        sources=(),
        splits={"train": (Shard("train-00000.bin", "a", 9, 1, 9, False, 5, "0"),), "validation": ()},
    )
    names = ["bad_records.jsonl", "tokenizer.json", "train-00000.bin"]
    with staging_directory(tmp_path, "f" * 64, print) as staging:
        for name in names:
            (staging / name).write_text(name)
        (staging / "work" / "part-00000.json").write_text("{}")
        write_info(staging, info)
        for name in names[:moved]:
            (staging / name).replace(tmp_path / name)
        assert is_complete(staging)
        finish_publishing(staging, tmp_path)
    assert {path.name: path.read_text() for path in tmp_path.iterdir() if path.name != "dataset.json"} == {
        name: name for name in names
    }
    assert sorted(read_info(tmp_path).files) == names[:2]


def test_a_process_that_is_killed_at_the_very_end_leaves_nothing_large(tmp_path: Path) -> None:
    output = tmp_path / "data"
    # In its place `dataset.json` cannot be written.
    (output / "dataset.json").mkdir(parents=True)
    staging = tmp_path / "staging"
    (staging / "work").mkdir(parents=True)
    (staging / "work" / "kept-00000.arrow").write_text("texts")
    tokenizer = TokenizerInfo("t", 300)
    write_info(staging, DatasetInfo("f", 0, 2, tokenizer, (), {"train": (), "validation": ()}))
    with pytest.raises(OSError, match="directory"):
        finish_publishing(staging, output)
    assert [path.name for path in staging.iterdir()] == ["dataset.json"]
