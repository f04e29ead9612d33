"""The fields that choose tokens, of every body that asks for text: OpenAI's, and those that vLLM adds."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import fields
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidatorFunctionWrapHandler,
    field_validator,
    model_validator,
)

from llama_ray.generation.sampling.params import (
    MAX_ALLOWED_TOKEN_IDS,
    MAX_LOGIT_BIAS,
    MAX_STOP_TOKEN_IDS,
    SamplingParams,
    token_id,
)
from serve_app.errors import bad_request

MAX_CHOICES = 128
"""Choices of one request: prompts times n."""
MAX_FIELDS = 100
"""Fields of an object of the API's own; more of them are a mistake, and naming each would take long."""
_NO_EFFECT = "Accepted for compatibility; has no effect."

# Fields that mean the same in a body and in SamplingParams. JSON has more forms of the other ones and no tuples, and
# each body has its own way to ask for a number of tokens and for log-probabilities.
_OTHERS = (
    "max_tokens",
    "top_k",
    "stop",
    "stop_token_ids",
    "allowed_token_ids",
    "bad_words",
    "logprobs",
    "prompt_logprobs",
    "prompt_logprobs_start",
    "prompt_logprobs_next",
    "json_schema",
)
_SHARED_FIELDS = tuple(f.name for f in fields(SamplingParams) if f.name not in _OTHERS)


def _at_most(limit: int) -> BeforeValidator:
    """Refuse a list or an object with more entries, before each of them is looked at."""

    def check(value: Any) -> Any:
        if isinstance(value, (list, Mapping)) and len(value) > limit:
            raise ValueError(f"has {len(value):,} entries; it must have at most {limit:,}")
        return value

    return BeforeValidator(check)


TokenId = Annotated[int, BeforeValidator(token_id)]
# One mistake of a list is enough, where there may be millions.
Texts = Annotated[list[str], Field(fail_fast=True)]
TokenIds = Annotated[list[int], Field(fail_fast=True)]
StopTokenIds = Annotated[TokenIds, _at_most(MAX_STOP_TOKEN_IDS)]
AllowedTokenIds = Annotated[TokenIds, _at_most(MAX_ALLOWED_TOKEN_IDS)]
LogitBias = Annotated[dict[TokenId, float], _at_most(MAX_LOGIT_BIAS)]


