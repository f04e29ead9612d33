"""SentencePiece's model file, as Llama 1, Llama 2 and Mistral have it: a protobuf message."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tokenizers

from llama_ray.data.tokenizing.errors import TokenizerError
from llama_ray.data.tokenizing.foreign.pieces import Kind, Piece, Spaces, bpe, unigram
from llama_ray.data.tokenizing.foreign.prompts import begin_with

# The numbers of https://github.com/google/sentencepiece/blob/master/src/sentencepiece_model.proto
_PIECES, _TRAINER, _NORMALIZER = 1, 2, 3
_PIECE_TEXT, _PIECE_SCORE, _PIECE_KIND = 1, 2, 3
_MODEL_TYPE, _SPACE_AS_SUFFIX, _BOS_ID, _EOS_ID = 3, 24, 41, 42
_CHARACTER_MAP, _DUMMY_PREFIX, _REMOVE_EXTRA_SPACES, _ESCAPE_SPACES = 2, 3, 4, 5
_UNIGRAM, _BPE = 1, 2

Value = int | bytes


def read_sentencepiece(file: Path) -> tuple[tokenizers.Tokenizer, dict[str, Any]]:
    """Return the tokenizer of a model file, and its configuration; its prompts begin with bos.

    Raises TokenizerError, without the file's name, for a file that is no such model, and for one that `tokenizers`
    cannot encode exactly as SentencePiece does.
    """
    pieces: list[Piece] = []
    specs: dict[int, dict[int, Value]] = {}
    for number, value in _fields(file.read_bytes()):
        if isinstance(value, int):
            continue
        if number == _PIECES:
            pieces.append(_piece(dict(_fields(value))))
        elif number in (_TRAINER, _NORMALIZER):
            specs[number] = dict(_fields(value))
    if not pieces or _TRAINER not in specs or _NORMALIZER not in specs:
        raise TokenizerError("it is no whole model of SentencePiece; copy it again")
    trainer, normalizer = specs[_TRAINER], specs[_NORMALIZER]
    spaces = _spaces(trainer, normalizer)
    kind = trainer.get(_MODEL_TYPE, _UNIGRAM)
    if kind not in (_UNIGRAM, _BPE):
        raise TokenizerError("its model is of words or characters; only BPE and unigram models can be read")
    backend = (bpe if kind == _BPE else unigram)(pieces, spaces)
    bos, eos = (_control(pieces, trainer, *field) for field in ((_BOS_ID, 1), (_EOS_ID, 2)))
    begin_with(backend, bos)
    return backend, {"bos_token": bos, "eos_token": eos}


def _piece(fields: dict[int, Value]) -> Piece:
    text, score, kind = (
        fields.get(_PIECE_TEXT),
        fields.get(_PIECE_SCORE, bytes(4)),
        fields.get(_PIECE_KIND, 1),
    )
    if not isinstance(text, bytes) or not isinstance(score, bytes) or not isinstance(kind, int):
        raise TokenizerError("it is no model of SentencePiece")
    return Piece(text.decode(), struct.unpack("<f", score)[0], kind)


def _spaces(trainer: dict[int, Value], normalizer: dict[int, Value]) -> Spaces:
    if normalizer.get(_CHARACTER_MAP):
        raise TokenizerError(
            "its normalizer maps characters, which the library `tokenizers` does in another way; give the model's "
            "tokenizer.json"
        )
    if trainer.get(_SPACE_AS_SUFFIX) or not normalizer.get(_ESCAPE_SPACES, 1):
        raise TokenizerError("it puts spaces at the end of words; give the model's tokenizer.json")
    return Spaces(
        prefix=bool(normalizer.get(_DUMMY_PREFIX, 1)),
        remove_extra=bool(normalizer.get(_REMOVE_EXTRA_SPACES, 1)),
    )


def _control(pieces: list[Piece], trainer: dict[int, Value], number: int, default: int) -> str | None:
    """Return the text of bos or eos; None if the model has none, which the id -1 says."""
    id = trainer.get(number, default)
    if isinstance(id, int) and id < len(pieces) and pieces[id].kind == Kind.CONTROL:
        return pieces[id].text
    return None


def _fields(message: bytes) -> Iterator[tuple[int, Value]]:
    """Yield number and value of each field: https://protobuf.dev/programming-guides/encoding/"""
    position = 0
    while position < len(message):
        key, position = _varint(message, position)
        if key & 7 == 0:
            value, position = _varint(message, position)
            yield key >> 3, value
            continue
        size = {1: 8, 5: 4}.get(key & 7)
        if key & 7 == 2:
            size, position = _varint(message, position)
        if size is None or position + size > len(message):
            raise TokenizerError("it is no whole model of SentencePiece; copy it again")
        yield key >> 3, message[position : position + size]
        position += size


def _varint(message: bytes, position: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if position == len(message):
            break
        byte = message[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
    raise TokenizerError("it is no whole model of SentencePiece; copy it again")
