from __future__ import annotations

import pytest

from llama_ray.orchestration.launch import LaunchConfig

BAD_NAMES = [
    "", ".", "..", "../x", "/tmp/x", "team/first", "team\\first", ".hidden", "trailing.", "-flag", "a b",
    "a\nb", "a\0b", "a?b", "a#b", "a%20b", "s3://bucket", "\x1b[31m", "x" * 300, "ü" * 65, "\udcff",
]  # fmt: skip


@pytest.mark.parametrize("flag", ["run_name", "resume"])
@pytest.mark.parametrize("name", BAD_NAMES)
def test_a_name_that_is_not_one_directory_everywhere_is_refused_in_one_line(flag: str, name: str) -> None:
    with pytest.raises(
        ValueError, match=rf"{flag} is .*; it must be at most 128 bytes of letters"
    ) as refused:
        LaunchConfig(**{flag: name})  # type: ignore[arg-type]
    message = str(refused.value)
    assert message.isprintable()
    assert len(message) < 250


@pytest.mark.parametrize(
    "name", ["first", "7", "_x", "llama-34m-20261127-3fa2c1", "Übung_2.1", "模型", "x" * 128]
)
def test_other_names_are_taken(name: str) -> None:
    assert LaunchConfig(run_name=name).run_name == name
    assert LaunchConfig(resume=name).resume == name


@pytest.mark.parametrize("name", ["latest", "if_there"])
def test_no_run_is_called_what_resume_takes_for_another_one(name: str) -> None:
    with pytest.raises(ValueError, match=f"run_name is {name}, which means another run to --resume"):
        LaunchConfig(run_name=name)


def test_a_run_to_resume_if_it_is_there_needs_a_name() -> None:
    assert LaunchConfig(resume="if_there", run_name="first").resume == "if_there"
    with pytest.raises(
        ValueError, match="resume is if_there; the run needs a name; give it with --run_name NAME"
    ):
        LaunchConfig(resume="if_there")
    with pytest.raises(ValueError, match="run_name and resume are both given"):
        LaunchConfig(resume="first", run_name="first")


def test_a_launch_is_shown_without_the_keys_of_its_storage() -> None:
    shown = repr(LaunchConfig(output_dir="s3://key:hidden@bucket/runs", world_size=2))
    assert "hidden" not in shown
    assert "world_size=2, output_dir='s3://***@bucket/runs'" in shown
