"""The forms in which people keep conversations, read into one."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, get_args

from llama_ray.data.chat.messages import template_message
from llama_ray.data.conversations.conversation import Conversation, Message
from llama_ray.data.records.fields import FieldError
from llama_ray.utils.errors import printable

ConversationFormat = Literal["auto", "messages", "prompt_completion", "alpaca", "sharegpt"]
Record = Mapping[str, object]

ROLES = ("system", "developer", "user", "assistant", "tool")
_SPEAKERS = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
}
"""Who speaks in ShareGPT's form -> the role."""
_PAIR = ("prompt", "completion")
_NO_FORM = (
    "no conversation: fields of none of the forms messages, prompt and completion, instruction and output, "
    "conversations"
)


def read_conversation(record: Record, form: ConversationFormat = "auto") -> Conversation:
    """Return the conversation of a record in this form, by default the one that its fields show.

    messages            [{"role", "content", "tool_calls", "weight", ...}, ...] as OpenAI has it, with `tools`
    prompt_completion   "prompt" and "completion", each a text or messages; only the completion is learned
    alpaca              "instruction", "input" (may be empty or missing) and "output", with "system"
    sharegpt            "conversations": [{"from": "human", "value"}, ...], with "system" and `tools`

    Every answer is learned but those of weight 0. Raises FieldError, with the message's number from 0 on where one is
    at fault.
    """
    present = {name: value for name, value in record.items() if value is not None}
    return _READERS[_form_of(present) if form == "auto" else form](present)


def read_messages(value: object, field: str) -> list[Message]:
    """Return messages in OpenAI's form, `weight` included, that are the `field` of a record. Raises FieldError."""
    if isinstance(value, str):
        # Tables keep them as JSON.
        value = _parsed(value, field)
    if not isinstance(value, Sequence) or not value:
        raise FieldError(f"field {printable(field)!r} is not a list of messages")
    return [_message(message, number) for number, message in enumerate(value)]


def read_turn(value: object, field: str, role: str) -> list[Message]:
    """Return the messages of a field that is a text, which `role` says, or messages. Raises FieldError."""
    if isinstance(value, str):
        return [_said(role, value)]
    return read_messages(value, field)


def read_system(record: Record) -> list[Message]:
    """Return the message of a record's "system" text; [] if it has none. Raises FieldError."""
    return [_said("system", text)] if "system" in record and (text := _text(record, "system")) else []


def read_tools(record: Record) -> Sequence[Any] | None:
    """Return the tools of a record, a list or its JSON; None if it has none. Raises FieldError."""
    tools = record.get("tools")
    if isinstance(tools, str):
        tools = _parsed(tools, "tools") if tools.strip() else None
    if not tools:
        return None
    if not isinstance(tools, Sequence):
        raise FieldError("field 'tools' is not a list")
    return tools


def _form_of(record: Record) -> str:
    if "messages" in record:
        return "messages"
    if "conversations" in record:
        return "sharegpt"
    if all(name in record for name in _PAIR):
        return "prompt_completion"
    if "instruction" in record and "output" in record:
        return "alpaca"
    raise FieldError(_NO_FORM)


def _messages(record: Record) -> Conversation:
    return conversation_of(read_messages(record.get("messages"), "messages"), read_tools(record))


def _prompt_completion(record: Record) -> Conversation:
    prompt = read_turn(record.get("prompt"), "prompt", "user")
    completion = read_turn(record.get("completion"), "completion", "assistant")
    # Answers in the prompt are what the completion follows.
    return conversation_of(
        [*({**message, "weight": 0} for message in prompt), *completion], read_tools(record)
    )


def _alpaca(record: Record) -> Conversation:
    instruction, output = _text(record, "instruction"), _text(record, "output")
    given = _text(record, "input") if "input" in record else ""
    messages = [
        *read_system(record),
        _said("user", f"{instruction}\n\n{given}" if given.strip() else instruction),
        _said("assistant", output),
    ]
    return conversation_of(messages, None)


