"""What a request may ask of an engine."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from llama_ray.generation.sampling.params import SamplingParams
from llama_ray.utils.fields import shown
from llama_ray.utils.integers import ceil_div


@dataclass(frozen=True)
class Limits:
    """One engine's limits: token ids below `vocab_size`, and `max_seq_len` tokens of prompt and output together.

    A token stands for at most `max_token_bytes` bytes of text, unless that is None.
    """

    vocab_size: int
    max_seq_len: int
    has_tokenizer: bool = field(kw_only=True)
    max_token_bytes: int | None = field(kw_only=True)

    def check_text(self, prompt: str) -> None:
        """Raise ValueError for a text that cannot fit, whatever its tokens are: tokenising megabytes takes seconds."""
        if self.max_token_bytes is None:
            return
        size = len(prompt.encode(errors="surrogatepass"))
        least = ceil_div(size, self.max_token_bytes)
        if least > self.max_seq_len:
            raise ValueError(
                f"the prompt has {size:,} bytes, which are {least:,} tokens or more and leave no room for an answer "
                f"within max_seq_len {self.max_seq_len}; shorten the prompt"
            )

    def check(self, ids: Sequence[int], params: SamplingParams) -> None:
        """Raise ValueError if the prompt or the parameters exceed the limits."""
        if not ids:
            raise ValueError(
                "the prompt is empty and the model has no token to begin with; give at least one token"
            )
        # With max_tokens 0 the prompt itself may take all of it.
        if len(ids) + min(params.max_tokens, 1) > self.max_seq_len:
            raise ValueError(
                f"the prompt has {len(ids)} tokens, which leaves no room for an answer within max_seq_len "
                f"{self.max_seq_len}; shorten the prompt"
            )
        if len(ids) + params.max_tokens > self.max_seq_len:
            raise ValueError(
                f"the prompt's {len(ids)} tokens and max_tokens {params.max_tokens} exceed max_seq_len "
                f"{self.max_seq_len}; set max_tokens to at most {self.max_seq_len - len(ids)} or shorten the prompt"
            )
        self._check_ids("prompt", ids)
        for name in ("logit_bias", "stop_token_ids", "allowed_token_ids", "prompt_logprobs_next"):
            self._check_ids(name, getattr(params, name) or ())
        for what, texts in (("stop strings", params.stop_strings), ("bad_words", params.bad_word_strings)):
            if texts and not self.has_tokenizer:
                raise ValueError(f"{what} need a tokenizer, and this model has none; leave them out")

    def check_done(self, done: Mapping[int, Sequence[int] | None], params: SamplingParams) -> None:
        """Raise ValueError if these cannot be outputs of another engine that has begun the request."""
        if any(done.values()) and params.seed is None and params.temperature:
            raise ValueError(
                "seed is None; a request that another engine has begun needs the seed it had there"
            )
        for index, output in done.items():
            if not 0 <= index < params.n:
                raise ValueError(
                    f"done has candidate {shown(index)}; it must be from 0 to {params.n - 1}, as n is {params.n}"
                )
            if output and len(output) > params.max_tokens:
                raise ValueError(
                    f"done has {len(output)} tokens of candidate {index}; it must have at most max_tokens, "
                    f"{params.max_tokens}"
                )
            self._check_ids("done", output or ())

    def _check_ids(self, name: str, ids: Collection[int]) -> None:
        for token in (min(ids), max(ids)) if ids else ():
            if not 0 <= token < self.vocab_size:
                raise ValueError(
                    f"{name}: token id {shown(token)} is outside the model's vocabulary of {self.vocab_size} "
                    f"(0 to {self.vocab_size - 1})"
                )
