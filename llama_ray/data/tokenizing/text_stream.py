"""Incremental decoding: token ids that arrive one by one to text, whole characters only."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable, Collection, Iterable, Sequence
from itertools import islice
from typing import Any, Protocol

import tokenizers

REPLACEMENT = "\ufffd"
"""What stands for bytes that are not UTF-8."""

# A character has at most four bytes, so these tokens before a text determine how it begins.
_CONTEXT_TOKENS = 8
_BYTE_TOKEN = re.compile("<0x([0-9A-Fa-f]{2})>")


class TextStream(Protocol):
    """Decodes the token ids of one text as they arrive.

    The results of all `push` calls and a final `flush`, concatenated, equal `Tokenizer.decode` of all ids without
    special tokens; after a prompt, what they add to it. The cost of `push` does not depend on the length of the text.
    """

    def push(self, id: int) -> str:
        """Return the text that `id` completes; '' while bytes of a character are missing."""

    def flush(self) -> str:
        """Return the text that is still pending; bytes of an incomplete character become U+FFFD."""

    def name(self, id: int) -> str | None:
        """Return the text that `id` would add here, the name of a special token, or None for part of a character."""

    def part(self, id: int) -> bytes:
        """Return the bytes of a token that is only part of a character."""


class TextDecoder:
    """How the ids of one vocabulary become text."""

    def __init__(self, backend: tokenizers.Tokenizer, special: Collection[int]) -> None:
        """Decode as `backend` does; the ids in `special` give no text."""
        self._backend, self._special = backend, frozenset(special)
        self._kinds = _decoder_kinds(backend)
        # Where they are the same in every text; a log-probability of the likeliest tokens asks for many.
        self._names: dict[int, str | None] = {}

    def text(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """Return the text of `ids`; bytes that are not UTF-8 become U+FFFD, ids beyond the vocabulary are ignored.

        Where one byte of a run of byte tokens (`<0xE2>`) is wrong, the `tokenizers` library gives up the whole run;
        here its whole characters remain, as in a stream, which cannot wait for the run to end.
        """
        shown = [id for id in ids if id not in self._special] if skip_special else list(ids)
        text: str = self._backend.decode(shown, skip_special_tokens=False)
        if REPLACEMENT not in text or "ByteFallback" not in self._kinds:
            return text
        stream = self._stream(frozenset())
        return "".join([stream.push(id) for id in shown]) + stream.flush()

    def stream(self, prompt: Sequence[int] = (), at_start: bool = True) -> TextStream:
        """Return a decoder for the ids that follow `prompt`.

        With `at_start` False the text does not lose a leading space, which many vocabularies drop at the start of a
        text, even if `prompt` has no text.
        """
        stream = self._stream(self._special)
        if not at_start:
            stream.follow_text()
        visible = (id for id in reversed(prompt) if id not in self._special)
        for id in reversed(list(islice(visible, _CONTEXT_TOKENS))):
            stream.push(id)
        return _Continued(stream, stream.pending) if stream.pending else stream

    def _stream(self, special: frozenset[int]) -> _ByteLevelStream | _WindowStream:
        if self._kinds == ["ByteLevel"]:
            return _ByteLevelStream(self._backend, special, self._names)
        return _WindowStream(self._backend, special, self._kinds)


def _decoder_kinds(backend: tokenizers.Tokenizer) -> list[str]:
    """Return the types of the steps of a decoder, however they are nested; joining tokens changes no text."""

    def flat(step: dict[str, Any]) -> list[str]:
        if step["type"] == "Sequence":
            return [kind for inner in step["decoders"] for kind in flat(inner)]
        return [step["type"]]

    decoder = backend.decoder
    kinds = [] if decoder is None else flat(json.loads(decoder.__getstate__()))
    return [kind for kind in kinds if kind != "Fuse"]


class _ByteLevelStream:
    """For byte-level vocabularies: each token stands for bytes, which an incremental UTF-8 decoder joins."""

    def __init__(
        self, backend: tokenizers.Tokenizer, special: frozenset[int], names: dict[int, str | None]
    ) -> None:
        self._backend = backend
        self._special, self._names = special, names
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, id: int) -> str:
        token = None if id in self._special else self._backend.id_to_token(id)
        return "" if token is None else self._utf8.decode(_token_bytes(token))

    def flush(self) -> str:
        text = self._utf8.decode(b"", final=True)
        self._utf8.reset()
        return text

    def name(self, id: int) -> str | None:
        if id not in self._names:
            token: str | None = self._backend.id_to_token(id)
            if token is not None and id not in self._special:
                token = _strictly(_token_bytes(token))
            self._names[id] = token
        return self._names[id]

    def part(self, id: int) -> bytes:
        return _token_bytes(self._backend.id_to_token(id) or "")

    @property
    def pending(self) -> int:
        """Number of U+FFFD that `flush` would return."""
        return min(len(self._utf8.getstate()[0]), 1)

    def follow_text(self) -> None:
        """Decode as after other text; bytes mean the same everywhere."""


class _WindowStream:
    """For all other vocabularies: decodes a short window of tokens and returns what the newest ones added.

    The window is the tokens of the last text returned and the new ones, as in vLLM's detokenizer, because the text of a
    token depends on its neighbours: a leading space, for example, is dropped only at the start. Tokens for the bytes of
    a character stay pending until it is complete.
    """

    def __init__(self, backend: tokenizers.Tokenizer, special: frozenset[int], kinds: Sequence[str]) -> None:
        self._backend = backend
        self._special = special
        self._decode: Callable[[list[str]], str] = backend.decoder.decode if backend.decoder else " ".join
        self._byte_level, self._byte_fallback = "ByteLevel" in kinds, "ByteFallback" in kinds
        self._context: list[str] = []
        self._pending: list[str] = []
        self._bytes = b""

    def push(self, id: int) -> str:
        token = None if id in self._special else self._backend.id_to_token(id)
        if token is None:
            return ""
        new = self._bytes_of(token)
        if new is None:
            return self.flush() + self._take([token])
        if self._byte_fallback and not _may_begin(self._bytes + new):
            return self.flush() + (
                self._take([REPLACEMENT]) if not _may_begin(new) else self._hold(token, new)
            )
        return self._hold(token, new)

    def flush(self) -> str:
        if not self._pending:
            return ""
        # The library would turn bytes before the incomplete character into U+FFFD, too.
        pending = [REPLACEMENT] * len(self._pending) if self._byte_fallback else self._pending
        self._pending, self._bytes = [], b""
        return self._take(pending)

    def name(self, id: int) -> str | None:
        token: str | None = self._backend.id_to_token(id)
        if token is None or id in self._special:
            return token
        new = self._bytes_of(token)
        if new is not None and _strictly(new) is None:
            return None
        broken = [REPLACEMENT] * len(self._pending)
        return self._added([*self._context, *broken], [token])

    def part(self, id: int) -> bytes:
        return self._bytes_of(self._backend.id_to_token(id) or "") or b""

    @property
    def pending(self) -> int:
        """Number of U+FFFD that `flush` would return."""
        return len(self._pending) if self._byte_fallback else min(len(self._pending), 1)

    def follow_text(self) -> None:
        """Decode as after other text."""
        self._context = [REPLACEMENT]

    def _bytes_of(self, token: str) -> bytes | None:
        """Return the bytes that a token stands for, or None if it is whole characters."""
        if self._byte_level:
            return _token_bytes(token)
        byte = _BYTE_TOKEN.fullmatch(token) if self._byte_fallback else None
        return None if byte is None else bytes.fromhex(byte[1])

    def _hold(self, token: str, new: bytes) -> str:
        """Add a byte token to the pending ones; return their text if no character is incomplete now."""
        self._pending.append(token)
        self._bytes += new
        if _ends_within_character(self._bytes):
            return ""
        pending, self._pending, self._bytes = self._pending, [], b""
        return self._take(pending)

    def _take(self, tokens: list[str]) -> str:
        text = self._added(self._context, tokens)
        self._context = tokens
        return text

    def _added(self, context: list[str], tokens: list[str]) -> str:
        return self._decode([*context, *tokens])[len(self._decode(context)) if context else 0 :]


class _Continued:
    """A stream after a prompt that ends within a character.

    A character that the new tokens complete belongs to them. If they do not complete it, its `shown` U+FFFD belong to
    the prompt's own text and are left out.
    """

    def __init__(self, stream: TextStream, shown: int) -> None:
        self._stream, self._shown = stream, shown

    def push(self, id: int) -> str:
        return self._without_shown(self._stream.push(id))

    def flush(self) -> str:
        return self._without_shown(self._stream.flush())

    def name(self, id: int) -> str | None:
        return self._stream.name(id)

    def part(self, id: int) -> bytes:
        return self._stream.part(id)

    def _without_shown(self, text: str) -> str:
        if not text:
            return ""
        while self._shown and text.startswith(REPLACEMENT):
            text, self._shown = text[1:], self._shown - 1
        self._shown = 0
        return text


def _strictly(content: bytes) -> str | None:
    try:
        return content.decode()
    except UnicodeDecodeError:
        return None


def _ends_within_character(content: bytes) -> bool:
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    decoder.decode(content)
    return bool(decoder.getstate()[0])


def _may_begin(content: bytes) -> bool:
    """Return whether `content` is UTF-8, or becomes UTF-8 with more bytes."""
    try:
        codecs.getincrementaldecoder("utf-8")(errors="strict").decode(content)
    except UnicodeDecodeError:
        return False
    return True


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
