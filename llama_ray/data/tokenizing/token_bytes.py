"""What tokens stand for: how much text at most, so that a text which cannot fit is refused without tokenising it, and
whether they keep it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from tokenizers.pre_tokenizers import ByteLevel

# A character of n bytes decomposes canonically into at most 1.5 n characters (U+01D6 into three), each of which may
# replace one of 4 bytes, as the letter "A" replaces U+1D400.
_NORMAL_FORM_FACTOR = 6
_LOWERCASE_FACTOR = 3
"""The Kelvin sign of 3 bytes becomes the letter k."""
_KEEP_ALL_TEXT = ("ByteLevel", "Metaspace", "Digits")
_KEEP_ALL_TEXT_UNLESS_REMOVED = ("Split", "Punctuation")


def max_token_bytes(tokenizer_json: str) -> int | None:
    """Return a bound of the bytes of text, in UTF-8, that a token of this `tokenizer.json` can stand for.

    None if there is none, or it is not known: some tokenizers drop spaces or accents, or make one token of any number
    of unknown characters.
    """
    tokenizer = json.loads(tokenizer_json)
    model = tokenizer["model"]
    pre_tokenizers = list(_steps(tokenizer.get("pre_tokenizer"), "pretokenizers"))
    normalizers = list(_steps(tokenizer.get("normalizer"), "normalizers"))
    factor = 1
    for normalizer in normalizers:
        shrinks = _shrinks(normalizer)
        if shrinks is None:
            return None
        factor *= shrinks
    # Special tokens in a text are text.
    special = {token["content"] for token in tokenizer["added_tokens"] if token["special"]}
    added = [token for token in tokenizer["added_tokens"] if not token["special"]]
    byte_level = any(step["type"] == "ByteLevel" for step in (*normalizers, *pre_tokenizers))
    if not (
        model["type"] in ("BPE", "Unigram")
        and all(map(_keeps_all_text, pre_tokenizers))
        and _knows_all_characters(model, byte_level)
        and not any(token["lstrip"] or token["rstrip"] for token in added)
    ):
        return None
    # In a byte-level vocabulary a character stands for a byte.
    names = [name for name in _names(model) if name not in special]
    longest = max(len(name) if byte_level else len(name.encode()) for name in names)
    return factor * max(longest, *(len(token["content"].encode()) for token in added), 1)


def keeps_all_text(tokenizer_json: str) -> bool:
    """Return whether the tokens of this `tokenizer.json` stand for all bytes of any text, without normalisation.

    Decoding what was encoded then gives the same text. This holds for tokenizers like those of GPT-2 and Llama 3, and
    of Llama 1 and 2, for which a "▁" is a space.
    """
    tokenizer = json.loads(tokenizer_json)
    model = tokenizer["model"]
    pre_tokenizers = list(_steps(tokenizer.get("pre_tokenizer"), "pretokenizers"))
    byte_levels = [step for step in pre_tokenizers if step["type"] == "ByteLevel"]
    return bool(
        all(map(_marks_spaces, _steps(tokenizer.get("normalizer"), "normalizers")))
        and all(map(_keeps_all_text, pre_tokenizers))
        and (byte_levels or model.get("byte_fallback"))
        and not any(step["add_prefix_space"] for step in byte_levels)
        and _knows_all_characters(model, byte_level=bool(byte_levels))
        and not any(token["lstrip"] or token["rstrip"] for token in tokenizer["added_tokens"])
    )


def _marks_spaces(normalizer: Mapping[str, Any]) -> bool:
    match normalizer:
        case {"type": "Prepend", "prepend": "▁"}:
            return True
        case {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}:
            return True
        case _:
            return False


def _steps(step: Mapping[str, Any] | None, members: str) -> Iterator[Mapping[str, Any]]:
    if step is None:
        return
    if step["type"] != "Sequence":
        yield step
        return
    for member in step[members]:
        yield from _steps(member, members)


def _shrinks(normalizer: Mapping[str, Any]) -> int | None:
    """Return how many times shorter a normalizer can make a text; None if there is no bound."""
    match normalizer:
        case {"type": "NFC" | "NFD" | "NFKC" | "NFKD"}:
            return _NORMAL_FORM_FACTOR
        case {"type": "Lowercase"}:
            return _LOWERCASE_FACTOR
        case {"type": "Prepend" | "ByteLevel"}:
            return 1
        case {"type": "Replace", "pattern": {"String": str(old)}, "content": str(new)} if new:
            return -(-len(old.encode()) // len(new.encode()))
        case _:
            return None


def _keeps_all_text(pre_tokenizer: Mapping[str, Any]) -> bool:
    if pre_tokenizer["type"] in _KEEP_ALL_TEXT_UNLESS_REMOVED:
        return bool(pre_tokenizer["behavior"] != "Removed")
    return pre_tokenizer["type"] in _KEEP_ALL_TEXT


def _names(model: Mapping[str, Any]) -> Iterator[str]:
    vocabulary = model["vocab"]
    return iter(vocabulary) if isinstance(vocabulary, dict) else (entry[0] for entry in vocabulary)


def _knows_all_characters(model: Mapping[str, Any], byte_level: bool) -> bool:
    """Whether no character is dropped, nor becomes one unknown token together with others."""
    names = set(_names(model))
    if byte_level:
        return names.issuperset(ByteLevel.alphabet())
    if model.get("byte_fallback"):
        return names.issuperset(f"<0x{byte:02X}>" for byte in range(256))
    return model["type"] == "BPE" and model.get("unk_token") in names and not model.get("fuse_unk")
