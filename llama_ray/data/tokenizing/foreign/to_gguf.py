"""A tokenizer as metadata of a GGUF file, so that llama.cpp gives the same ids; or the reason why it would not."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping
from itertools import groupby
from typing import Any

import numpy as np
from tokenizers import models

from llama_ray.data.tokenizing.errors import TokenizerError
from llama_ray.data.tokenizing.foreign.byte_level import byte_letters
from llama_ray.data.tokenizing.foreign.gguf_splits import ASCII_CASE, name_of
from llama_ray.data.tokenizing.foreign.pieces import SPACE, Kind, Piece, merges_of
from llama_ray.data.tokenizing.splits import DIGIT, GPT_2
from llama_ray.storage.gguf import Value

PREFIX = "tokenizer.ggml."
_GPT_2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
"""GPT-2's own way to write it."""
_WAY_OUT = "export the model with --to DIR instead"
Json = Mapping[str, Any]


def to_gguf(tokenizer_json: str, special: Collection[int], rows: int) -> tuple[dict[str, Value], list[str]]:
    """Return a vocabulary as metadata, and in what llama.cpp will differ, a line for each.

    `rows` is the model's vocab_size: ids without a token get one that no text makes, and added tokens beyond it are
    left out. Raises TokenizerError, in one line, for a tokenizer that llama.cpp cannot have.
    """
    tokenizer = json.loads(tokenizer_json)
    model = tokenizer["model"]
    if model["type"] != "BPE":
        raise _refused(f"its model is {model['type']}; it must be BPE")
    for setting in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(setting):
            raise _refused(f"its {setting} is {model[setting]!r:.40}; it must have none")
    added = {token["id"]: token for token in tokenizer["added_tokens"] if token["id"] < rows}
    for token in added.values():
        if token["single_word"] or ((token["lstrip"] or token["rstrip"]) and not token["special"]):
            raise _refused(f"its added token {token['content']!r:.40} takes spaces or whole words")
    texts = {id: text for text, id in model["vocab"].items() if id < rows}
    texts |= {id: token["content"] for id, token in added.items()}
    steps = list(_steps(tokenizer.get("pre_tokenizer"), "pretokenizers"))
    write = _byte_level if steps else _sentencepiece
    metadata, notes = write(tokenizer, steps)
    if any(token["lstrip"] or token["rstrip"] for token in added.values()):
        notes.append("llama.cpp keeps spaces beside special tokens, where this tokenizer takes them away")
    unknown = model.get("unk_token") if not steps else None
    ids = range(rows)
    kinds = [_kind(id, texts.get(id), added, special, unknown, byte_level=bool(steps)) for id in ids]
    # Names that llama.cpp's own converter gives to rows without a token.
    tokens = [texts.get(id, f"[PAD{id}]") for id in ids]
    if len(set(tokens)) < rows:
        raise _refused("two of its tokens have the same name")
    scores = {f"{PREFIX}scores": _scores(tokens, metadata.pop("scores"))} if "scores" in metadata else {}
    return {
        **{f"{PREFIX}{name}": value for name, value in metadata.items()},
        f"{PREFIX}tokens": tokens,
        **scores,
        f"{PREFIX}token_type": np.asarray(kinds, "<i4"),
    }, notes


def _byte_level(tokenizer: Json, steps: list[Json]) -> tuple[dict[str, Any], list[str]]:
    model, notes = tokenizer["model"], []
    normalizers = [step["type"] for step in _steps(tokenizer.get("normalizer"), "normalizers")]
    if normalizers == ["NFC"]:
        notes.append("llama.cpp does not bring texts into the form NFC, as this tokenizer does")
    elif normalizers:
        raise _refused(f"its normalizer is {normalizers[0]}; llama.cpp has none")
    splits = [split for step in steps for split in _splits(step)]
    lacking = [byte for byte, letter in enumerate(byte_letters()) if letter not in model["vocab"]]
    if lacking:
        notes.append(
            f"of {len(lacking)} bytes that this tokenizer has no token for, such as 0x{lacking[0]:02X}, the neighbours "
            "may get other ids"
        )
    merges = _pairs(model)
    whole_words_first = bool(model.get("ignore_merges"))
    name = name_of(splits, whole_words_first)
    if name is None and _is_reached_by_merges(tokenizer, merges):
        name = name_of(splits, None)
    if name is None:
        raise _refused("llama.cpp does not know how it splits texts into words")
    if name in ASCII_CASE:
        notes.append(
            "llama.cpp takes only A to Z for capital letters, so that words of other scripts that hold capitals may "
            "get other ids"
        )
    return {"model": "gpt2", "pre": name, "merges": [" ".join(merge) for merge in merges]}, notes


