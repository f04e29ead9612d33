"""Panics of native libraries.

Rust code that panics raises a BaseException in Python (pyo3's PanicException), which `except Exception` does not catch.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from llama_ray.utils.errors import first_line

_REQUESTS_TO_STOP = (KeyboardInterrupt, SystemExit, GeneratorExit, asyncio.CancelledError)


class Panic(RuntimeError):
    """A native library has failed in a way that its authors did not expect."""


@contextmanager
def panics_as_errors() -> Iterator[None]:
    """Raise Panic instead of a BaseException that is neither an Exception nor a request to stop."""
    try:
        yield
    except (Exception, *_REQUESTS_TO_STOP):
        raise
    except BaseException as error:
        raise Panic(f"{type(error).__name__}: {first_line(error)}") from error
