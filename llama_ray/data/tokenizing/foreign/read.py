"""Which format a tokenizer's file is in: its first bytes tell, not its name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tokenizers

from llama_ray.data.tokenizing.errors import TokenizerError
from llama_ray.data.tokenizing.foreign.gguf import has_gguf_tokenizer, read_gguf_tokenizer
from llama_ray.data.tokenizing.foreign.sentencepiece import read_sentencepiece
from llama_ray.data.tokenizing.foreign.tekken import read_tekken
from llama_ray.data.tokenizing.foreign.tiktoken import FIRST_LINE, read_tiktoken
from llama_ray.storage.gguf import MAGIC
from llama_ray.utils.errors import printable

NAMES = ("tokenizer.model", "tekken.json")
"""What the files of these formats are called in a model's directory; those of GGUF have any name."""

_FIRST_FIELD = b"\x0a"
"""SentencePiece's file begins with a piece: field 1 of protobuf's wire type 2."""


def holds_tokenizer(file: Path) -> bool:
    """Whether `file` holds a tokenizer, as all files do that are not of a GGUF model without one."""
    with file.open("rb") as opened:
        is_gguf = opened.read(len(MAGIC)) == MAGIC
    return not is_gguf or has_gguf_tokenizer(file)


def read_foreign(file: Path) -> tuple[tokenizers.Tokenizer, dict[str, Any]] | None:
    """Return the tokenizer in `file`, and its configuration; None if the file is in none of these formats.

    They are SentencePiece's, that of Llama 3 (tiktoken's), Mistral's tekken.json and GGUF. Raises TokenizerError for a
    damaged file, and for a tokenizer that would not give the ids of the library it is from.
    """
    with file.open("rb") as opened:
        head = opened.read(4096)
    if head.startswith(MAGIC):
        read = read_gguf_tokenizer
    elif file.name.startswith("tekken") and file.suffix == ".json":
        read = read_tekken
    elif FIRST_LINE.match(head):
        read = read_tiktoken
    elif head.startswith(_FIRST_FIELD) or file.suffix == ".model":
        read = read_sentencepiece
    else:
        return None
    try:
        backend, config = read(file)
    except TokenizerError as error:
        raise TokenizerError(f"{printable(str(file))} cannot be read: {error}") from error
    return backend, {name: value for name, value in config.items() if value is not None}
