from __future__ import annotations

from pathlib import Path

import pytest

from llama_ray.storage.replacement import Replacement


def contents(directory: Path) -> dict[str, str]:
    return {file.name: file.read_text() for file in directory.iterdir()}


def test_files_take_their_names_together(tmp_path: Path) -> None:
    directory = tmp_path / "new"
    with Replacement(directory, marker="marker") as new:
        new.write("marker", "1")
        new.path("data").write_text("one")
        assert not set(contents(directory)) & {"marker", "data"}
        new.commit(superseded=["gone"])
    assert contents(directory) == {"marker": "1", "data": "one"}
    with Replacement(directory, marker="marker") as new:
        new.write("marker", "2")
        new.commit(superseded=["data", "marker"])
    assert contents(directory) == {"marker": "2"}


def replace_incompletely(directory: Path, commit: bool) -> None:
    with Replacement(directory, marker="marker") as new:
        new.write("marker", "1")
        # Never written.
        new.path("data")
        if commit:
            new.commit(superseded=[])
        raise FileNotFoundError


@pytest.mark.parametrize("commit", [True, False])
def test_a_block_that_ends_early_leaves_the_directory_as_it_was(tmp_path: Path, commit: bool) -> None:
    (tmp_path / "data").write_text("old")
    with pytest.raises(FileNotFoundError):
        replace_incompletely(tmp_path, commit)
    assert contents(tmp_path) == {"data": "old"}


def test_a_link_is_replaced_and_not_followed(tmp_path: Path) -> None:
    (tmp_path / "blob").write_text("shared")
    (tmp_path / "new").mkdir()
    for name in ("data", "gone"):
        (tmp_path / "new" / name).symlink_to(tmp_path / "blob")
    (tmp_path / "new" / "dangling").symlink_to(tmp_path / "nowhere")
    with Replacement(tmp_path / "new", marker="data") as new:
        new.write("data", "own")
        new.commit(superseded=["gone", "dangling"])
    assert contents(tmp_path / "new") == {"data": "own"}
    assert (tmp_path / "blob").read_text() == "shared"
