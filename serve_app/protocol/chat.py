"""Bodies of requests and responses of OpenAI's chat completions API."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field

from llama_ray.generation.sampling.params import MAX_LOGPROBS
from serve_app.errors import bad_request
from serve_app.protocol.generation import GenerationRequest
from serve_app.protocol.messages import DEFAULT_MAX_TOKENS, Messages, chat_prompt, check_tools
from serve_app.protocol.sampling import SamplingFields, Usage
from serve_app.streams.messages import Reporting

MaxTokens = Annotated[int, Field(ge=1)]


class ChatRequest(SamplingFields):
    """The body of `POST /v1/chat/completions`; `chat_template_kwargs` and the two fields before it are vLLM's."""

    model: str = Field(
        description="A name of GET /v1/models: NAME, NAME@ALIAS, models:/NAME/7 or NAME:ADAPTER."
    )
    messages: Messages = Field(description="The conversation that the model is to answer.")
    max_completion_tokens: MaxTokens | None = Field(
        None,
        description=f"Tokens to generate at most; by default what the context leaves, up to {DEFAULT_MAX_TOKENS}.",
    )
    max_tokens: MaxTokens | None = Field(None, description="The older name of max_completion_tokens.")
    logprobs: bool = Field(False, description="Also return the log-probability of each token.")
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = Field(
        None, description="With logprobs: also those of this many likeliest tokens."
    )
    tools: list[Any] = Field([], description='Accepted with tool_choice "none"; the model does not see them.')
    tool_choice: Any = Field(None, description='"none" or, without tools, "auto".')
    modalities: list[Literal["text"]] = Field(["text"], description="The model writes text.")
    add_generation_prompt: bool = Field(
        True, description="Begin an answer; without it, the model goes on after the last message."
    )
    continue_final_message: bool = Field(
        False, description="Go on with the last message; add_generation_prompt must be false."
    )
    chat_template_kwargs: dict[str, Any] = Field({}, description="Further variables of the chat template.")

    def generation_request(self, session: str | None) -> GenerationRequest:
        """Return what is asked of the model, for requests of a `session`.

        Raises ApiError (400) for values, of any field, out of range or not supported.
        """
        self._check()
        limit = self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
        prompt = chat_prompt(
            self.messages,
            begin_answer=self.add_generation_prompt,
            continue_final_message=self.continue_final_message,
            variables=self.chat_template_kwargs,
        )
        logprobs = (self.top_logprobs or 0) if self.logprobs else None
        params = self.params(DEFAULT_MAX_TOKENS if limit is None else limit, logprobs)
        names = Reporting(names="bytes")
        return GenerationRequest(self.model, [prompt], params, session, fit=limit is None, reporting=names)

    def _check(self) -> None:
        check_tools(self.tools, self.tool_choice)
        if self.top_logprobs is not None and not self.logprobs:
            raise bad_request(
                "top_logprobs", "top_logprobs needs logprobs to be true; set it, or leave it out"
            )
        if self.continue_final_message and self.add_generation_prompt:
            raise bad_request(
                "continue_final_message",
                "continue_final_message and add_generation_prompt are both true; set one of them to false",
            )


class TopLogprob(BaseModel):
    """A token that could have been next; `bytes` tell what one is that is only part of a character."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    """A token of an answer."""

    top_logprobs: list[TopLogprob]


class ChoiceLogprobs(BaseModel):
    """Log-probabilities of an answer."""

    content: list[TokenLogprob]
    refusal: None = None


class AnswerMessage(BaseModel):
    """What the model wrote."""

    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class ChatChoice(BaseModel):
    """An answer."""

    index: int
    message: AnswerMessage
    logprobs: ChoiceLogprobs | None = None
    finish_reason: str


class ChatResponse(BaseModel):
    """A response. `system_fingerprint` is the exact model version that answers."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: Usage | None = None


class MessageDelta(BaseModel):
    """What was added to an answer."""

    role: Literal["assistant"] | None = None
    content: str | None = None


class ChunkChoice(BaseModel):
    """What was added to a choice."""

    index: int
    delta: MessageDelta
    logprobs: ChoiceLogprobs | None = None
    finish_reason: str | None = None


class ChatChunk(BaseModel):
    """A chunk of a stream."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChunkChoice]
    usage: Usage | None = None
