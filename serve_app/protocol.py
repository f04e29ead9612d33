"""Requests, responses and errors of OpenAI's completions API, with the sampling parameters that vLLM adds."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidatorFunctionWrapHandler,
    field_validator,
    model_validator,
)

from llama_ray.generation.sampling.params import SamplingParams
from serve_app.events import Job, Logprobs, ModelInfo

MAX_CHOICES = 128  # of one request: prompts times n
MAX_STOP_STRINGS = 16

# Fields that mean the same in both classes; JSON has more forms of `stop` and no tuples, and the log-probabilities of a
# prompt have no place in OpenAI's answer.
_SAMPLING = tuple(
    f.name for f in fields(SamplingParams) if f.name not in ("stop", "stop_token_ids", "prompt_logprobs")
)
TokenId = Annotated[int, Field(strict=False)]  # JSON's keys are strings

_ERROR_TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


class ErrorBody(BaseModel):
    """`param` is the field at fault and `code` a name for programs, where there are such."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorResponse(BaseModel):
    """The body of every response that is no success, and of an error event within a stream."""

    error: ErrorBody


class ApiError(Exception):
    """Ends a request with an HTTP status and OpenAI's error object; `retry_after_s` becomes a header."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.retry_after_s = status, retry_after_s
        kind = _ERROR_TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
        self.response = ErrorResponse(error=ErrorBody(message=message, type=kind, param=param, code=code))


class _Request(BaseModel):
    """Fields that we do not know are refused, types are taken as they are, and null means the default."""

    # Protected names: a field may be called model_... in OpenAI's API.
    model_config = ConfigDict(extra="forbid", strict=True, protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _null_is_default(cls, data: Any) -> Any:
        return {k: v for k, v in data.items() if v is not None} if isinstance(data, Mapping) else data


class StreamOptions(_Request):
    """`include_usage`: a last chunk, without choices, that carries the token counts."""

    include_usage: bool = False


class CompletionRequest(_Request):
    """The body of `POST /v1/completions`. Fields from `top_k` on are not OpenAI's; vLLM has them too."""

    model: str
    prompt: str | list[str] | list[int] | list[list[int]]
    max_tokens: int = 16
    temperature: float = 1.0
    top_p: float = 1.0
    n: int = 1
    best_of: int | None = Field(None, description="Not supported, except with the value of n.")
    stream: bool = False
    stream_options: StreamOptions | None = None
    stop: str | list[str] = Field([], description="Up to 16 strings; the text ends before the first.")
    seed: int | None = None
    logprobs: int | None = Field(None, description="0 to 20; cannot be combined with echo.")
    echo: bool = False
    suffix: str | None = Field(None, description="Not supported, except empty.")
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[TokenId, float] | None = Field(None, description="Token id -> bias.")
    user: str | None = Field(None, description="Accepted for compatibility; has no effect.")
    top_k: int = Field(0, description="0 keeps all tokens.")
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    ignore_eos: bool = False
    min_tokens: int = 0
    stop_token_ids: list[int] = Field([], description="End the text as an end-of-text token does.")
    json_schema: dict[str, Any] | None = Field(None, description="The text is JSON that this schema allows.")
    regex: str | None = Field(None, description="The whole text matches this expression (Rust's syntax).")

    @field_validator("prompt", "stop", mode="wrap")
    @classmethod
    def _one_message_for_a_union(cls, value: Any, handler: ValidatorFunctionWrapHandler, info: Any) -> Any:
        # pydantic would list what is wrong with each alternative.
        try:
            return handler(value)
        except ValidationError:
            allowed = {
                "prompt": "a string, a list of strings, a list of token ids (integers) or a list of such lists",
                "stop": "a string or a list of strings",
            }[info.field_name]
            raise ValueError(f"must be {allowed}") from None

    @property
    def prompts(self) -> list[str | list[int]]:
        """Each prompt, text or token ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if self.prompt and isinstance(self.prompt[0], int):
            return [[t for t in self.prompt if isinstance(t, int)]]
        return [p for p in self.prompt if not isinstance(p, int)]

    def job(self) -> Job:
        """What a model replica shall do. Raises ApiError (400) for values that are out of range or not supported."""
        if self.suffix:
            raise _refused("suffix", "suffix is not supported: this model only continues text; leave it out")
        if self.best_of not in (None, self.n):
            raise _refused(
                "best_of", f"best_of {self.best_of} is not supported; leave it out, or set it to n ({self.n})"
            )
        if self.echo and self.logprobs is not None:
            raise _refused(
                "echo",
                "echo with logprobs is not supported: log-probabilities of the prompt are not computed; leave one out",
            )
        if self.stream_options is not None and not self.stream:
            raise _refused("stream_options", "stream_options needs stream to be true")
        if not self.prompts:
            raise _refused("prompt", "prompt is an empty list; give at least one prompt")
        choices = len(self.prompts) * self.n
        if choices > MAX_CHOICES:
            raise _refused(
                "prompt",
                f"{len(self.prompts)} prompts with n {self.n} are {choices} completions, but one request may ask for "
                f"{MAX_CHOICES}; send several requests",
            )
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        if len(stop) > MAX_STOP_STRINGS:
            raise _refused("stop", f"stop has {len(stop)} strings; it may have {MAX_STOP_STRINGS}")
        try:
            params = SamplingParams(
                stop=stop,
                stop_token_ids=tuple(self.stop_token_ids),
                **{name: getattr(self, name) for name in _SAMPLING},
            )
        except ValueError as e:
            found = re.match(r"\w+", str(e))
            param = found[0] if found and found[0] in type(self).model_fields else None
            raise _refused(param, str(e)) from None
        return Job(self.model, self.prompts, params, self.echo, self.stream)


class Usage(BaseModel):
    """Token counts of a request, all its choices together."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int

    @classmethod
    def of(cls, prompt: int, completion: int) -> Self:
        """Both counts and their sum."""
        return cls(prompt_tokens=prompt, completion_tokens=completion, total_tokens=prompt + completion)


