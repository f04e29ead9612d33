"""Panics of native libraries.

Rust code that panics raises a BaseException in Python (pyo3's PanicException), which `except Exception` does not catch.
"""

from __future__ import annotations

import asyncio
from contextlib import ContextDecorator

from llama_ray.utils.errors import first_line

_REQUESTS_TO_STOP = (KeyboardInterrupt, SystemExit, GeneratorExit, asyncio.CancelledError)


class Panic(RuntimeError):
    """A native library has failed in a way that its authors did not expect."""


class panics_as_errors(ContextDecorator):
    """Raise Panic instead of a BaseException that is neither an Exception nor a request to stop.

    A class, because every new token passes through it, and a generator's frame would take longer than the rest.
    """

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if error is not None and not isinstance(error, (Exception, *_REQUESTS_TO_STOP)):
            raise Panic(f"{type(error).__name__}: {first_line(error)}") from error
