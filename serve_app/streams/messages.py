"""What the API and a model replica send each other. Must not import torch: the API's process does without it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from llama_ray.data.chat.template import ChatPrompt
from llama_ray.generation.sampling.params import SamplingParams
from serve_app.registry.messages import AdapterVersion

Prompt = str | list[int] | ChatPrompt
"""What is completed: text, token ids, or a conversation that the replica renders with its version's template."""


@dataclass(frozen=True)
class Address:
    """Where an API process listens for the events of its requests; `key` proves that a sender may send them."""

    host: str
    port: int
    key: bytes = field(repr=False)


TokenNames = Literal["texts", "ids", "bytes"]


@dataclass(frozen=True)
class Reporting:
    """What a request wants to be told beside its texts.

    `echo` asks for each prompt before its texts, with its log-probabilities if they and the texts' are asked for;
    `prompt_ids` for the token ids of the prompts, and `prompt_logprobs` for the log-probabilities of their tokens and
    of this many likeliest ones, in vLLM's layout. `names` is what tokens are called in `Logprobs`: their "texts" (or
    `token_id:N` for part of a character), `token_id:N` all of them ("ids"), or their "bytes" in hexadecimal digits,
    with `:N` behind those that another token has, too.
    """

    echo: bool = False
    prompt_ids: bool = False
    prompt_logprobs: int | None = None
    names: TokenNames = "texts"


@dataclass(frozen=True)
class Encoding:
    """How a text becomes token ids: see `Tokenizer.encode_prompt`."""

    add_special_tokens: bool = True
    parse_special: bool = False


@dataclass(frozen=True)
class Submission:
    """A request, or the rest of one that another replica has begun, for the version `ref`.

    `adapter` is what it asked for, if anything. Each prompt is completed `params.n` times; choice i belongs to prompt i
    // n. `params.seed` is set, so that any replica goes on with the same tokens. With `fit`, `params.max_tokens` is
    lowered to what the context leaves. The events go to stream number `stream` at `reply_to`. `done` holds, for each
    choice, the tokens that the client has by now, or None if the choice is complete; it is empty for a request that has
    not begun.
    """

    ref: str
    prompts: Sequence[Prompt]
    params: SamplingParams
    reply_to: Address
    stream: int
    fit: bool = False
    encoding: Encoding = field(default_factory=Encoding)
    reporting: Reporting = field(default_factory=Reporting)
    done: Mapping[int, list[int] | None] = field(default_factory=dict)
    adapter: AdapterVersion | None = None

    @property
    def echoes_logprobs(self) -> bool:
        """Whether an echo waits for the log-probabilities of its prompt, to come with them."""
        wanted = (self.params.logprobs, self.params.prompt_logprobs)
        return self.reporting.echo and None not in wanted

    def done_of(self, prompt: int) -> dict[int, list[int] | None]:
        """Return `done` of one prompt's candidates; empty if the request has not begun."""
        first, n = prompt * self.params.n, self.params.n
        return {i: self.done[first + i] for i in range(n) if first + i in self.done}


@dataclass(frozen=True)
class Started:
    """The first event of a request that was accepted.

    `echo` has the text of each prompt, if it was asked for without log-probabilities; with them, it comes with the
    first delta of each choice. `prompt_ids` has the token ids of each prompt, if they were asked for.
    """

    ref: str
    prompt_tokens: int
    echo: list[str] | None = None
    prompt_ids: list[list[int]] | None = None


@dataclass(frozen=True)
class Logprobs:
    """Log-probabilities of some tokens of a choice, in the layout of OpenAI's completions.

    `tokens` are their names, see `Reporting`. `top_logprobs` has
    the token itself beside the most probable ones. `text_offset` counts characters from the beginning of the choice.
    The first token of a prompt has no log-probabilities.
    """

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
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


PromptToken = list[tuple[int, float, int | None, str | None]]
"""Log-probabilities at one position of a prompt: of its own token, then of the most probable ones. Each has the token's
id, its log-probability, its rank among all tokens, from 1, and its text, None for part of a character."""


@dataclass(frozen=True, slots=True)
class ChoiceDelta:
    """What was added to choice `index`: text, and the tokens that were generated for it.

    With the `finish_reason` comes the `stop_reason`: the stop string, or the id of the stop token. The first delta of
    a choice has the `prompt_logprobs`, for each token of its prompt but the first, if they were asked for; that of a
    prompt's first choice has the number of its `cached_tokens`.
    """

    index: int
    text: str
    token_ids: list[int]
    logprobs: Logprobs | None = None
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    prompt_logprobs: list[PromptToken] | None = None
    cached_tokens: int = 0

    @classmethod
    def joined(cls, deltas: Sequence[ChoiceDelta]) -> ChoiceDelta:
        """Return consecutive deltas of one choice, at least one, as one."""
        logprobs = [delta.logprobs for delta in deltas if delta.logprobs is not None]
        return cls(
            deltas[0].index,
            "".join(delta.text for delta in deltas),
            [token for delta in deltas for token in delta.token_ids],
            Logprobs.joined(logprobs) if logprobs else None,
            deltas[-1].finish_reason,
            deltas[-1].stop_reason,
            next((delta.prompt_logprobs for delta in deltas if delta.prompt_logprobs is not None), None),
            sum(delta.cached_tokens for delta in deltas),
        )


@dataclass(frozen=True)
class Failure:
    """The last event of a request that cannot be served (then without `Started`) or not be finished."""

    status: int
    message: str
    code: str | None = None
    param: str | None = None


Event = Started | list[ChoiceDelta] | Failure

Answered = Literal["done", "not_loaded", "engine_ended"]
"""What a replica's call returns: its events have told the rest, or another replica must go on: it does not have that
version (any more), or its engine has ended."""
