"""Which token ids end a completion: those that a checkpoint and its tokenizer name."""

from __future__ import annotations

from collections.abc import Collection

from llama_ray.data.tokenizing.tokenizer import Tokenizer
from llama_ray.model.end_of_text import check_eos_ids


def all_eos_ids(tokenizer: Tokenizer | None, eos_ids: Collection[int], vocab_size: int) -> frozenset[int]:
    """Return `eos_ids` and the tokenizer's own tokens that end a text or an answer, if the model can generate them.

    Raises ValueError for an id in `eos_ids` that is not one of the model's, 0 to vocab_size - 1.
    """
    check_eos_ids(eos_ids, vocab_size, "eos_ids", "give others")
    own = () if tokenizer is None else (tokenizer.eos_id, *tokenizer.end_of_turn_ids())
    return frozenset(eos_ids) | {id for id in own if id is not None and id < vocab_size}
