"""Whether two tokenizers give the same ids, in whatever forms they were stored."""

from __future__ import annotations

from collections.abc import Iterator

from llama_ray.data.tokenizing.errors import TokenizerError
from llama_ray.data.tokenizing.hostile_texts import hostile_texts
from llama_ray.data.tokenizing.tokenizer import Tokenizer
from llama_ray.utils.errors import printable


def first_difference(known: Tokenizer, other: Tokenizer) -> str | None:
    """Return where `other` gives other ids than `known`, in a few words; None if it gives the same.

    `other` may have more tokens, with higher ids, and what it makes of texts may then hold these. Equal tokenizers are
    found by their fingerprints; others are compared by their vocabularies and on `hostile_texts`.
    """
    if other.fingerprint in _fingerprints(known):
        return None
    for id, (ours, theirs) in enumerate(zip(known.tokens(), other.tokens(), strict=False)):
        if ours != theirs and ours is not None:
            return f"token {id} is {printable(repr(ours), 40)} there and {printable(repr(theirs), 40)} here"
    for text in hostile_texts():
        ids = other.encode(text)
        if ids != known.encode(text) and max(ids, default=0) < known.vocab_size:
            return f"{printable(repr(text), 40)} becomes other tokens"
    return None


def _fingerprints(tokenizer: Tokenizer) -> Iterator[str]:
    """Yield the fingerprint of `tokenizer`, and that which it has in data that were prepared with it."""
    yield tokenizer.fingerprint
    try:
        yield tokenizer.for_documents().fingerprint
    except TokenizerError:
        return
