"""What the API and a model replica tell each other. Light: the API's process imports this, but not torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from llama_ray.generation.sampling.params import SamplingParams


@dataclass(frozen=True)
class ModelInfo:
    """Which model a replica serves.

    `id` is the name that clients ask for, `ref` the exact version behind it (`models:/name/7`; for a model from a
    plain directory the same as `id`). `created` is in seconds since 1970, `max_model_len` in tokens of prompt and
    output. `version`, `run_id` and `validation_loss` (nats per token) come from the registry, None without one.
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


@dataclass(frozen=True)
class Job:
    """One HTTP request: each prompt, text or token ids, is completed `params.n` times.

    `echo` puts the prompt before each text. With `stream` the texts come piece by piece, else whole at the end.
    """

    model: str
    prompts: list[str | list[int]]
    params: SamplingParams
    echo: bool = False
    stream: bool = False


@dataclass(frozen=True)
class Started:
    """The first event of a job that was accepted; its texts follow."""

    model: ModelInfo
    prompt_tokens: int


@dataclass(frozen=True)
class Logprobs:
    """Log-probabilities of some tokens of a choice, in the layout of OpenAI's completions.

    `tokens` are their texts; one that is no whole characters is `token_id:N`, as vLLM writes it. `top_logprobs` has
    the taken token beside the most probable ones. `text_offset` counts characters from the choice's beginning.
    """

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]

    @classmethod
    def joined(cls, parts: Sequence[Logprobs]) -> Logprobs:
        """Consecutive parts as one."""
        return cls(
            [x for part in parts for x in part.tokens],
            [x for part in parts for x in part.token_logprobs],
            [x for part in parts for x in part.top_logprobs],
            [x for part in parts for x in part.text_offset],
        )


@dataclass(frozen=True)
class Piece:
    """What was added to choice `index`: text, and the number of tokens that were generated for it."""

    index: int
    text: str
    tokens: int = 0
    logprobs: Logprobs | None = None
    finish_reason: str | None = None

    @classmethod
    def joined(cls, pieces: Sequence[Piece]) -> Piece:
        """Pieces of one choice, at least one, in their order as one."""
        logprobs = [p.logprobs for p in pieces if p.logprobs is not None]
        return cls(
            pieces[0].index,
            "".join(p.text for p in pieces),
            sum(p.tokens for p in pieces),
            Logprobs.joined(logprobs) if logprobs else None,
            pieces[-1].finish_reason,
        )


@dataclass(frozen=True)
class Failure:
    """The last event of a job that cannot be served (no `Started` came before) or finished."""

    status: int
    message: str
    code: str | None = None
    param: str | None = None


Event = Started | list[Piece] | Failure
