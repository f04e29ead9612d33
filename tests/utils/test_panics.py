from __future__ import annotations

import asyncio

import pytest

from llama_ray.utils.panics import Panic, panics_as_errors


class Panicked(BaseException):
    """As pyo3's PanicException, which is no Exception either."""


def test_a_panic_becomes_an_error_of_one_line() -> None:
    with pytest.raises(Panic, match=r"^Panicked: index out of bounds$"), panics_as_errors():
        raise Panicked("index out of bounds\nat src/lib.rs:1")


@pytest.mark.parametrize(
    "error", [ValueError, KeyboardInterrupt, SystemExit, GeneratorExit, asyncio.CancelledError]
)
def test_errors_and_requests_to_stop_pass(error: type[BaseException]) -> None:
    with pytest.raises(error), panics_as_errors():
        raise error
