"""A message of a conversation as templates see it: the same for requests and for training."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any


def template_message(
    role: str,
    content: str | Sequence[str],
    *,
    name: str | None = None,
    tool_calls: Sequence[Mapping[str, Any]] | None = None,
    tool_call_id: str | None = None,
    reasoning_content: str | None = None,
) -> dict[str, Any]:
    """Return a message for `ChatPrompt.messages`; `content` is its text, or parts, which line breaks join.

    A message that only calls tools has no content. The arguments of a call become an object.
    """
    text = content if isinstance(content, str) else "\n".join(content)
    return {
        "role": role,
        "content": text if text or not tool_calls else None,
        "name": name,
        "tool_calls": tool_calls and [_parsed(call) for call in tool_calls],
        "tool_call_id": tool_call_id,
        "reasoning_content": reasoning_content,
    }


def _parsed(call: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a call whose arguments are an object: clients send them as JSON, and templates write them so."""
    function = call.get("function")
    if not isinstance(function, Mapping) or not isinstance(arguments := function.get("arguments"), str):
        return call
    try:
        return {**call, "function": {**function, "arguments": json.loads(arguments)}}
    except ValueError:
        return call