def _sentencepiece(tokenizer: Json, _: list[Json]) -> tuple[dict[str, Any], list[str]]:
    model = tokenizer["model"]
    normalizers = [
        (step.get("prepend"), step.get("pattern"), step.get("content"))
        for step in _steps(tokenizer.get("normalizer"), "normalizers")
    ]
    prepend, replace = (SPACE, None, None), (None, {"String": " "}, SPACE)
    if normalizers not in ([prepend, replace], [replace]):
        raise _refused(f"its normalizer is not that of Llama 2, which writes spaces as {SPACE}")
    if not model.get("byte_fallback") or any(f"<0x{byte:02X}>" not in model["vocab"] for byte in range(256)):
        raise _refused("it has no tokens for single bytes")
    merges = _pairs(model)
    scores = _ranks(merges)
    pieces = [Piece(text, scores.get(text, 0), Kind.NORMAL) for text in model["vocab"]]
    theirs = merges_of(pieces, dict(model["vocab"]))
    if _grouped(theirs) != _grouped(merges):
        raise _refused("its merges do not follow from scores of its tokens, as SentencePiece has them")
    return {
        "model": "llama",
        "pre": "default",
        "add_space_prefix": normalizers[0] == prepend,
        "scores": scores,
    }, []


def _pairs(model: Json) -> list[tuple[str, ...]]:
    """Return the merges, which older files have as texts."""
    return [
        tuple(merge) if isinstance(merge, list) else tuple(merge.split(" ", 1)) for merge in model["merges"]
    ]


def _ranks(merges: Iterable[tuple[str, ...]]) -> dict[str, float]:
    """Return a score for each token that merges make: the earlier, the higher.

    Tokens whose merges stand among each other, as those of runs of spaces do, have the same score.
    """
    made = ["".join(merge) for merge in merges]
    last = {text: place for place, text in enumerate(made)}
    scores: dict[str, float] = {}
    score, end = 0.0, -1
    for place, text in enumerate(made):
        if place > end:
            score -= 1
        scores.setdefault(text, score)
        end = max(end, last[text])
    return scores


def _grouped(merges: Iterable[tuple[str, ...]]) -> list[tuple[str, set[tuple[str, ...]]]]:
    """Return merges by what they make, in its order; those that make the same are interchangeable."""
    return [(text, set(group)) for text, group in groupby(merges, key="".join)]


def _scores(tokens: list[str], scores: Mapping[str, float]) -> np.ndarray[Any, Any]:
    return np.asarray([scores.get(token, 0.0) for token in tokens], "<f4")


def _kind(
    id: int,
    text: str | None,
    added: Mapping[int, Json],
    special: Collection[int],
    unknown: str | None,
    *,
    byte_level: bool,
) -> Kind:
    if text is None:
        return Kind.UNUSED
    if text == unknown:
        return Kind.UNKNOWN
    if id in special:
        return Kind.CONTROL
    if id in added:
        return Kind.USER_DEFINED
    is_byte = not byte_level and len(text) == 6 and text.startswith("<0x") and text.endswith(">")
    return Kind.BYTE if is_byte else Kind.NORMAL


def _splits(step: Json) -> list[str]:
    """Return the regular expressions of a step of a pre-tokenizer; raises TokenizerError for other steps."""
    match step:
        case {"type": "Split", "pattern": {"Regex": str(split)}, "behavior": "Isolated", "invert": False}:
            return [GPT_2 if split == _GPT_2 else split]
        case {"type": "Digits", "individual_digits": True}:
            return [DIGIT]
        case {"type": "ByteLevel", "add_prefix_space": False}:
            # Files from before there was a choice have none.
            return [GPT_2] if step.get("use_regex", True) else []
        case _:
            raise _refused(f"llama.cpp does not know how it splits texts into words ({step['type']})")


def _is_reached_by_merges(tokenizer: Json, merges: list[tuple[str, ...]]) -> bool:
    """Return whether merges alone make each token of its own text, so that whole words first is no difference."""
    vocabulary = tokenizer["model"]["vocab"]
    model = models.BPE(vocabulary, [(left, right) for left, right in merges])
    added = {token["content"] for token in tokenizer["added_tokens"]}
    return all(len(model.tokenize(text)) == 1 for text in vocabulary if text not in added)


def _steps(step: Json | None, members: str) -> Iterable[Json]:
    if step is None:
        return []
    if step["type"] != "Sequence":
        return [step]
    return [inner for member in step[members] for inner in _steps(member, members)]


def _refused(reason: str) -> TokenizerError:
    return TokenizerError(f"llama.cpp cannot have this tokenizer: {reason}; {_WAY_OUT}")
