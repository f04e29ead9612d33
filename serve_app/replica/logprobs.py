"""Log-probabilities in the layout of OpenAI's completions, and those of prompts as vLLM has them."""

from __future__ import annotations

from collections.abc import Sequence

from llama_ray.data.tokenizing.tokenizer import Tokenizer
from llama_ray.generation.sampling.params import TokenLogprob
from serve_app.streams.messages import Logprobs, PromptToken, TokenNames


class LogprobWriter:
    """Converts the log-probabilities of one choice, a continuation of `prompt`, as its tokens arrive.

    Of each position it reports `top` most probable tokens. The text of the choice begins with `before` characters that
    do not belong to these tokens. `names` is what tokens are called, see `Reporting`.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt: Sequence[int],
        constrained: bool,
        *,
        top: int,
        before: int = 0,
        names: TokenNames = "texts",
    ) -> None:
        self._stream = tokenizer.stream(prompt, at_start=not constrained)
        self._top_tokens, self._length, self._names = top, before, names

    def skip(self, token_ids: Sequence[int]) -> None:
        """Pass over tokens whose entries the client has."""
        for token_id in token_ids:
            self._length += len(self._stream.push(token_id))

    def write(self, positions: Sequence[TokenLogprob]) -> Logprobs:
        """Return the next positions' entries."""
        logprobs = Logprobs([], [], [], [])
        for position in positions:
            self._add(logprobs, position.token_id, position)
        return logprobs

    def write_prompt(self, first: int, positions: Sequence[TokenLogprob]) -> Logprobs:
        """Return the entries of a prompt, whose token `first` nothing predicts."""
        logprobs = Logprobs([], [], [], [])
        self._add(logprobs, first, None)
        for position in positions:
            self._add(logprobs, position.token_id, position)
        return logprobs

    def _add(self, logprobs: Logprobs, token_id: int, position: TokenLogprob | None) -> None:
        text = self._stream.name(token_id)
        name = self._name(token_id, text)
        logprobs.tokens.append(name)
        logprobs.token_logprobs.append(None if position is None else position.logprob)
        logprobs.top_logprobs.append(None if position is None else self._top(position, name))
        added = self._stream.push(token_id)
        # Bytes of an unfinished character, which become U+FFFD now, belong to the tokens before.
        skipped = len(added) - len(text) if text and added.endswith(text) else 0
        logprobs.text_offset.append(self._length + skipped)
        self._length += len(added)

    def _top(self, position: TokenLogprob, name: str) -> dict[str, float]:
        top = {name: position.logprob}
        for token_id, logprob in position.top[: self._top_tokens]:
            if token_id != position.token_id:
                other = self._name(token_id, self._stream.name(token_id))
                # Some vocabularies have several tokens with the same text; none may hide another.
                top[self._other_name(token_id, other) if other in top else other] = logprob
        return top

    def _name(self, token_id: int, text: str | None) -> str:
        if self._names == "bytes":
            return (self._stream.part(token_id) if text is None else text.encode()).hex()
        return f"token_id:{token_id}" if text is None or self._names == "ids" else text

    def _other_name(self, token_id: int, name: str) -> str:
        return f"{name}:{token_id}" if self._names == "bytes" else f"token_id:{token_id}"


def prompt_tokens(
    tokenizer: Tokenizer, first: int, positions: Sequence[TokenLogprob], top: int
) -> list[PromptToken]:
    """Return the log-probabilities of the tokens of a prompt that begins with the token `first`."""
    stream = tokenizer.stream()
    stream.push(first)
    tokens = list[PromptToken]()
    for position in positions:
        own = position.token_id
        entries: PromptToken = [(own, position.logprob, position.rank, stream.name(own))]
        for rank, (token_id, logprob) in enumerate(position.top[:top], 1):
            if token_id != own:
                entries.append((token_id, logprob, rank, stream.name(token_id)))
        tokens.append(entries)
        stream.push(own)
    return tokens
