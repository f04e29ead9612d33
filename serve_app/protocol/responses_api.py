"""Bodies of requests and responses of OpenAI's Responses API: text in, text out."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, Field, ValidatorFunctionWrapHandler, field_validator

from llama_ray.generation.sampling.params import MAX_LOGPROBS
from serve_app.errors import bad_request
from serve_app.protocol.chat import MaxTokens, TokenLogprob
from serve_app.protocol.generation import GenerationRequest
from serve_app.protocol.messages import DEFAULT_MAX_TOKENS, Message, chat_prompt, check_tools
from serve_app.protocol.sampling import (
    PromptTokensDetails,
    ResponseFormat,
    SamplingFields,
    StrictBody,
    Usage,
    one_message,
)
from serve_app.streams.messages import Reporting

LOGPROBS = "message.output_text.logprobs"
"""What `include` has to ask for log-probabilities."""
_NO_EFFECT = "Accepted for compatibility; has no effect."


class InputMessage(Message):
    """A message of the conversation, also one of an earlier response."""

    type: Literal["message"] = "message"
    id: Any = Field(None, description=_NO_EFFECT)
    status: Any = Field(None, description=_NO_EFFECT)
    phase: Any = Field(None, description=_NO_EFFECT)


class TextFormat(StrictBody):
    """What the text is: any text, a JSON object, or JSON of a schema, whose fields stand beside its type."""

    type: Literal["text", "json_object", "json_schema"] = "text"
    name: Any = Field(None, description=_NO_EFFECT)
    description: Any = Field(None, description=_NO_EFFECT)
    strict: Any = Field(None, description="Accepted for compatibility; a schema is always enforced.")
    schema_: dict[str, Any] | None = Field(
        None, alias="schema", description="Needed with the type json_schema."
    )

    @property
    def as_response_format(self) -> ResponseFormat:
        """The same as chat completions have it."""
        schema = {"json_schema": {"schema": self.schema_}} if self.type == "json_schema" else {}
        return ResponseFormat.model_validate({"type": self.type, **schema})


class TextOptions(StrictBody):
    """What the text is to be like."""

    format: TextFormat | None = None
    verbosity: Any = Field(None, description=_NO_EFFECT)


class ResponsesRequest(SamplingFields):
    """The body of `POST /v1/responses`. It is translated to a chat completion; nothing is stored."""

    model: str = Field(
        description="A name of GET /v1/models: NAME, NAME@ALIAS, models:/NAME/7 or NAME:ADAPTER."
    )
    input: str | Annotated[list[InputMessage], Field(fail_fast=True, min_length=1)] = Field(
        description="What the user says, or the messages of a conversation."
    )
    instructions: str | None = Field(None, description="A system message before the input.")
    max_output_tokens: MaxTokens | None = Field(
        None,
        description=f"Tokens to generate at most; by default what the context leaves, up to {DEFAULT_MAX_TOKENS}.",
    )
    text: TextOptions | None = None
    include: list[str] = Field(
        [], description=f"{LOGPROBS} asks for log-probabilities; others have no effect."
    )
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] = Field(
        0, description="With log-probabilities: also those of this many likeliest tokens."
    )
    tools: list[Any] = Field([], description='Accepted with tool_choice "none"; the model does not see them.')
    tool_choice: Any = Field(None, description='"none" or, without tools, "auto".')
    reasoning: Any = Field(None, description=_NO_EFFECT)
    max_tool_calls: Any = Field(None, description=_NO_EFFECT)
    background: bool = Field(False, description="Not supported, except false.")
    truncation: str = Field("disabled", description='Not supported, except "disabled".')
    previous_response_id: Any = Field(None, description="Not supported: responses are not stored.")
    conversation: Any = Field(None, description="Not supported: conversations are not stored.")

    @field_validator("input", mode="wrap")
    @classmethod
    def _input_is_text_or_messages(cls, value: Any, handler: ValidatorFunctionWrapHandler) -> Any:
        allowed = (
            "a string or a list of messages {role, content}, whose content is text; this model calls no tools"
        )
        return one_message(value, handler, allowed)

    @property
    def format(self) -> TextFormat | None:
        """What the text is; None for any text."""
        return None if self.text is None else self.text.format

    def generation_request(self, session: str | None) -> GenerationRequest:
        """Return what is asked of the model, for requests of a `session`. Raises ApiError (400) as `params` does, and
        for what is not supported.
        """
        self._check()
        logprobs = self.top_logprobs if LOGPROBS in self.include else None
        limit = self.max_output_tokens
        asked = self.model_copy(update={"response_format": self.format and self.format.as_response_format})
        return GenerationRequest(
            self.model,
            [chat_prompt(self._messages())],
            asked.params(DEFAULT_MAX_TOKENS if limit is None else limit, logprobs),
            session,
            fit=limit is None,
            reporting=Reporting(names="bytes"),
        )

    def _messages(self) -> list[Message]:
        given: list[Message] = (
            [_message("user", self.input)] if isinstance(self.input, str) else [*self.input]
        )
        return given if self.instructions is None else [_message("system", self.instructions), *given]

    def _check(self) -> None:
        check_tools(self.tools, self.tool_choice)
        for name in ("previous_response_id", "conversation"):
            if getattr(self, name) is not None:
                raise bad_request(
                    name,
                    f"{name} is not supported: nothing is stored here; send the whole conversation as input",
                )
        if self.background:
            raise bad_request(
                "background", "background is not supported; leave it out and keep the connection open"
            )
        if self.truncation != "disabled":
            raise bad_request(
                "truncation", "truncation is not supported; shorten the input where it is too long"
            )
        if self.n != 1:
            raise bad_request("n", "n is not supported here; send several requests")
        if self.response_format is not None:
            raise bad_request("response_format", "response_format is called text.format here")


def _message(role: str, text: str) -> Message:
    return Message.model_validate({"role": role, "content": text})


class OutputText(BaseModel):
    """The text of an answer."""

    type: Literal["output_text"] = "output_text"
    text: str
    annotations: list[Any] = []
    logprobs: list[TokenLogprob] = []


class OutputMessage(BaseModel):
    """An answer."""

    id: str
    type: Literal["message"] = "message"
    role: Literal["assistant"] = "assistant"
    status: Literal["in_progress", "completed", "incomplete"]
    content: list[OutputText]


class OutputTokensDetails(BaseModel):
    """How many tokens of the answer are not shown."""

    reasoning_tokens: int = 0


class InputTokensDetails(PromptTokensDetails):
    """How many tokens of the input were not computed, because earlier requests had the same beginning."""

    cache_write_tokens: int = 0


class ResponsesUsage(BaseModel):
    """Token counts of a response."""

    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails = OutputTokensDetails()
    total_tokens: int

    @classmethod
    def of(cls, usage: Usage) -> Self:
        """Return the same counts under this API's names."""
        return cls(
            input_tokens=usage.prompt_tokens,
            input_tokens_details=InputTokensDetails(cached_tokens=usage.prompt_tokens_details.cached_tokens),
            output_tokens=usage.completion_tokens,
            total_tokens=usage.total_tokens,
        )


