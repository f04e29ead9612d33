"""Training a byte-level BPE: how texts are split, and which tokens the vocabulary has from the start."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

import tokenizers
from tokenizers import AddedToken, pre_tokenizers, trainers

from llama_ray.data.tokenizing.errors import TokenizerError
from llama_ray.data.tokenizing.foreign.byte_level import byte_level
from llama_ray.data.tokenizing.foreign.prompts import begin_with
from llama_ray.data.tokenizing.splits import GPT_2, LLAMA_3, O200K, with_digits
from llama_ray.utils.errors import printable
from llama_ray.utils.fields import check_fields, limits

BOS = "<|begin_of_text|>"
EOS = "<|end_of_text|>"
LARGEST_VOCABULARY = 2**24

_SPLITS = {"llama3": LLAMA_3, "gpt2": GPT_2, "o200k": O200K}


@dataclass(frozen=True)
class TrainingOptions:
    """What a vocabulary is like, beside its size.

    Args:
        split: How texts are split into words, whose bytes are then merged: as for Llama 3 (and GPT-4), for GPT-2, or
            for GPT-4o (o200k), where words also end before a capital letter, as the parts of names in code do.
        split_digits: Maximum number of digits in a token, 1 or 3; by default that of `split`, 3 or, for GPT-2, any.
        min_frequency: Minimum number of times that two tokens stand side by side to become one.
        special_tokens: Texts of special tokens, after bos and eos, such as those of a chat template.
    """

    split: Literal["llama3", "gpt2", "o200k"] = "llama3"
    split_digits: Literal[1, 3] | None = None
    min_frequency: int = field(default=2, metadata=limits(1))
    special_tokens: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_fields(self)
        for name, count in Counter((BOS, EOS, *self.special_tokens)).items():
            if count > 1 or not name.strip():
                raise TokenizerError(
                    f"special_tokens has {printable(name)!r}; each must be a text of its own, other than {BOS} and "
                    f"{EOS}"
                )

    def pattern(self) -> str:
        """Return the regular expression of the words."""
        split = _SPLITS[self.split]
        return split if self.split_digits is None else with_digits(split, self.split_digits)

    def check(self, vocab_size: int) -> None:
        """Raise TokenizerError unless a vocabulary of `vocab_size` entries can be trained."""
        special = 2 + len(self.special_tokens)
        if vocab_size < 256 + special:
            raise TokenizerError(
                f"vocab_size is {vocab_size}; it must be at least {256 + special} (256 bytes and {special} special "
                "tokens)"
            )
        if vocab_size > LARGEST_VOCABULARY:
            raise TokenizerError(
                f"vocab_size is {vocab_size}; it must be at most {LARGEST_VOCABULARY}, for which the trainer reserves "
                "memory"
            )


def train(texts: Iterator[str], vocab_size: int, options: TrainingOptions) -> tokenizers.Tokenizer:
    """Learn a byte-level BPE vocabulary of at most `vocab_size` entries from `texts`; see `Tokenizer.train`."""
    options.check(vocab_size)
    backend = byte_level({}, [], [options.pattern()], whole_words_first=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=options.min_frequency,
        special_tokens=[AddedToken(name, special=True) for name in (BOS, EOS, *options.special_tokens)],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    # Lets other readers of the file (transformers, vLLM) begin a prompt with bos, as training does.
    begin_with(backend, BOS)
    return backend
