from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from llama_ray.data.dataset.shards import DatasetError
from llama_ray.data.preparing.output_directory import exclusive, finished_dataset, staging_directory
from tests.data.helpers import folder_without_root

HOLD = """
import sys, time
from pathlib import Path
from llama_ray.data.preparing.output_directory import exclusive, staging_directory
with exclusive(Path(sys.argv[1]), print), staging_directory(Path(sys.argv[1])):
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


def test_what_fails_to_be_written_is_said_and_removed(tmp_path: Path) -> None:
    def fill(file: Path) -> None:
        file.write_text("half")
        with Path("/dev/full").open("w") as full:
            full.write("x")

    message = r"cannot write to .*\(No space left on device\); choose another output"
    with pytest.raises(DatasetError, match=message), staging_directory(tmp_path) as staging:
        fill(staging / "half")
    assert not list(tmp_path.iterdir())