class StrictBody(BaseModel):
    """Refuses unknown fields, converts no types, and takes null for the default."""

    # No protected names: OpenAI's API may add fields called `model_...`.
    model_config = ConfigDict(extra="forbid", strict=True, protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _null_is_default(cls, data: Any) -> Any:
        if isinstance(data, Mapping) and len(data) > MAX_FIELDS:
            raise ValueError(f"the object has {len(data):,} fields; leave out those that are no parameters")
        return {k: v for k, v in data.items() if v is not None} if isinstance(data, Mapping) else data


class WithoutEffect(StrictBody):
    """Fields of OpenAI's API that clients send and that no parameter of sampling depends on."""

    user: Any = Field(
        None,
        description="Whom the request belongs to: requests of one user get answers of one model version, also while a "
        "canary answers a share of them. The header x-session-id goes first.",
    )
    safety_identifier: Any = Field(None, description=_NO_EFFECT)
    metadata: Any = Field(None, description=_NO_EFFECT)
    store: Any = Field(None, description=_NO_EFFECT)
    service_tier: Any = Field(None, description=_NO_EFFECT)
    prompt_cache_key: Any = Field(None, description=_NO_EFFECT)
    prompt_cache_retention: Any = Field(None, description=_NO_EFFECT)
    reasoning_effort: Any = Field(None, description=_NO_EFFECT)
    verbosity: Any = Field(None, description=_NO_EFFECT)
    parallel_tool_calls: Any = Field(None, description=_NO_EFFECT)


class StreamOptions(StrictBody):
    """Options of a stream."""

    include_usage: bool = Field(
        False, description="End the stream with a chunk that has no choices but the token counts."
    )
    continuous_usage_stats: bool = Field(False, description="Send the token counts so far with every chunk.")
    include_obfuscation: bool = Field(
        False, description="Accepted for compatibility; chunks are never padded with random characters."
    )


class JsonSchema(StrictBody):
    """A schema that the text keeps. Its name and description have no effect, and it is always enforced strictly."""

    name: Any = Field(None, description=_NO_EFFECT)
    description: Any = Field(None, description=_NO_EFFECT)
    schema_: dict[str, Any] | None = Field(None, alias="schema", description="By default any JSON object.")
    strict: bool = Field(True, description="Accepted for compatibility; a schema is always enforced.")


class ResponseFormat(StrictBody):
    """Which texts are allowed, as OpenAI's API has it."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = Field(
        None, description="Needed with the type json_schema, and only then."
    )

    def schema_of_text(self) -> dict[str, Any] | None:
        """Return the schema that the text keeps, if there is one. Raises ApiError (400)."""
        if (self.type == "json_schema") != (self.json_schema is not None):
            needs = "needs" if self.json_schema is None else "takes no"
            message = f"response_format.type is {self.type}, which {needs} response_format.json_schema"
            raise bad_request("response_format", message)
        if self.type == "text":
            return None
        schema = self.json_schema.schema_ if self.json_schema else None
        return {"type": "object"} if schema is None else schema


class SamplingFields(WithoutEffect):
    """How the tokens of a request are chosen, when its texts end, and how they are sent."""

    temperature: float = Field(
        1.0, description="0 always takes the most probable token; higher is more random."
    )
    top_p: float = Field(
        1.0, description="Sample from the most probable tokens whose probabilities add up to this."
    )
    n: int = Field(1, description="Completions of each prompt.")
    stream: bool = Field(False, description="Send the text as server-sent events, as it is generated.")
    stream_options: StreamOptions | None = None
    stop: str | Texts = Field([], description="Up to 16 strings; the text ends before the first of them.")
    response_format: ResponseFormat | None = Field(
        None, description="Limits the text to JSON, or to a schema."
    )
    seed: int | None = Field(None, description="The same request with the same seed gets the same tokens.")
    presence_penalty: float = Field(
        0.0, description="Lower the logits of tokens that the text contains already."
    )
    frequency_penalty: float = Field(
        0.0, description="Lower the logits of tokens for each time that they occurred."
    )
    logit_bias: LogitBias | None = Field(None, description="Token id -> what to add to its logit.")
    top_k: int = Field(0, description="Sample from this many most probable tokens; 0 or -1 keeps all.")
    min_p: float = Field(
        0.0, description="Sample from tokens at least this probable, relative to the most probable one."
    )
    repetition_penalty: float = Field(
        1.0, description="Above 1, tokens of the prompt and the text become less probable."
    )
    ignore_eos: bool = Field(False, description="Go on after an end-of-text token.")
    min_tokens: int = Field(0, description="Tokens to generate before the text may end.")
    stop_token_ids: StopTokenIds = Field([], description="End the text as an end-of-text token does.")
    include_stop_str_in_output: bool = Field(
        False, description="End the text after the stop string or the token of stop_token_ids, not before it."
    )
    allowed_token_ids: AllowedTokenIds | None = Field(
        None, description="Generate no other tokens than these."
    )
    bad_words: str | Texts = Field(
        [],
        description="Up to 128 strings: the tokens of one of them, at the beginning of a text or after a space, are "
        "never completed. Other tokens may spell it.",
    )
    json_schema: dict[str, Any] | None = Field(None, description="The text is JSON that this schema allows.")
    regex: str | None = Field(None, description="The whole text matches this expression (Rust's syntax).")

    @field_validator("stop", "bad_words", mode="wrap")
    @classmethod
    def _stop_is_text(cls, value: Any, handler: ValidatorFunctionWrapHandler) -> Any:
        return one_message(value, handler, "a string or a list of strings")

    @property
    def session(self) -> str | None:
        """What `user` says of whom the request belongs to."""
        return self.user if isinstance(self.user, str) and self.user else None

    def params(
        self, max_tokens: int, logprobs: int | None, prompt_logprobs: int | None = None
    ) -> SamplingParams:
        """Return how to sample. Raises ApiError (400) for values out of range, and fields that do not fit together."""
        if self.stream_options is not None and not self.stream:
            raise bad_request(
                "stream_options", "stream_options needs stream to be true; set it, or leave it out"
            )
        allowed = self.allowed_token_ids
        schema = self._schema()
        try:
            return SamplingParams(
                max_tokens=max_tokens,
                logprobs=logprobs,
                prompt_logprobs=prompt_logprobs,
                # vLLM's number for all tokens.
                top_k=0 if self.top_k == -1 else self.top_k,
                stop=_texts(self.stop),
                stop_token_ids=tuple(self.stop_token_ids),
                allowed_token_ids=None if allowed is None else tuple(allowed),
                bad_words=_texts(self.bad_words),
                json_schema=schema,
                **{name: getattr(self, name) for name in _SHARED_FIELDS},
            )
        except ValueError as error:
            # The message begins with the field's name.
            found = re.match(r"\w+", str(error))
            param = found[0] if found and found[0] in type(self).model_fields else None
            raise bad_request(param, str(error)) from None

    def _schema(self) -> dict[str, Any] | None:
        """Return the schema of the text, which can be asked for in two ways."""
        schema = self.response_format.schema_of_text() if self.response_format else None
        if schema is None:
            return self.json_schema
        for name in ("json_schema", "regex"):
            if getattr(self, name) is not None:
                raise bad_request(name, f"{name} and response_format both limit the text; give one of them")
        return schema


def _texts(value: str | list[str]) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else tuple(value)


def one_message(value: Any, handler: ValidatorFunctionWrapHandler, allowed: str) -> Any:
    """Validate a field that may have several types; `allowed` names them all in one message."""
    if isinstance(value, list) and len(value) > MAX_CHOICES and isinstance(value[0], (str, list)):
        # Looking at each of a million takes seconds.
        raise ValueError(f"has {len(value):,} entries; it must have at most {MAX_CHOICES}")
    # pydantic would list what is wrong with each alternative.
    try:
        return handler(value)
    except ValidationError:
        raise ValueError(f"must be {allowed}") from None


class PromptTokensDetails(BaseModel):
    """How many tokens of the prompts were not computed, because earlier requests had the same beginning."""

    cached_tokens: int


class Usage(BaseModel):
    """Token counts of a request, all its choices together."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails

    @classmethod
    def of(cls, prompt: int, completion: int, cached: int) -> Self:
        """Return the counts, of all tokens of prompts and answers and of those of prompts that were cached."""
        return cls(
            prompt_tokens=prompt,
            completion_tokens=completion,
            total_tokens=prompt + completion,
            prompt_tokens_details=PromptTokensDetails(cached_tokens=cached),
        )
