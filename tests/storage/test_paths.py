from __future__ import annotations

from pathlib import Path

import pytest

from llama_ray.storage.paths import absolute, existing, workspace


@pytest.fixture
def job_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Inside what `ray job submit --working-dir .` makes."""
    copy = tmp_path / "session_1" / "runtime_resources" / "working_dir_files" / "_ray_pkg_0123"
    copy.mkdir(parents=True)
    monkeypatch.chdir(copy)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return copy


def test_relative_paths_are_the_users_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert workspace() == tmp_path
    assert absolute("./checkpoints/../data") == existing("data") == str(tmp_path / "data")
    assert absolute("/a/b") == "/a/b"
    assert absolute("~/x") == str(Path.home() / "x")
    assert absolute("s3://bucket/./x") == existing("s3://bucket/./x") == "s3://bucket/./x"
    assert capsys.readouterr().err == ""


def test_outputs_of_a_ray_job_do_not_land_in_its_temporary_copy(
    job_copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    home = tmp_path / "home" / "llama_ray"
    assert workspace() == home
    assert absolute("./checkpoints") == str(home / "checkpoints")
    message = capsys.readouterr().err
    assert message.startswith(f"./checkpoints is kept at {home / 'checkpoints'}")
    assert message.count("\n") == 1
    assert absolute("/a") == "/a"
    assert capsys.readouterr().err == ""


def test_inputs_of_a_ray_job_may_come_with_its_copy(job_copy: Path, tmp_path: Path) -> None:
    (job_copy / "corpus").mkdir()
    assert existing("corpus") == str(job_copy / "corpus")
    assert existing("elsewhere") == str(tmp_path / "home" / "llama_ray" / "elsewhere")
