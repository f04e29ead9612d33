"""A vocabulary of SentencePiece: pieces with scores, from its own model file or from GGUF."""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from typing import NamedTuple

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers

from llama_ray.data.tokenizing.errors import TokenizerError

SPACE = "▁"
_NEVER = -1e6
"""The score of what is no piece of text; no text of the size of a word costs as much."""


class Kind(IntEnum):
    """What a piece is, in the numbers of sentencepiece_model.proto, which GGUF took over."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


class Piece(NamedTuple):
    """An entry of the vocabulary; its id is its place."""

    text: str
    score: float
    kind: int


class Spaces(NamedTuple):
    """What happens to spaces: whether one is put before the text, and whether runs of them become one."""

    prefix: bool
    remove_extra: bool


def bpe(pieces: Sequence[Piece], spaces: Spaces) -> tokenizers.Tokenizer:
    """Return SentencePiece's BPE: of all neighbours that make a piece, those with the highest score merge first."""
    ids = _ids(pieces)
    model = models.BPE(
        ids,
        merges_of(pieces, ids),
        unk_token=_unknown(pieces),
        fuse_unk=True,
        byte_fallback=_has_bytes(pieces),
    )
    return _finished(tokenizers.Tokenizer(model), pieces, spaces)


def unigram(pieces: Sequence[Piece], spaces: Spaces) -> tokenizers.Tokenizer:
    """Return SentencePiece's unigram model: the pieces with the highest sum of scores.

    Of two sums that are equal but for the rounding of single precision, it may choose the other than SentencePiece.
    """
    _ids(pieces)
    names = {character for piece in pieces if piece.kind != Kind.NORMAL for character in piece.text}
    lacking = names - {piece.text for piece in pieces if piece.kind == Kind.NORMAL}
    if lacking:
        raise TokenizerError(
            f"its vocabulary lacks {min(lacking)!r}, so that the name of a special token in a text would be that "
            "token; give the model's tokenizer.json"
        )
    # Else `tokenizers` would make the token of "<s>" in a text: it knows no kinds of pieces.
    vocabulary = [(piece.text, piece.score if piece.kind == Kind.NORMAL else _NEVER) for piece in pieces]
    unknown = next(id for id, piece in enumerate(pieces) if piece.kind == Kind.UNKNOWN)
    model = models.Unigram(vocabulary, unk_id=unknown, byte_fallback=_has_bytes(pieces))
    return _finished(tokenizers.Tokenizer(model), pieces, spaces)


def _ids(pieces: Sequence[Piece]) -> dict[str, int]:
    for piece in pieces:
        if piece.kind in (Kind.USER_DEFINED, Kind.UNUSED):
            raise TokenizerError(
                f"its piece {piece.text!r:.60} is {Kind(piece.kind).name.lower().replace('_', '-')}, which the "
                "library `tokenizers` cannot encode as SentencePiece does; give the model's tokenizer.json"
            )
    ids = {piece.text: id for id, piece in enumerate(pieces)}
    if len(ids) < len(pieces):
        twice = next(piece.text for id, piece in enumerate(pieces) if ids[piece.text] != id)
        raise TokenizerError(f"its piece {twice!r:.60} stands there twice; save it again")
    return ids


def merges_of(pieces: Sequence[Piece], ids: dict[str, int]) -> list[tuple[str, str]]:
    """Return each pair of pieces that makes a piece, in the order in which they merge.

    Of pairs with the same score, as the runs of spaces have it, SentencePiece merges the leftmost; the merged piece
    then grows to the right, as it does where longer pieces come first.
    """
    normal = {piece.text: piece.score for piece in pieces if piece.kind == Kind.NORMAL}
    found = [
        (-score, -cut, -len(text), ids[text], text[:cut], text[cut:])
        for text, score in normal.items()
        for cut in range(1, len(text))
        if text[:cut] in normal and text[cut:] in normal
    ]
    return [(left, right) for *_, left, right in sorted(found)]


def _unknown(pieces: Sequence[Piece]) -> str | None:
    return next((piece.text for piece in pieces if piece.kind == Kind.UNKNOWN), None)


def _has_bytes(pieces: Sequence[Piece]) -> bool:
    return any(piece.kind == Kind.BYTE for piece in pieces)


def _finished(backend: tokenizers.Tokenizer, pieces: Sequence[Piece], spaces: Spaces) -> tokenizers.Tokenizer:
    steps: list[normalizers.Normalizer] = []
    if spaces.remove_extra:
        # Not `Strip`, which also removes line ends.
        steps += [
            normalizers.Replace(Regex(rf"\A +|[ {SPACE}]+\z"), ""),
            normalizers.Replace(Regex(" {2,}"), " "),
        ]
    steps += [normalizers.Prepend(SPACE)] if spaces.prefix else []
    backend.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", SPACE)])
    strip = [decoders.Strip(" ", 1, 0)] if spaces.prefix else []
    backend.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    backend.add_special_tokens(
        [
            AddedToken(piece.text, special=True, normalized=False)
            for piece in pieces
            if piece.kind in (Kind.CONTROL, Kind.UNKNOWN)
        ]
    )
    return backend
