"""Documents to token ids, many at once, by the fastest library that gives this tokenizer's ids."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError

import numpy as np
from numpy.typing import NDArray

from llama_ray.data.tokenizing.fast import FastBackend, Unsupported
from llama_ray.data.tokenizing.hostile_texts import hostile_texts, vocabulary_texts
from llama_ray.data.tokenizing.long_texts import PART_CHARACTERS, can_be_cut, parts
from llama_ray.data.tokenizing.tokenizer import Tokenizer, check_characters
from llama_ray.utils.errors import printable

SAMPLE_BYTES = 4_000_000
"""A fast library is checked on this much of the user's text; less text is encoded sooner than the check ends."""


@dataclass(frozen=True)
class EncoderChoice:
    """Which library encodes the documents of a dataset, and why.

    Decided once, by `choose_encoder`; `DocumentEncoder` takes `fast`. The ids are the same either way.
    """

    fast: bool
    name: str
    reason: str

    @property
    def is_installed(self) -> bool:
        """Whether this machine has the library, in the version that was checked."""
        return not self.fast or self.name == fast_name()


class DocumentEncoder:
    """Encodes documents: the tokens of a text between bos and eos.

    With `fast`, gigatoken encodes; only `choose_encoder` can tell whether it gives this tokenizer's ids. One thread
    works where the environment has TOKENIZERS_PARALLELISM=false.
    """

    def __init__(self, tokenizer: Tokenizer, fast: bool = False) -> None:
        """Raise TokenizerError for a tokenizer without bos or eos, and Unsupported for one that is not for `fast`."""
        self._tokenizer = tokenizer
        self._border = tokenizer.border_ids()
        self._can_cut = can_be_cut(tokenizer.to_json())
        self._fast = FastBackend(tokenizer.to_json()) if fast else None

    def encode(self, texts: Sequence[str]) -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
        """Return the ids of all texts, one document after the other, and the number of ids of each document.

        Raises TokenizerError for a lone surrogate.
        """
        bos, eos = self._border
        documents = [self._ids(text) for text in texts]
        lengths = np.array([len(ids) + 2 for ids in documents], dtype=np.int64)
        flat = np.empty(int(lengths.sum()), dtype=np.uint32)
        start = 0
        for ids in documents:
            end = start + len(ids) + 1
            flat[start] = bos
            flat[start + 1 : end] = ids
            flat[end] = eos
            start = end + 1
        return flat, lengths

    def _ids(self, text: str) -> Sequence[int] | NDArray[np.uint32]:
        if len(text) <= PART_CHARACTERS or not self._can_cut:
            return self._ids_of_part(text)
        return np.concatenate([np.asarray(self._ids_of_part(part), np.uint32) for part in parts(text)])

    def _ids_of_part(self, text: str) -> Sequence[int] | NDArray[np.uint32]:
        if self._fast is not None:
            check_characters(text)
            ids = self._fast.encode(text)
            if ids is not None:
                return ids
        return self._tokenizer.encode(text)


def choose_encoder(
    tokenizer: Tokenizer, sample: Iterable[str], sample_bytes: int = SAMPLE_BYTES
) -> EncoderChoice:
    """Return the fastest library that gives the ids of `tokenizers` on `sample`, hostile texts and the vocabulary.

    Of `sample` the first `sample_bytes` are read. One different id decides for `tokenizers`; `reason` then shows where.
    """
    own = list(_first_bytes(sample, sample_bytes))
    if sum(len(text) for text in own) < sample_bytes:
        return _slow("for so little text it is the fastest")
    try:
        encoder = DocumentEncoder(tokenizer, fast=True)
        for texts in (own, hostile_texts(), vocabulary_texts(_token_texts(tokenizer))):
            different = _first_difference(tokenizer, encoder, texts)
            if different is not None:
                return _slow(f"gigatoken gives other ids for '{printable(different, limit=80)}'")
    except ModuleNotFoundError:
        return _slow("gigatoken, which is faster, is not installed: pip install 'llama-ray[fast]'")
    except Unsupported as error:
        return _slow(f"gigatoken cannot replace it: {error}")
    return EncoderChoice(True, fast_name(), "it gives the ids of tokenizers")


def fast_name() -> str:
    """Return the name and the version of the fast library; empty if it is not installed."""
    try:
        return f"gigatoken {FastBackend.version()}"
    except PackageNotFoundError:
        return ""


def _slow(reason: str) -> EncoderChoice:
    return EncoderChoice(False, "tokenizers", reason)


def _first_bytes(texts: Iterable[str], size: int) -> Iterator[str]:
    """Yield the first texts, of at least `size` bytes together if there are so many."""
    total = 0
    for text in texts:
        yield text
        total += len(text)
        if total >= size:
            return


def _token_texts(tokenizer: Tokenizer) -> list[str]:
    return [tokenizer.decode([id], skip_special=False) for id in range(tokenizer.vocab_size)]


def _first_difference(tokenizer: Tokenizer, encoder: DocumentEncoder, texts: Iterable[str]) -> str | None:
    for text in texts:
        ids, _ = encoder.encode([text])
        if ids.tolist() != tokenizer.encode(text, bos=True, eos=True):
            return text
    return None
