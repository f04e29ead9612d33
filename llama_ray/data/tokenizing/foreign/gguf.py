"""The tokenizer in a GGUF file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import AddedToken

from llama_ray.data.chat.template import DEFAULT
from llama_ray.data.tokenizing.errors import TokenizerError
from llama_ray.data.tokenizing.foreign.byte_level import byte_level
from llama_ray.data.tokenizing.foreign.gguf_splits import LLAMA_3_NAMES, SPLITS, WHOLE_WORDS_FIRST
from llama_ray.data.tokenizing.foreign.pieces import Kind, Piece, Spaces, bpe
from llama_ray.data.tokenizing.foreign.prompts import begin_with
from llama_ray.storage.gguf import Gguf, GgufError, read_gguf

_PREFIX = "tokenizer.ggml."
_TEMPLATE = "tokenizer.chat_template"


def has_gguf_tokenizer(file: Path) -> bool:
    """Whether a GGUF file has a tokenizer beside its model. Raises TokenizerError for a damaged file."""
    try:
        return read_gguf(file).metadata.get(f"{_PREFIX}model", "no_vocab") != "no_vocab"
    except GgufError as error:
        raise TokenizerError(str(error)) from error


def read_gguf_tokenizer(file: Path) -> tuple[tokenizers.Tokenizer, dict[str, Any]]:
    """Return the tokenizer of a GGUF file, and its configuration with the chat template.

    Raises TokenizerError, without the file's name where it is not damaged, for a tokenizer of a kind that llama.cpp
    knows and this does not.
    """
    try:
        gguf = read_gguf(file)
        model = gguf.get(f"{_PREFIX}model", str)
        if model not in ("gpt2", "llama"):
            raise TokenizerError(
                f"its tokenizer is of the kind {model!r:.40}; it must be 'gpt2' or 'llama'; give the model's "
                "tokenizer.json"
            )
        pieces = _pieces(gguf)
        backend = _byte_level(gguf, pieces) if model == "gpt2" else bpe(pieces, _spaces(gguf))
        return backend, _configured(gguf, backend, pieces, spm=model == "llama")
    except GgufError as error:
        raise TokenizerError(str(error)) from error


def _pieces(gguf: Gguf) -> list[Piece]:
    texts = gguf.get(f"{_PREFIX}tokens", list)
    none = np.zeros(len(texts))
    scores = gguf.get(f"{_PREFIX}scores", np.ndarray, none).tolist()
    kinds = gguf.get(f"{_PREFIX}token_type", np.ndarray, none + Kind.NORMAL).tolist()
    if not len(texts) == len(scores) == len(kinds):
        raise TokenizerError(
            "its tokens, scores and token types are not equally many; convert the model again"
        )
    pieces = [Piece(*piece) for piece in zip(texts, scores, map(int, kinds), strict=True)]
    # Where a model has more rows than tokens, converters give names to the others.
    while pieces and pieces[-1].kind == Kind.UNUSED and pieces[-1].text == f"[PAD{len(pieces) - 1}]":
        pieces.pop()
    return pieces


def _spaces(gguf: Gguf) -> Spaces:
    return Spaces(
        prefix=gguf.get(f"{_PREFIX}add_space_prefix", bool, True),
        remove_extra=gguf.get(f"{_PREFIX}remove_extra_whitespaces", bool, False),
    )


def _byte_level(gguf: Gguf, pieces: list[Piece]) -> tokenizers.Tokenizer:
    pre = gguf.get(f"{_PREFIX}pre", str, "default")
    if pre not in SPLITS:
        raise TokenizerError(
            f"its tokenizer.ggml.pre is {pre!r:.40}; it must be one of {', '.join(SPLITS)}; give the model's "
            "tokenizer.json"
        )
    vocabulary = {piece.text: id for id, piece in enumerate(pieces)}
    merges = [tuple(merge.split(" ", 1)) for merge in gguf.get(f"{_PREFIX}merges", list)]
    if not all(len(merge) == 2 and {*merge, "".join(merge)} <= vocabulary.keys() for merge in merges):
        raise TokenizerError("one of its merges makes no token; convert the model again")
    backend = byte_level(vocabulary, merges, SPLITS[pre], whole_words_first=pre in WHOLE_WORDS_FIRST)
    backend.add_tokens(
        [
            AddedToken(piece.text, special=piece.kind == Kind.CONTROL, normalized=False)
            for piece in pieces
            if piece.kind in (Kind.CONTROL, Kind.USER_DEFINED)
        ]
    )
    return backend


def _configured(gguf: Gguf, backend: tokenizers.Tokenizer, pieces: list[Piece], spm: bool) -> dict[str, Any]:
    """Let prompts begin and end as llama.cpp's do, and return the configuration."""
    bos, eos = (_named(gguf, pieces, name) for name in ("bos", "eos"))
    adds_bos = spm or gguf.metadata.get(f"{_PREFIX}pre") in LLAMA_3_NAMES
    begin_with(
        backend,
        bos if gguf.get(f"{_PREFIX}add_bos_token", bool, adds_bos) else None,
        eos if gguf.get(f"{_PREFIX}add_eos_token", bool, False) else None,
    )
    config: dict[str, Any] = {"bos_token": bos, "eos_token": eos}
    templates = _chat_templates(gguf)
    if templates:
        alone = templates.get(DEFAULT) if templates.keys() == {DEFAULT} else None
        config["chat_template"] = alone or [{"name": n, "template": text} for n, text in templates.items()]
    return config


def _chat_templates(gguf: Gguf) -> dict[str, str]:
    keys = {DEFAULT: _TEMPLATE} if gguf.metadata.get(_TEMPLATE) else {}
    keys |= {name: f"{_TEMPLATE}.{name}" for name in gguf.get(f"{_TEMPLATE}s", list, [])}
    return {name: gguf.get(key, str) for name, key in keys.items()}


def _named(gguf: Gguf, pieces: list[Piece], name: str) -> str | None:
    key = f"{_PREFIX}{name}_token_id"
    if key not in gguf.metadata:
        return None
    id = gguf.get(key, int)
    if not 0 <= id < len(pieces):
        raise TokenizerError(f"its {key} is {id}; it must be below {len(pieces)}; convert the model again")
    return pieces[id].text
