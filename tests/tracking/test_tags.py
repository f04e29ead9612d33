from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from llama_ray.tracking.tags import git_tags, standard_tags

COMMIT = "mlflow.source.git.commit"
DIRTY = "mlflow.source.git.dirty"


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    folder = tmp_path / "repository"
    (folder / "llama_ray").mkdir(parents=True)
    (folder / "llama_ray" / "code.py").write_text("x = 1\n")
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.com"]
    for command in (["init", "-q"], ["add", "."], [*identity, "commit", "-q", "-m", "first"]):
        subprocess.run(["git", "-C", str(folder), *command], check=True)
    return folder


def head(repository: Path) -> str:
    command = ["git", "-C", str(repository), "rev-parse", "HEAD"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def test_a_clean_tree_gives_its_commit_and_a_changed_one_says_so(repository: Path) -> None:
    assert git_tags(repository) == {COMMIT: head(repository)}
    (repository / "llama_ray" / "code.py").write_text("x = 2\n")
    assert git_tags(repository) == {COMMIT: head(repository), DIRTY: "true"}


def test_a_copy_without_git_is_compared_with_the_installed_repository(
    repository: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(repository / "llama_ray", copy / "llama_ray")
    assert git_tags(copy) == {}
    assert git_tags(copy, repository) == {COMMIT: head(repository)}
    (copy / "llama_ray" / "code.py").write_text("x = 3\n")
    assert git_tags(copy, repository)[DIRTY] == "true"


def test_without_git_there_is_no_commit(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert git_tags(repository) == {}


def test_standard_tags_name_the_script_and_the_resources() -> None:
    found = standard_tags(world_size=4, device="NVIDIA H100")
    assert found["world_size"] == "4"
    assert found["device"] == "NVIDIA H100"
    assert found["mlflow.source.name"]
    assert all(isinstance(value, str) for value in found.values())
