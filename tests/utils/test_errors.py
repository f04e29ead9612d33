from __future__ import annotations

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama_ray.utils.errors import first_line, printable
from llama_ray.utils.redact import redact


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (OSError("disk full"), "disk full"),
        (RuntimeError("\n first\nsecond"), "first"),
        (OSError(), "OSError"),
        (ValueError(" \n\t"), "ValueError"),
        (KeyboardInterrupt(), "KeyboardInterrupt"),
    ],
)
def test_the_first_line_of_the_message_or_else_the_class(error: BaseException, expected: str) -> None:
    assert first_line(error) == expected


@given(message=st.text())
def test_any_message_gives_one_line(message: str) -> None:
    line = first_line(ValueError(message))
    assert len(line.splitlines()) == 1
    assert line in redact(message) or line == "ValueError"


@given(text=st.text(st.characters(categories=None)))
def test_any_name_can_be_printed_in_one_line(text: str) -> None:
    shown = printable(text, limit=100)
    assert shown.encode().decode().isprintable()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a b é 日", "a b é 日"),
        (os.fsdecode(b"caf\xe9"), "caf\\xe9"),
        ("two\nlines", "two\\nlines"),
        ("a" * 60 + "b" * 60, "a" * 50 + "..." + "b" * 50),
        ("s3://key:secret@bucket/a", "s3://***@bucket/a"),
    ],
)
def test_what_cannot_be_printed_is_escaped_or_cut(text: str, expected: str) -> None:
    assert printable(text, limit=100) == expected