def _sharegpt(record: Record) -> Conversation:
    turns = record.get("conversations")
    if isinstance(turns, str):
        turns = _parsed(turns, "conversations")
    if not isinstance(turns, Sequence) or not turns:
        raise FieldError("field 'conversations' is not a list of messages")
    return conversation_of(
        [*read_system(record), *(_turn(turn, number) for number, turn in enumerate(turns))],
        read_tools(record),
    )


_READERS: Mapping[str, Callable[[Record], Conversation]] = {
    "messages": _messages,
    "prompt_completion": _prompt_completion,
    "alpaca": _alpaca,
    "sharegpt": _sharegpt,
}
assert {"auto", *_READERS} == set(get_args(ConversationFormat))


def conversation_of(messages: Sequence[Message], tools: Sequence[Any] | None) -> Conversation:
    """Return the conversation of messages in OpenAI's form, of whose answers those of weight 0 are not learned.

    Raises FieldError where none is, and for one without text.
    """
    trained = [message["role"] == "assistant" and message.get("weight", 1) != 0 for message in messages]
    if not any(trained):
        raise FieldError("no answer to learn: no message of the assistant with another weight than 0")
    for number, (message, learned) in enumerate(zip(messages, trained, strict=True)):
        if learned and not (message.get("tool_calls") or str(message.get("content", "")).strip()):
            raise FieldError("an answer without text", f"message {number}")
    kept = [{name: value for name, value in message.items() if name != "weight"} for message in messages]
    return Conversation(kept, trained, tools)


def _message(message: object, number: int) -> Message:
    if not isinstance(message, Mapping) or not isinstance(role := message.get("role"), str):
        raise FieldError("a message without a role", f"message {number}")
    if role not in ROLES:
        raise FieldError(
            f"a message of another role than {', '.join(ROLES)}",
            f"message {number} is of {printable(role)!r}",
        )
    for field in ("name", "tool_call_id", "reasoning_content"):
        if not isinstance(message.get(field), str | None):
            raise FieldError(f"a message whose {field} is no text", f"message {number}")
    try:
        read = template_message(
            role,
            _content(message.get("content")),
            name=message.get("name"),
            tool_calls=message.get("tool_calls"),
            tool_call_id=message.get("tool_call_id"),
            reasoning_content=message.get("reasoning_content"),
        )
    except (TypeError, AttributeError) as error:
        raise FieldError("a message whose content is no text", f"message {number}") from error
    if (weight := message.get("weight", 1)) not in (0, 1, None):
        raise FieldError("a message whose weight is neither 0 nor 1", f"message {number}")
    kept = {name: value for name, value in read.items() if value is not None}
    return kept if weight is None else kept | {"weight": weight}


def _content(content: object) -> str | list[str]:
    """Return a text or the texts of parts, as requests have them. Raises TypeError for another content."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if isinstance(content, Sequence):
        texts = [part.get("text") if isinstance(part, Mapping) else None for part in content]
        if all(isinstance(text, str) for text in texts):
            return [str(text) for text in texts]
    raise TypeError


def _turn(turn: object, number: int) -> Message:
    """Return the message of a turn in ShareGPT's form, or in OpenAI's."""
    if isinstance(turn, Mapping) and "from" not in turn:
        return _message(turn, number)
    if not isinstance(turn, Mapping) or not isinstance(text := turn.get("value"), str):
        raise FieldError("a message without 'from' and 'value'", f"message {number}")
    role = _SPEAKERS.get(str(turn.get("from")))
    if role is None:
        raise FieldError(
            f"a message from somebody else than {', '.join(_SPEAKERS)}",
            f"message {number} is from {printable(str(turn.get('from')))!r}",
        )
    return _message({"role": role, "content": text, "weight": turn.get("weight", 1)}, number)


def _said(role: str, text: str) -> Message:
    return {"role": role, "content": text}


def _text(record: Record, name: str) -> str:
    value = record.get(name)
    if not isinstance(value, str):
        raise FieldError(f"field {name!r} is {'missing' if value is None else 'not text'}")
    return value


def _parsed(text: str, field: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FieldError(f"field {printable(field)!r} is text, and not JSON") from error