class IncompleteDetails(BaseModel):
    """Why a response is incomplete."""

    reason: str


class FailureDetails(BaseModel):
    """Why a response failed."""

    code: str
    message: str


class ResponsesResponse(BaseModel):
    """A response. `system_fingerprint` is the exact model version that answers."""

    id: str
    object: Literal["response"] = "response"
    created_at: int
    status: Literal["in_progress", "completed", "incomplete", "failed"]
    error: FailureDetails | None = None
    incomplete_details: IncompleteDetails | None = None
    instructions: str | None
    max_output_tokens: int | None
    metadata: dict[str, Any] = {}
    model: str
    system_fingerprint: str
    output: list[OutputMessage] = []
    parallel_tool_calls: bool = False
    previous_response_id: None = None
    store: bool = False
    temperature: float
    text: dict[str, Any]
    tool_choice: Literal["none"] = "none"
    tools: list[Any] = []
    top_p: float
    truncation: Literal["disabled"] = "disabled"
    usage: ResponsesUsage | None = None
    user: str | None

    @classmethod
    def begun(cls, request: ResponsesRequest, id: str, created_at: int, ref: str) -> Self:
        """Return the response to a request that the version `ref` has taken."""
        asked = request.format
        format = {"type": "text"} if asked is None else asked.model_dump(by_alias=True, exclude_none=True)
        return cls(
            id=id,
            created_at=created_at,
            status="in_progress",
            instructions=request.instructions,
            max_output_tokens=request.max_output_tokens,
            metadata=request.metadata if isinstance(request.metadata, dict) else {},
            model=request.model,
            system_fingerprint=ref,
            temperature=request.temperature,
            text={"format": format},
            top_p=request.top_p,
            user=request.session,
        )
