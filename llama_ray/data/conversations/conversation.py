"""A conversation to learn from: its messages, and which of them are learned."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from llama_ray.data.records.fields import FieldError

Message = Mapping[str, Any]
"""A message of `template_message`, without what is None."""


@dataclass(frozen=True)
class Conversation:
    """Messages as templates see them; `trained` says of each whether it is learned, which only answers can be.

    `tools` are the descriptions of tools that templates tell the model of.
    """

    messages: Sequence[Message]
    trained: Sequence[bool]
    tools: Sequence[Any] | None = None

    def __post_init__(self) -> None:
        if len(self.messages) != len(self.trained):
            raise ValueError(
                f"trained has {len(self.trained)} entries; it must have {len(self.messages)}, one for each message"
            )

    def to_json(self) -> str:
        """Return the conversation as a text that equal ones share.

        Raises FieldError for a value that JSON does not have, which tables may hold in tools and calls.
        """
        content = {"messages": self.messages, "trained": self.trained, "tools": self.tools}
        return json.dumps(content, ensure_ascii=False, separators=(",", ":"), default=_refuse)

    @classmethod
    def from_json(cls, text: str) -> Conversation:
        """Rebuild what `to_json` wrote."""
        return cls(**json.loads(text))

    def transcript(self) -> str:
        """Return the conversation for people, a paragraph for each message."""
        return "\n\n".join(f"{message['role']}: {_shown(message)}" for message in self.messages)


def _refuse(value: object) -> NoReturn:
    raise FieldError("tools or calls with a value that JSON does not have", f"of type {type(value).__name__}")


def _shown(message: Message) -> str:
    parts = [message.get("reasoning_content"), message.get("content")]
    parts += [json.dumps(call, ensure_ascii=False) for call in message.get("tool_calls") or ()]
    return "\n".join(part for part in parts if part)
