"""Bodies of requests and responses of OpenAI's completions API."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, ValidatorFunctionWrapHandler, field_validator

# pydantic, which brings it, refuses that of `typing` before Python 3.12.
from typing_extensions import TypedDict

from llama_ray.generation.sampling.params import SamplingParams
from llama_ray.utils.fields import shown
from serve_app.errors import bad_request
from serve_app.protocol.generation import GenerationRequest
from serve_app.protocol.sampling import MAX_CHOICES, SamplingFields, Texts, TokenIds, Usage, one_message
from serve_app.streams.messages import Encoding, Logprobs, PromptToken, Reporting


def _is_none(value: object) -> bool:
    return value is None


def as_prompts(given: str | list[str] | list[int] | list[list[int]]) -> list[str | list[int]]:
    """Return each prompt of a field that may hold one or several, as text or as token ids."""
    if isinstance(given, str):
        return [given]
    if given and isinstance(given[0], int):
        return [[t for t in given if isinstance(t, int)]]
    return [p for p in given if not isinstance(p, int)]


class CompletionRequest(SamplingFields):
    """The body of `POST /v1/completions`. OpenAI has the fields before `top_k`; vLLM has those from there on, too."""

    model: str = Field(
        description="A name of GET /v1/models: NAME, NAME@ALIAS, models:/NAME/7 or NAME:ADAPTER."
    )
    prompt: str | Texts | TokenIds | Annotated[list[TokenIds], Field(fail_fast=True)] = Field(
        description="Text or token ids to continue; a list of them is completed in one batch."
    )
    max_tokens: int = Field(
        16, description="Tokens to generate at most; 0 only computes the prompt, for its log-probabilities."
    )
    best_of: int | None = Field(None, description="Not supported, except with the value of n.")
    logprobs: int | None = Field(
        None,
        description="Also return log-probabilities: of this many likeliest tokens, 0 to 20.",
    )
    echo: bool = Field(False, description="Put the prompt, with its log-probabilities, before the text.")
    suffix: str | None = Field(None, description="Not supported, except empty.")

    prompt_logprobs: int | None = Field(
        None,
        description="Also return the log-probabilities of the prompt's tokens and this many likeliest ones, 0 to 20.",
    )
    add_special_tokens: bool = Field(
        True, description="Begin a prompt that is text with bos, where the tokenizer does so."
    )
    parse_special: bool = Field(
        False,
        description="Take names of special tokens in a prompt's text for these tokens, not for characters.",
    )
    return_token_ids: bool = Field(False, description="Also return the token ids of texts and prompts.")
    return_tokens_as_token_ids: bool = Field(False, description="Call tokens token_id:N in logprobs.")

    @field_validator("prompt", mode="wrap")
    @classmethod
    def _prompt_is_text_or_ids(cls, value: Any, handler: ValidatorFunctionWrapHandler) -> Any:
        allowed = "a string, a list of strings, a list of token ids (integers) or a list of such lists"
        return one_message(value, handler, allowed)

    @property
    def prompts(self) -> list[str | list[int]]:
        """Each prompt, text or token ids."""
        return as_prompts(self.prompt)

    def sampling_params(self) -> SamplingParams:
        """Return how to sample. Raises ApiError (400) for values, of any field, out of range or not supported."""
        wanted = [self.prompt_logprobs, self.logprobs if self.echo else None]
        of_prompt = max((number for number in wanted if number is not None), default=None)
        params = self.params(self.max_tokens, self.logprobs, of_prompt)
        self._check()
        return params

    def generation_request(self, session: str | None) -> GenerationRequest:
        """Return what is asked of the model, for requests of a `session`. Raises ApiError as `sampling_params` does."""
        return GenerationRequest(
            self.model,
            self.prompts,
            self.sampling_params(),
            session,
            encoding=Encoding(self.add_special_tokens, self.parse_special),
            reporting=Reporting(
                self.echo,
                self.return_token_ids,
                self.prompt_logprobs,
                "ids" if self.return_tokens_as_token_ids else "texts",
            ),
        )

    def _check(self) -> None:
        """Raise ApiError for what is not supported, and for fields that do not fit together."""
        if self.suffix:
            raise bad_request(
                "suffix", "suffix is not supported; leave it out: this model only continues text"
            )
        if self.best_of not in (None, self.n):
            raise bad_request(
                "best_of",
                f"best_of {shown(self.best_of)} is not supported; leave it out, or set it to n ({self.n})",
            )
        if not self.prompts:
            raise bad_request("prompt", "prompt is an empty list; give at least one prompt")
        choices = len(self.prompts) * self.n
        if choices > MAX_CHOICES:
            raise bad_request(
                "prompt",
                f"{len(self.prompts)} prompts with n {self.n} are {choices} completions; a request may ask for at most "
                f"{MAX_CHOICES}; send several requests",
            )


class PromptLogprob(TypedDict):
    """One entry of `prompt_logprobs`; `rank` is the token's place among all of the vocabulary, from 1."""

    logprob: float
    rank: int | None
    decoded_token: str | None


PromptLogprobs = list[dict[str, PromptLogprob] | None]
"""For each token of a prompt its log-probability and those of the likeliest ones, by id; null for the first token."""


def prompt_logprobs(tokens: Sequence[PromptToken]) -> PromptLogprobs:
    """Return the log-probabilities of a prompt as a choice has them."""
    return [None, *map(_by_id, tokens)]


def _by_id(entries: PromptToken) -> dict[str, PromptLogprob]:
    return {
        str(token_id): {"logprob": logprob, "rank": rank, "decoded_token": text}
        for token_id, logprob, rank, text in entries
    }


class Choice(BaseModel):
    """A completion, or in a stream what was added to it. Choice i belongs to prompt i // n.

    `stop_reason` is the stop string or the stop token that ended the text. The fields after it, vLLM's, are there if
    they were asked for; those of the prompt come with the first chunk of a choice.
    """

    index: int
    text: str
    logprobs: Logprobs | None = None
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    token_ids: list[int] | None = Field(None, exclude_if=_is_none)
    prompt_token_ids: list[int] | None = Field(None, exclude_if=_is_none)
    prompt_logprobs: PromptLogprobs | None = Field(None, exclude_if=_is_none)


class CompletionResponse(BaseModel):
    """A response, or a chunk of a stream. `system_fingerprint` is the exact model version that answers."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    system_fingerprint: str
    choices: list[Choice]
    usage: Usage | None = None
