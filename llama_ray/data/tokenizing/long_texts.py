"""Long texts in parts: `tokenizers` takes a hundred times the memory of the text that it encodes at once."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from llama_ray.data.tokenizing.splits import DIGIT, GPT_2, LLAMA_3, O200K, QWEN_2, TEKKEN, with_digits

PART_CHARACTERS = 1024 * 1024

# All of them begin a word with a letter that follows a single line end, and end one before it; what comes before the
# line end is split in the same way whether the text ends there or not.
_SPLITS = {
    DIGIT,
    TEKKEN,
    *(with_digits(split, count) for split in (GPT_2, LLAMA_3, O200K) for count in (1, 3)),
    *(GPT_2, LLAMA_3, O200K, QWEN_2),
}
_BORDER = re.compile(r"(?<=[!-~]\n)(?=[A-Za-z])")


def can_be_cut(tokenizer_json: str) -> bool:
    """Return whether the ids of a text are those of its `parts`, one after the other, for this `tokenizer.json`."""
    tokenizer = json.loads(tokenizer_json)
    pre_tokenizer = tokenizer.get("pre_tokenizer") or {}
    steps = pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    return (
        tokenizer.get("normalizer") is None
        and all(token["special"] for token in tokenizer["added_tokens"])
        and any(map(_splits_words, steps))
        and all(map(_splits_words, steps[:-1]))
        and steps[-1].get("type") == "ByteLevel"
        and not steps[-1]["add_prefix_space"]
    )


def parts(text: str, size: int = PART_CHARACTERS) -> Iterator[str]:
    """Yield `text` in parts of at least `size` characters, each but the last up to the next line that allows it."""
    start = 0
    while (border := _BORDER.search(text, start + size)) is not None:
        yield text[start : border.start()]
        start = border.start()
    yield text[start:]


def _splits_words(step: Mapping[str, Any]) -> bool:
    match step:
        case {"type": "Split", "pattern": {"Regex": split}, "behavior": "Isolated", "invert": False}:
            return split in _SPLITS
        case {"type": "Digits", "individual_digits": True} | {"type": "ByteLevel", "use_regex": True}:
            return True
        case _:
            return False
