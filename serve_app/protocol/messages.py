"""The messages of a conversation, as clients send them and as templates see them."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import Field, ValidatorFunctionWrapHandler, field_validator

from llama_ray.data.chat.messages import template_message
from llama_ray.data.chat.template import ChatPrompt
from serve_app.errors import bad_request
from serve_app.protocol.sampling import StrictBody, one_message

DEFAULT_MAX_TOKENS = 2048
"""Tokens of an answer whose length the request does not limit, if the context leaves as many."""
_TEXT = "a string or a list of parts {type: text, text}; this model reads text only"


class TextPart(StrictBody):
    """A part of a message."""

    type: Literal["text", "input_text", "output_text"]
    text: str
    annotations: Any = Field(None, description="Accepted in messages that come back; has no effect.")
    logprobs: Any = Field(None, description="Accepted in messages that come back; has no effect.")


class Message(StrictBody):
    """A message of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[TextPart], Field(fail_fast=True)] = Field(
        "", description="Text, or parts of text, between which the template gets line breaks."
    )
    name: str | None = Field(None, description="Who speaks, for templates that tell it.")
    tool_calls: list[dict[str, Any]] | None = Field(
        None, description="What the assistant called, for templates that tell it."
    )
    tool_call_id: str | None = Field(None, description="Which call a tool answers.")
    refusal: Any = Field(None, description="Accepted in messages that come back; has no effect.")
    annotations: Any = Field(None, description="Accepted in messages that come back; has no effect.")
    reasoning_content: str | None = Field(None, description="For templates that tell it.")

    @field_validator("content", mode="wrap")
    @classmethod
    def _content_is_text(cls, value: Any, handler: ValidatorFunctionWrapHandler) -> Any:
        return one_message(value, handler, _TEXT)

    @property
    def for_template(self) -> dict[str, Any]:
        """The message as templates know it."""
        content = self.content
        return template_message(
            self.role,
            content if isinstance(content, str) else [part.text for part in content],
            name=self.name,
            tool_calls=self.tool_calls,
            tool_call_id=self.tool_call_id,
            reasoning_content=self.reasoning_content,
        )


Messages = Annotated[list[Message], Field(fail_fast=True, min_length=1)]


def chat_prompt(
    messages: Sequence[Message],
    *,
    begin_answer: bool = True,
    continue_final_message: bool = False,
    variables: dict[str, Any] | None = None,
) -> ChatPrompt:
    """Return the prompt of a conversation that is held now."""
    return ChatPrompt(
        [message.for_template for message in messages],
        add_generation_prompt=begin_answer,
        continue_final_message=continue_final_message,
        variables=variables or {},
        # Another replica, which goes on when the first is lost, writes the same date.
        now=datetime.now().isoformat(timespec="seconds"),
    )


def check_tools(tools: Sequence[Any], choice: Any) -> None:
    """Raise ApiError (400) for tools that the model should call."""
    if tools and choice != "none":
        raise bad_request(
            "tools",
            'tools are not supported; leave them out, or set tool_choice to "none": the model calls none',
        )
    if choice not in (None, "none", "auto"):
        raise bad_request("tool_choice", 'tool_choice must be "none" or "auto": the model calls no tools')
