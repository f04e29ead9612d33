"""Log-probabilities in the layout of OpenAI's completions."""

from __future__ import annotations

from collections.abc import Sequence

from llama_ray.data.tokenizer import Tokenizer
from llama_ray.generation.sampling.params import TokenLogprob
from serve_app.streams.messages import Logprobs


class LogprobWriter:
    """Converts the log-probabilities of one choice, a continuation of `prompt`, as its tokens arrive."""

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], constrained: bool) -> None:
        self._stream = tokenizer.stream(prompt, at_start=not constrained)
        self._length = 0

    def skip(self, token_ids: Sequence[int]) -> None:
        """Pass over tokens whose entries the client has."""
        for token_id in token_ids:
            self._length += len(self._stream.push(token_id))

    def write(self, positions: Sequence[TokenLogprob]) -> Logprobs:
        """Return the next positions' entries."""
        logprobs = Logprobs([], [], [], [])
        for position in positions:
            name = self._name(position.token_id)
            logprobs.tokens.append(name)
            logprobs.token_logprobs.append(position.logprob)
            logprobs.top_logprobs.append(self._top(position, name))
            added = self._stream.push(position.token_id)
            # Bytes of an unfinished character, which become U+FFFD now, belong to the tokens before.
            before = len(added) - len(name) if added.endswith(name) else 0
            logprobs.text_offset.append(self._length + before)
            self._length += len(added)
        return logprobs

    def _top(self, position: TokenLogprob, name: str) -> dict[str, float]:
        top = {name: position.logprob}
        for token_id, logprob in position.top:
            if token_id != position.token_id:
                other = self._name(token_id)
                # Some vocabularies have several tokens with the same text; none may hide another.
                top[f"token_id:{token_id}" if other in top else other] = logprob
        return top

    def _name(self, token_id: int) -> str:
        name = self._stream.name(token_id)
        return f"token_id:{token_id}" if name is None else name
