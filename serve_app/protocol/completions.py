"""Bodies of requests and responses of OpenAI's completions API."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, ValidatorFunctionWrapHandler, field_validator

from llama_ray.generation.sampling.params import SamplingParams
from llama_ray.utils.fields import shown
from serve_app.errors import bad_request
from serve_app.protocol.sampling import MAX_CHOICES, SamplingFields, Texts, TokenIds, Usage, one_message
from serve_app.streams.messages import Logprobs


class CompletionRequest(SamplingFields):
    """The body of `POST /v1/completions`. OpenAI has the fields before `top_k`; vLLM has those from there on, too."""

    model: str = Field(description="A name that GET /v1/models lists: NAME, NAME@ALIAS or models:/NAME/7.")
    prompt: str | Texts | TokenIds | Annotated[list[TokenIds], Field(fail_fast=True)] = Field(
        description="Text or token ids to continue; a list of them is completed in one batch."
    )
    max_tokens: int = Field(16, description="Tokens to generate at most.")
    best_of: int | None = Field(None, description="Not supported, except with the value of n.")
    logprobs: int | None = Field(
        None,
        description="Also return log-probabilities: of this many likeliest tokens, 0 to 20; not with echo.",
    )
    echo: bool = Field(False, description="Put the prompt before the text.")
    suffix: str | None = Field(None, description="Not supported, except empty.")

    @field_validator("prompt", mode="wrap")
    @classmethod
    def _prompt_is_text_or_ids(cls, value: Any, handler: ValidatorFunctionWrapHandler) -> Any:
        allowed = "a string, a list of strings, a list of token ids (integers) or a list of such lists"
        return one_message(value, handler, allowed)

    @property
    def prompts(self) -> list[str | list[int]]:
        """Each prompt, text or token ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if self.prompt and isinstance(self.prompt[0], int):
            return [[t for t in self.prompt if isinstance(t, int)]]
        return [p for p in self.prompt if not isinstance(p, int)]

    def sampling_params(self) -> SamplingParams:
        """Return how to sample. Raises ApiError (400) for values, of any field, out of range or not supported."""
        params = self.params(self.max_tokens, self.logprobs)
        self._check()
        return params

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
        if self.echo and self.logprobs is not None:
            raise bad_request(
                "echo",
                "echo with logprobs is not supported; leave one of them out: log-probabilities of the prompt are not "
                "computed",
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


class Choice(BaseModel):
    """A completion, or in a stream what was added to it. Choice i belongs to prompt i // n."""

    index: int
    text: str
    logprobs: Logprobs | None = None
    finish_reason: str | None = None


class CompletionResponse(BaseModel):
    """A response, or a chunk of a stream. `system_fingerprint` is the exact model version that answers."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    system_fingerprint: str
    choices: list[Choice]
    usage: Usage | None = None
