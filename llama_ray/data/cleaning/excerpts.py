"""Which texts are shown as examples, and how."""

from __future__ import annotations

import hashlib

from llama_ray.utils.errors import printable


def rank(id: str) -> int:
    """Return a number of 64 bits that looks random, the same in each process: texts of low rank are the examples."""
    digest = hashlib.blake2b(id.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def excerpt(text: str, characters: int) -> str:
    """Return the beginning of `text` in its lines, without secrets and with what cannot be printed escaped."""
    lines = text[:characters].splitlines()
    more = "..." if len(text) > characters else ""
    return "\n".join(printable(line.expandtabs(4), limit=characters) for line in lines) + more
