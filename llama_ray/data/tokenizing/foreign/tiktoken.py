"""Llama 3's `tokenizer.model`: a line for each token, its bytes in base64 and its rank."""

from __future__ import annotations

import base64
import binascii
import re
from pathlib import Path
from typing import Any

import tokenizers

from llama_ray.data.tokenizing.errors import TokenizerError
from llama_ray.data.tokenizing.foreign.byte_level import add_special, from_ranks
from llama_ray.data.tokenizing.foreign.prompts import begin_with
from llama_ray.data.tokenizing.splits import LLAMA_3

FIRST_LINE = re.compile(rb"[A-Za-z0-9+/]+={0,2} \d+\r?\n")
"""How such a file begins."""

_BOS, _EOS = "<|begin_of_text|>", "<|end_of_text|>"
# https://github.com/meta-llama/llama-models/blob/main/models/llama3/tokenizer.py, of Llama 3.1 to 3.3; Llama 3 had
# other names for some that are reserved.
_SPECIAL = (
    *(
        _BOS,
        _EOS,
        "<|reserved_special_token_0|>",
        "<|reserved_special_token_1|>",
        "<|finetune_right_pad_id|>",
    ),
    *(
        "<|step_id|>",
        "<|start_header_id|>",
        "<|end_header_id|>",
        "<|eom_id|>",
        "<|eot_id|>",
        "<|python_tag|>",
    ),
    "<|image|>",
)
_NUM_SPECIAL = 256


def read_tiktoken(file: Path) -> tuple[tokenizers.Tokenizer, dict[str, Any]]:
    """Return Llama 3's tokenizer, and its configuration; its prompts begin with bos.

    The file holds neither the split nor the special tokens: they are those of Meta's code. Raises TokenizerError,
    without the file's name, for a file that is no such list.
    """
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(file.read_bytes().splitlines(), 1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error) as error:
            raise TokenizerError(
                f"its line {number} is no token in base64 and its rank; copy it again"
            ) from error
    backend = from_ranks(ranks, LLAMA_3)
    reserved = [f"<|reserved_special_token_{2 + i}|>" for i in range(_NUM_SPECIAL - len(_SPECIAL))]
    add_special(backend, [*_SPECIAL, *reserved])
    begin_with(backend, _BOS)
    return backend, {"bos_token": _BOS, "eos_token": _EOS}
