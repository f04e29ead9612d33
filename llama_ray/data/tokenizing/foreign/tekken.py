"""Mistral's `tekken.json`: tokens in base64 with their ranks, the split, and special tokens, whose ids come first."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import tokenizers

from llama_ray.data.tokenizing.errors import TokenizerError
from llama_ray.data.tokenizing.foreign.byte_level import add_special, from_ranks
from llama_ray.data.tokenizing.foreign.prompts import begin_with

# Those of files that list none: https://github.com/mistralai/mistral-common, tokens/tokenizers/tekken.py
_SPECIAL = (
    *(
        "<unk>",
        "<s>",
        "</s>",
        "[INST]",
        "[/INST]",
        "[AVAILABLE_TOOLS]",
        "[/AVAILABLE_TOOLS]",
        "[TOOL_RESULTS]",
    ),
    *(
        "[/TOOL_RESULTS]",
        "[TOOL_CALLS]",
        "[IMG]",
        "<pad>",
        "[IMG_BREAK]",
        "[IMG_END]",
        "[PREFIX]",
        "[MIDDLE]",
    ),
    *("[SUFFIX]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CONTENT]"),
)
_BOS, _EOS = "<s>", "</s>"


def read_tekken(file: Path) -> tuple[tokenizers.Tokenizer, dict[str, Any]]:
    """Return Mistral's tokenizer, and its configuration; its prompts begin with bos.

    Raises TokenizerError, without the file's name, for another or a damaged file.
    """
    try:
        content = json.loads(file.read_bytes())
        config = content["config"]
        count = int(config["default_num_special_tokens"])
        tokens = content["vocab"][: int(config["default_vocab_size"]) - count]
        ranks = {base64.b64decode(token["token_bytes"]): int(token["rank"]) for token in tokens}
        listed = content.get("special_tokens") or [
            {"rank": rank, "token_str": name} for rank, name in enumerate(_SPECIAL)
        ]
        named = {int(token["rank"]): str(token["token_str"]) for token in listed}
        split = str(config["pattern"])
    except (KeyError, TypeError, ValueError) as error:
        raise TokenizerError(f"it is no whole tekken.json ({type(error).__name__}: {error!s:.80})") from error
    special = [named.get(rank, f"<SPECIAL_{rank}>") for rank in range(count)]
    backend = from_ranks(ranks, split, special)
    add_special(backend, special)
    begin_with(backend, _BOS)
    return backend, {"bos_token": _BOS, "eos_token": _EOS}
