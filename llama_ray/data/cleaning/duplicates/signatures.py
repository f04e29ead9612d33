"""Keys of a text: texts that share one are duplicates.

Near-duplicates share one of the keys of a MinHash signature (Broder 1997) that is cut into bands, with the parameters
of FineWeb (Penedo et al. 2024, https://arxiv.org/abs/2406.17557): the sets of runs of five words are
compared by 14 bands of 8 hashes, so that two texts that share a fraction s of their runs are found with probability
1 - (1 - s^8)^14: 0.92 for s = 0.8, half for s = 0.69.
"""

from __future__ import annotations

import hashlib

import numpy as np

from llama_ray.data.cleaning.fold import folded_words
from llama_ray.data.cleaning.words import Hashes, ngram_factor, ngram_hashes
from llama_ray.utils.integers import GOLDEN_GAMMA, splitmix64

BANDS, HASHES_A_BAND, RUN_WORDS = 14, 8, 5
_BLOCK = 256
"""Runs that are hashed at once; their hashes stay in the processor's cache."""
# Each hash function is x -> a x + b modulo 2^64 with odd a, a permutation of the hashes of runs.
_STREAM = splitmix64(np.arange(1, 2 * BANDS * HASHES_A_BAND + 1, dtype=np.uint64) * np.uint64(GOLDEN_GAMMA))
_FACTORS = (_STREAM[::2] | np.uint64(1))[:, None]
_TERMS = _STREAM[1::2][:, None]
_PLACES = np.array([ngram_factor(place) for place in range(HASHES_A_BAND)], np.uint64)


def sign(text: str) -> Hashes:
    """Return the keys of `text`, [14]."""
    bands = minima(runs_of_words(text)).reshape(BANDS, HASHES_A_BAND)
    keys: Hashes = splitmix64((bands * _PLACES).sum(axis=1, dtype=np.uint64))
    return keys


def runs_of_words(text: str) -> Hashes:
    """Return the hashes of the runs of five words of the folded text, at least one: a shorter text is one run."""
    text, words = folded_words(text)
    if not len(words):
        digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
        return np.frombuffer(digest, "<u8")
    return ngram_hashes(words.hashes, min(RUN_WORDS, len(words)))


def minima(runs: Hashes) -> Hashes:
    """Return the smallest value of each hash function over `runs`, [112]; this is the signature."""
    smallest = np.full(BANDS * HASHES_A_BAND, ~np.uint64(0))
    for start in range(0, len(runs), _BLOCK):
        values = _FACTORS * runs[start : start + _BLOCK]
        values += _TERMS
        np.minimum(smallest, values.min(axis=1), out=smallest)
    return smallest


def exact_key(text: str) -> bytes:
    """Return a hash of 16 bytes, the same for texts that are equal but for case and white space."""
    folded = " ".join(text.split()).lower()
    return hashlib.blake2b(folded.encode("utf-8", "surrogatepass"), digest_size=16).digest()