class Choice(BaseModel):
    """A completion, or in a stream what came new to it. Choice i belongs to prompt i // n."""

    index: int
    text: str
    logprobs: Logprobs | None = None
    finish_reason: str | None = None


class Completion(BaseModel):
    """A response, or a chunk of a stream. `system_fingerprint` is the exact model version that answers."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    system_fingerprint: str
    choices: list[Choice]
    usage: Usage | None = None


class ModelCard(BaseModel):
    """An entry of `GET /v1/models`: `root` is the exact version behind `id`, `metadata` what is known about it."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "llama_ray"
    root: str
    parent: str | None = None
    max_model_len: int
    metadata: dict[str, str | int | float | None]

    @classmethod
    def of(cls, info: ModelInfo) -> list[Self]:
        """A card for each name that the model can be asked for by."""
        names = ("version", "run_id", "validation_loss", "parameters", "device")
        return [
            cls(
                id=name,
                created=info.created,
                root=info.ref,
                max_model_len=info.max_model_len,
                metadata={name: getattr(info, name) for name in names},
            )
            for name in info.names
        ]


class ModelList(BaseModel):
    """The body of `GET /v1/models`."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class Health(BaseModel):
    """The body of `GET /health`."""

    status: Literal["ok", "busy"]


def validation_error(errors: Sequence[Mapping[str, Any]]) -> ApiError:
    """The 400 for what pydantic found wrong with a body, all of it in one line."""
    field = next((e["loc"][1] for e in errors if len(e["loc"]) > 1), None)
    return _refused(field if isinstance(field, str) else None, "; ".join(map(_message, errors)))


def _message(error: Mapping[str, Any]) -> str:
    where = ".".join(str(part) for part in error["loc"][1:] if part != "[key]")  # the first part is "body"
    if error["type"] == "json_invalid":
        return f"the body is not JSON: {error.get('ctx', {}).get('error', error['msg'])}"
    if not where:
        return "the body must be a JSON object, sent with Content-Type: application/json"
    if error["type"] == "extra_forbidden":
        return f"{where} is not a field that this server knows; leave it out"
    if error["type"] == "missing":
        return f"{where} is required"
    if error["type"] == "value_error":
        return f"{where} {error['ctx']['error']}"
    return f"{where}: {error['msg'][:1].lower()}{error['msg'][1:]}"


def _refused(param: str | None, message: str) -> ApiError:
    return ApiError(400, message, param=param)
