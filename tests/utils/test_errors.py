from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama_ray.utils.errors import first_line
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
