"""Log-probabilities in the layout of OpenAI's completions."""

from __future__ import annotations

from collections.abc import Sequence

from llama_ray.data.tokenizer import Tokenizer
from llama_ray.generation.sampling.params import TokenLogprob
from serve_app.messages import Logprobs


class LogprobWriter:
    """Converts the log-probabilities of one choice as its tokens arrive."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._stream = tokenizer.stream()
        self._offset = 0

    def write(self, positions: Sequence[TokenLogprob]) -> Logprobs:
        """Return the next positions' entries."""
        logprobs = Logprobs([], [], [], [])
        for position in positions:
            name = self._name(position.token_id)
            logprobs.tokens.append(name)
            logprobs.token_logprobs.append(position.logprob)
            logprobs.top_logprobs.append(self._top(position, name))
            logprobs.text_offset.append(self._offset)
            self._offset += len(self._stream.push(position.token_id))
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
        text = self._tokenizer.decode([token_id], skip_special=False)
        return f"token_id:{token_id}" if not text or "\ufffd" in text else text
