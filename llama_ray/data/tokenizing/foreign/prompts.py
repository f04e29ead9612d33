"""What prompts begin and end with."""

from __future__ import annotations

import tokenizers
from tokenizers import processors


def begin_with(backend: tokenizers.Tokenizer, bos: str | None, eos: str | None = None) -> None:
    """Let prompts begin with `bos` and end with `eos`, where they are given."""
    names = [name for name in (bos, eos) if name is not None]
    if names:
        first, last = ([] if name is None else [name] for name in (bos, eos))
        backend.post_processor = processors.TemplateProcessing(
            single=[*first, "$A", *last],
            pair=[
                *first,
                "$A",
                *last,
                *(f"{name}:1" for name in first),
                "$B:1",
                *(f"{name}:1" for name in last),
            ],
            special_tokens=[(name, backend.token_to_id(name)) for name in names],
        )
