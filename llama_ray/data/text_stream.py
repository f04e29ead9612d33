"""Incremental decoding: token ids that arrive one by one to text, whole characters only."""

from __future__ import annotations

import codecs
from typing import Protocol

import tokenizers
from tokenizers import decoders


class TextStream(Protocol):
    """Decodes the token ids of one text as they arrive.

    The results of all `push` calls and a final `flush`, concatenated, equal `Tokenizer.decode` of all ids without
    special tokens. The cost of `push` does not depend on the length of the text.
    """

    def push(self, id: int) -> str:
        """Return the text that `id` completes; '' while bytes of a character are missing."""

    def flush(self) -> str:
        """Return the text that is still pending; bytes of an incomplete character become U+FFFD."""


def text_stream(backend: tokenizers.Tokenizer, special: frozenset[int]) -> TextStream:
    """Return a stream for the vocabulary of `backend` that leaves out the ids in `special`."""
    if isinstance(backend.decoder, decoders.ByteLevel):
        return _ByteLevelStream(backend, special)
    return _WindowStream(backend, special)


class _ByteLevelStream:
    """For byte-level vocabularies: each token stands for bytes, which an incremental UTF-8 decoder joins."""

    def __init__(self, backend: tokenizers.Tokenizer, special: frozenset[int]) -> None:
        self._backend = backend
        self._special = special
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, id: int) -> str:
        token = None if id in self._special else self._backend.id_to_token(id)
        return "" if token is None else self._utf8.decode(_token_bytes(token))

    def flush(self) -> str:
        text = self._utf8.decode(b"", final=True)
        self._utf8.reset()
        return text


class _WindowStream:
    """For all other vocabularies: decodes a short window of tokens and returns what the newest ones added.

    The window is the tokens of the last text returned and the pending ones, as in vLLM's detokenizer, because the text
    of a token depends on its neighbours: a leading space, for example, is dropped only at the start. A run of byte
    tokens (`<0xE2>`) stays pending until it ends, because one invalid byte turns the whole run into U+FFFD.
    """

    def __init__(self, backend: tokenizers.Tokenizer, special: frozenset[int]) -> None:
        self._backend = backend
        self._special = special
        self._context: list[int] = []
        self._pending: list[int] = []

    def push(self, id: int) -> str:
        token = None if id in self._special else self._backend.id_to_token(id)
        if token is None:
            return ""
        is_byte = len(token) == 6 and token.startswith("<0x") and token.endswith(">")
        text = "" if is_byte else self.flush()
        self._pending.append(id)
        return text if is_byte else text + self.flush()

    def flush(self) -> str:
        if not self._pending:
            return ""
        before = self._backend.decode(self._context)
        after = self._backend.decode(self._context + self._pending)
        self._context, self._pending = self._pending, []
        return str(after[len(before) :])


def _byte_of_character() -> dict[str, int]:
    """Return the byte that each character of a byte-level vocabulary stands for, as GPT-2 assigned them.

    Printable Latin-1 characters stand for themselves; the other bytes are assigned to U+0100 and the following.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + n): byte for n, byte in enumerate(others)}


_BYTE_OF_CHARACTER = _byte_of_character()


def _token_bytes(token: str) -> bytes:
    """Return the bytes of a token of a byte-level vocabulary; the content of an added token is plain text."""
    try:
        return bytes(_BYTE_OF_CHARACTER[character] for character in token)
    except KeyError:
        return token.encode()
