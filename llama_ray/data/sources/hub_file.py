"""Files of the Hugging Face hub, through its own client."""

from __future__ import annotations

import functools
import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    # Imported at its first use: it is an extra.
    from huggingface_hub import HfFileSystem

HUB = "hf://"
MISSING = "hf:// needs the package huggingface_hub; install it (pip install 'llama-ray[hf]')"
_READ_AHEAD_BYTES = 8 * 1024 * 1024


class HubFile(io.RawIOBase):
    """A file of the hub as a binary stream; `path` is that of HfFileSystem. Raises OSError."""

    def __init__(self, path: str) -> None:
        with hub_errors():
            self._file: Any = _file_system(hub_endpoint()).open(path, "rb", block_size=_READ_AHEAD_BYTES)

    def readable(self) -> bool:
        """Whether it can be read: yes."""
        return True

    def seekable(self) -> bool:
        """Whether it can be read from any place: yes."""
        return True

    def tell(self) -> int:
        """Return the place from which it is read next."""
        return int(self._file.tell())

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Go to a place."""
        return int(self._file.seek(offset, whence))

    def size(self) -> int:
        """Return the size in bytes."""
        return int(self._file.size)

    def read(self, size: int = -1) -> bytes:
        """Return up to `size` bytes, fewer only at the end."""
        with hub_errors():
            content: bytes = self._file.read(size)
        return content

    def close(self) -> None:
        """Forget what was read ahead."""
        if not self.closed:
            self._file.close()
        super().close()


@contextmanager
def hub_errors() -> Iterator[None]:
    """Raise OSError in place of the client's own errors of connections."""
    try:
        from huggingface_hub import errors
    except ImportError as error:
        raise OSError(MISSING) from error
    try:
        yield
    # What it calls HTTPError is that of the package by which it connects, which is not the same in all versions.
    except getattr(errors, "HTTPError", OSError) as error:
        raise OSError(f"the hub cannot be reached: {error or type(error).__name__}") from error


def hub_endpoint() -> str | None:
    """Return the address of the hub, if it is not the usual one."""
    return os.environ.get("HF_ENDPOINT")


@functools.lru_cache(maxsize=1)
def _file_system(endpoint: str | None) -> HfFileSystem:
    from huggingface_hub import HfFileSystem

    return HfFileSystem(endpoint=endpoint)
