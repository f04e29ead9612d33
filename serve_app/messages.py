"""What the API and a model replica send each other. Must not import torch: the API's process does without it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from llama_ray.generation.sampling.params import SamplingParams
from serve_app.errors import cut


@dataclass(frozen=True)
class ModelInfo:
    """The model that a replica serves.

    `id` is the name that clients ask for, `ref` the exact version behind it (`models:/name/7`; for a plain directory
    the same as `id`). `created` is in seconds since 1970, `max_model_len` in tokens of prompt and output. `version`,
    `run_id` and `validation_loss` (nats per token) come from the registry, and are None without one.
    """

    id: str
    ref: str
    created: int
    max_model_len: int
    parameters: int
    device: str
    version: int | None = None
    run_id: str | None = None
    validation_loss: float | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """What a request's `model` may be."""
        return tuple(dict.fromkeys((self.id, self.ref)))

    def not_served(self, name: str) -> str:
        """Return the message for a request that asks for another model."""
        return f"model {cut(name)!r} is not served here; ask for {' or '.join(map(repr, self.names))}"


@dataclass(frozen=True)
class GenerationRequest:
    """One HTTP request: each prompt, text or token ids, is completed `params.n` times.

    `echo` puts the prompt before each text. With `stream` the texts come as they grow, else whole at the end.
    """

    model: str
    prompts: list[str | list[int]]
    params: SamplingParams
    echo: bool = False
    stream: bool = False


@dataclass(frozen=True)
class Started:
    """The first event of a request that was accepted; its texts follow."""

    model: ModelInfo
    prompt_tokens: int


@dataclass(frozen=True)
class Logprobs:
    """Log-probabilities of some tokens of a choice, in the layout of OpenAI's completions.

    `tokens` are their texts; a token that is only part of a character is `token_id:N`, as in vLLM. `top_logprobs` has
    the sampled token beside the most probable ones. `text_offset` counts characters from the beginning of the choice.
    """

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]

    @classmethod
    def joined(cls, parts: Sequence[Logprobs]) -> Logprobs:
        """Return consecutive parts as one."""
        return cls(
            [x for part in parts for x in part.tokens],
            [x for part in parts for x in part.token_logprobs],
            [x for part in parts for x in part.top_logprobs],
            [x for part in parts for x in part.text_offset],
        )


@dataclass(frozen=True)
class ChoiceDelta:
    """What was added to choice `index`: text, and the number of tokens that were generated for it."""

    index: int
    text: str
    tokens: int = 0
    logprobs: Logprobs | None = None
    finish_reason: str | None = None

    @classmethod
    def joined(cls, deltas: Sequence[ChoiceDelta]) -> ChoiceDelta:
        """Return consecutive deltas of one choice, at least one, as one."""
        logprobs = [delta.logprobs for delta in deltas if delta.logprobs is not None]
        return cls(
            deltas[0].index,
            "".join(delta.text for delta in deltas),
            sum(delta.tokens for delta in deltas),
            Logprobs.joined(logprobs) if logprobs else None,
            deltas[-1].finish_reason,
        )


@dataclass(frozen=True)
class Failure:
    """The last event of a request that cannot be served (then without `Started`) or not be finished."""

    status: int
    message: str
    code: str | None = None
    param: str | None = None


Event = Started | list[ChoiceDelta] | Failure
