"""How llama.cpp splits texts for byte-level BPE: `tokenizer.ggml.pre` names one of the ways that it knows.

https://github.com/ggml-org/llama.cpp/blob/master/src/llama-vocab.cpp; in its own words where those of the original
tokenizer, which split in the same way, are not known.
"""

from __future__ import annotations

from collections.abc import Sequence

from llama_ray.data.tokenizing.splits import DIGIT, GPT_2, LLAMA_3, O200K, QWEN_2, TEKKEN

SPLITS = {
    "default": (r"[\p{P}\$\+<=>\^~\|]+", GPT_2, r"\p{N}+", "[0-9][0-9][0-9]"),
    "gpt-2": (GPT_2,),
    "phi-2": (GPT_2,),
    "mpt": (GPT_2,),
    "olmo": (GPT_2,),
    "smollm": (DIGIT, GPT_2),
    "starcoder": (DIGIT, GPT_2),
    "refact": (DIGIT, GPT_2),
    "command-r": (DIGIT, GPT_2),
    "llama-bpe": (LLAMA_3,),
    "llama3": (LLAMA_3,),
    "llama-v3": (LLAMA_3,),
    "dbrx": (LLAMA_3,),
    "smaug-bpe": (LLAMA_3,),
    "qwen2": (QWEN_2,),
    "deepseek-r1-qwen": (QWEN_2,),
    "stablelm2": (QWEN_2,),
    "tekken": (TEKKEN,),
    "gpt-4o": (O200K,),
    "llama4": (O200K,),
}
LLAMA_3_NAMES = ("llama-bpe", "llama3", "llama-v3")
WHOLE_WORDS_FIRST = (*LLAMA_3_NAMES, "tekken")
"""Names for which a word that is a token is not merged from its bytes."""
ASCII_CASE = ("tekken", "gpt-4o", "llama4")
"""Names for which llama.cpp knows only the letters A to Z as capital ones, and so splits other scripts elsewhere."""


def name_of(splits: Sequence[str], whole_words_first: bool | None) -> str | None:
    """Return a name for `splits`; `whole_words_first` None is for a vocabulary to which it makes no difference."""
    for name, known in SPLITS.items():
        if known == tuple(splits) and whole_words_first in (None, name in WHOLE_WORDS_FIRST):
            return name
    return None
