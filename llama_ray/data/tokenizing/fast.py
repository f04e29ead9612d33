"""gigatoken: the encoding of `tokenizers`, tens of times as fast, for tokenizers of the kinds that it knows."""

from __future__ import annotations

import importlib.metadata
import json
import re

import numpy as np
import psutil
from numpy.typing import NDArray

CACHE_BYTES = 256 * 1024 * 1024
"""How much memory the words that were seen may take."""

# Characters that Unicode 17 added: gigatoken 0.10 knows that they are letters or digits, the regular expressions of
# tokenizers 0.23 do not. With two ranges for those beyond the first plane, which leave out emoji, the search is fast.
_NEW_CHARACTERS = re.compile(
    "[\u088f\u0c5c\u0cdc\ua7ce\ua7cf\ua7d2\ua7d4\ua7f1\U00010940-\U0001efff\U0002b73a-\U00033479]"
)
_NOT_THEIR_FIRST_BYTE = bytes(set(range(256)) - {0xE0, 0xEA, 0xF0})
# A byte of text adds at most about 7 bytes (words of 12 letters, none of them twice).
_CACHED_PER_BYTE = 8


class Unsupported(Exception):
    """A tokenizer that gigatoken does not read, or reads in another way; the message says why."""


class FastBackend:
    """Encodes texts with gigatoken, on the calling thread.

    gigatoken keeps the tokens of all words that it has seen. Once that has made the process larger by `cache_bytes`, it
    is loaded anew; at most twice as much is in use.
    """

    def __init__(self, tokenizer_json: str, cache_bytes: int = CACHE_BYTES) -> None:
        """Raise Unsupported for a tokenizer that gigatoken cannot read, and ModuleNotFoundError without gigatoken."""
        self._json = _without_special_tokens(tokenizer_json)
        self._cache_bytes = cache_bytes
        self._process = psutil.Process()
        self._load()

    @staticmethod
    def version() -> str:
        """Return the version of gigatoken."""
        return importlib.metadata.version("gigatoken")

    def encode(self, text: str) -> NDArray[np.uint32] | None:
        """Return the ids of `text`, without bos and eos; None if `tokenizers` must encode it.

        Raises UnicodeEncodeError for a lone surrogate.
        """
        content = text.encode()
        # Most texts hold none of the first bytes, and are not searched.
        if content.translate(None, _NOT_THEIR_FIRST_BYTE) and _NEW_CHARACTERS.search(text):
            return None
        self._seen += len(content)
        if self._seen * _CACHED_PER_BYTE > self._cache_bytes:
            self._bound_cache()
        return self._backend.encode(content)

    def _bound_cache(self) -> None:
        self._seen = 0
        if self._process.memory_info().rss > self._size_when_loaded + self._cache_bytes:
            # Before the new one is loaded, so that there are never two.
            del self._backend
            self._load()

    def _load(self) -> None:
        from gigatoken.gigatoken_rs import load_hf_json

        try:
            self._backend = load_hf_json(self._json)
        except (RuntimeError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise Unsupported(f"it refuses this tokenizer ({reason:.200})") from error
        self._seen = 0
        self._size_when_loaded = self._process.memory_info().rss


def _without_special_tokens(tokenizer_json: str) -> str:
    """Return `tokenizer_json` without what would make tokens of the names of special tokens in a text."""
    content = json.loads(tokenizer_json)
    for token in content["added_tokens"]:
        if not token["special"]:
            raise Unsupported(f"its added token {token['content']!r:.40} is not special")
    return json.dumps(content | {"added_tokens": [], "post_processor": None})
