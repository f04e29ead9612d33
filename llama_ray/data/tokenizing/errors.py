"""The error of everything that a tokenizer can be wrong about."""

from __future__ import annotations


class TokenizerError(ValueError):
    """A tokenizer that cannot be trained, read or used; the message is one line with the way out."""
