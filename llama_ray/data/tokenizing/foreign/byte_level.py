"""Byte-level BPE: tokens that are byte strings, in texts that a regular expression has split."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers

from llama_ray.data.tokenizing.errors import TokenizerError


def byte_level(
    vocabulary: Mapping[str, int],
    merges: Sequence[tuple[str, str]],
    splits: Sequence[str],
    whole_words_first: bool,
) -> tokenizers.Tokenizer:
    """Return a tokenizer whose tokens are written in GPT-2's letters for bytes.

    Each of the regular expressions `splits` cuts the pieces that those before it have left. With `whole_words_first`,
    as tiktoken has it, a piece that is a token is not merged from its bytes.
    """
    backend = tokenizers.Tokenizer(
        models.BPE(dict(vocabulary), list(merges), ignore_merges=whole_words_first)
    )
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            *(pre_tokenizers.Split(Regex(split), behavior="isolated") for split in splits),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    return backend


def from_ranks(ranks: Mapping[bytes, int], split: str, first: Sequence[str] = ()) -> tokenizers.Tokenizer:
    """Return tiktoken's tokenizer: of all neighbours that make a token, those with the lowest rank merge first.

    The tokens named in `first` have the first ids, and the others follow in the order of their ranks, which must be
    0, 1, 2 and so on. Raises TokenizerError unless they are, and each byte is a token.
    """
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise TokenizerError("its ranks are not 0, 1, 2 and so on; copy it again")
    lacking = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if lacking:
        raise TokenizerError(f"it has no token for the byte 0x{lacking[0]:02X}; copy it again")
    letters = byte_letters()
    written = {token: "".join(letters[byte] for byte in token) for token in ranks}
    ordered = sorted(ranks.items(), key=lambda item: item[1])
    merges = [
        (written[left], written[right])
        for token, _ in ordered
        if len(token) > 1
        for left, right in last_merge(token, ranks)
    ]
    vocabulary = [*first, *(written[token] for token, _ in ordered)]
    return byte_level(
        {name: id for id, name in enumerate(vocabulary)}, merges, [split], whole_words_first=True
    )


def last_merge(token: bytes, ranks: Mapping[bytes, int]) -> list[tuple[bytes, bytes]]:
    """Return the two tokens that merge into `token`, in a list that is empty if no merges lead to it.

    They are what all other merges make of its bytes, alone or within a text, for these are done in the same order.
    """
    parts = [token[at : at + 1] for at in range(len(token))]
    while len(parts) > 2:
        best, at = min((ranks.get(parts[at] + parts[at + 1], len(ranks)), at) for at in range(len(parts) - 1))
        if best == len(ranks):
            return []
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return [(parts[0], parts[1])]


def byte_letters() -> list[str]:
    """Return the letter for each byte: https://github.com/openai/gpt-2/blob/master/src/encoder.py"""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def add_special(backend: tokenizers.Tokenizer, names: Sequence[str]) -> None:
    """Add special tokens; those that the vocabulary lacks get the ids after it, in this order."""
    backend.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])
