"""Records as conversations, for the readers of all formats."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from llama_ray.data.conversations.formats import ConversationFormat, read_conversation


@dataclass(frozen=True)
class ConversationFields:
    """Takes the conversation of a record as its text: see `Fields` and `Conversation.to_json`."""

    form: ConversationFormat = "auto"

    @property
    def names(self) -> tuple[str, ...]:
        """See `Fields`."""
        return (
            "messages", "conversations", "prompt", "completion", "instruction", "input", "output", "system", "tools",
        )  # fmt: skip

    @property
    def required(self) -> bool:
        """See `Fields`."""
        return False

    def text_of(self, record: Mapping[str, object]) -> str:
        """See `Fields`."""
        return read_conversation(record, self.form).to_json()
