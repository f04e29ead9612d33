from __future__ import annotations

from pathlib import Path

import pytest

from llama_ray.storage.paths import (
    absolute,
    existing,
    existing_ref,
    is_model_ref,
    is_uri,
    model_name,
    workspace,
)


@pytest.fixture
def job_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory, which is a temporary copy as `ray job submit --working-dir .` makes it."""
    copy = tmp_path / "session_1" / "runtime_resources" / "working_dir_files" / "_ray_pkg_0123"
    copy.mkdir(parents=True)
    monkeypatch.chdir(copy)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return copy


def test_relative_paths_start_at_the_current_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert workspace() == tmp_path
    assert absolute("./checkpoints/../data") == existing("data") == str(tmp_path / "data")
    assert absolute("/a/b") == "/a/b"
    assert absolute("~/x") == str(Path.home() / "x")
    assert absolute("s3://bucket/./x") == existing("s3://bucket/./x") == "s3://bucket/./x"
    assert capsys.readouterr().err == ""


def test_outputs_of_a_ray_job_are_kept_outside_its_temporary_copy(
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


def test_inputs_of_a_ray_job_may_be_in_its_temporary_copy(job_copy: Path, tmp_path: Path) -> None:
    (job_copy / "corpus").mkdir()
    assert existing("corpus") == str(job_copy / "corpus")
    assert existing("elsewhere") == str(tmp_path / "home" / "llama_ray" / "elsewhere")


@pytest.mark.parametrize("ref", ["models:/tiny/3", "models:/tiny@champion"])
def test_references_to_the_model_registry_are_no_paths(ref: str) -> None:
    assert is_model_ref(ref)
    assert existing_ref(ref) == ref


def test_other_references_are_paths_to_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert not is_model_ref("models/tiny")
    assert existing_ref("models/tiny") == str(tmp_path / "models" / "tiny")


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("s3://bucket/a", True),
        ("file:///a", True),
        ("/a/b", False),
        ("a://b/c", True),
        ("://a", False),
        ("", False),
    ],
)
def test_a_uri_begins_with_a_scheme(path: str, expected: bool) -> None:
    assert is_uri(path) == expected


@pytest.mark.parametrize(
    "ref",
    ["/models/tiny.gguf", "s3://KEY:HUSH@bucket/tiny", "hf://org/tiny@main", "https://host/tiny?sig=HUSH"],
)
def test_a_model_is_named_without_the_rest_of_its_uri(ref: str) -> None:
    assert model_name(ref) == "tiny"
