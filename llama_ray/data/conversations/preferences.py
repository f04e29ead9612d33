"""Pairs of answers to one prompt, of which people prefer the first, in the forms in which they are kept."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from llama_ray.data.conversations.conversation import Conversation, Message
from llama_ray.data.conversations.formats import (
    Record,
    conversation_of,
    read_messages,
    read_system,
    read_tools,
    read_turn,
)
from llama_ray.data.records.fields import FieldError

_OPENAI = ("input", "preferred_output", "non_preferred_output")
_TURN = re.compile(r"(?:\A|\n\n)(Human|Assistant):\s?")
_SPEAKERS = {"Human": "user", "Assistant": "assistant"}


@dataclass(frozen=True)
class Preference:
    """A conversation with the better answer, and the same one with the worse; only these answers are learned from."""

    chosen: Conversation
    rejected: Conversation

    def to_json(self) -> str:
        """Return the pair as a text that equal ones share."""
        return json.dumps([self.chosen.to_json(), self.rejected.to_json()], ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> Preference:
        """Rebuild what `to_json` wrote."""
        chosen, rejected = json.loads(text)
        return cls(Conversation.from_json(chosen), Conversation.from_json(rejected))

    def transcript(self) -> str:
        """Return the pair for people."""
        return f"{self.chosen.transcript()}\n\n--- rejected:\n\n{self.rejected.transcript()}"


@dataclass(frozen=True)
class PreferenceFields:
    """Takes the pair of a record as its text: see `Fields` and `Preference.to_json`."""

    @property
    def names(self) -> tuple[str, ...]:
        """See `Fields`."""
        return ("prompt", "chosen", "rejected", "system", "tools", *_OPENAI)

    @property
    def required(self) -> bool:
        """See `Fields`."""
        return False

    def text_of(self, record: Mapping[str, object]) -> str:
        """See `Fields`."""
        return read_preference(record).to_json()


def read_preference(record: Record) -> Preference:
    """Return the pair of a record in the form that its fields show.

    "prompt", "chosen", "rejected"    each a text or messages, as TRL has them; the answers may repeat the prompt
    "chosen", "rejected"              whole conversations, whose common beginning is the prompt: messages, or texts of
                                      Anthropic's form ("Human: ...", "Assistant: ...")
    "input": {"messages", "tools"}, "preferred_output", "non_preferred_output"   messages, as OpenAI has them

    A "system" text comes first. Raises FieldError.
    """
    present = {name: value for name, value in record.items() if value is not None}
    if all(name in present for name in _OPENAI):
        return _openai(present)
    if not ("chosen" in present and "rejected" in present):
        raise FieldError(
            "no pair of answers: neither fields chosen and rejected nor preferred_output and non_preferred_output"
        )
    system = read_system(present)
    if "prompt" not in present:
        chosen, rejected = (_whole(present[name], name) for name in ("chosen", "rejected"))
        return _split([*system, *chosen], [*system, *rejected], read_tools(present))
    prompt = [*system, *read_turn(present["prompt"], "prompt", "user")]
    answers = [read_turn(present[name], name, "assistant") for name in ("chosen", "rejected")]
    chosen, rejected = (_after(prompt, answer, system) for answer in answers)
    return _split(chosen, rejected, read_tools(present))


def _openai(record: Record) -> Preference:
    given = record["input"]
    if not isinstance(given, Mapping):
        raise FieldError("field 'input' is no object with messages")
    prompt = read_messages(given.get("messages"), "input.messages")
    chosen, rejected = (read_turn(record[name], name, "assistant") for name in _OPENAI[1:])
    return _split([*prompt, *chosen], [*prompt, *rejected], read_tools(given))


def _after(prompt: Sequence[Message], answer: Sequence[Message], system: Sequence[Message]) -> list[Message]:
    """Return the conversation in which `answer` follows `prompt`, which it may repeat."""
    if answer[0]["role"] in ("assistant", "tool"):
        return [*prompt, *answer]
    return [*system, *answer] if answer[0]["role"] != "system" else list(answer)


def _whole(value: object, field: str) -> list[Message]:
    """Return the messages of a field that holds a whole conversation."""
    if isinstance(value, str) and _TURN.search(value):
        before, *parts = _TURN.split(value)
        if before.strip():
            raise FieldError(f"field {field!r} has text before the first of its speakers")
        pairs = zip(parts[::2], parts[1::2], strict=True)
        return [{"role": _SPEAKERS[speaker], "content": text.strip()} for speaker, text in pairs]
    return read_messages(value, field)


def _split(chosen: Sequence[Message], rejected: Sequence[Message], tools: Sequence[Any] | None) -> Preference:
    """Return the pair of two conversations; their common beginning is the prompt."""
    same = len(list(takewhile(lambda pair: pair[0] == pair[1], zip(chosen, rejected, strict=False))))
    for messages, name in ((chosen, "chosen"), (rejected, "rejected")):
        if len(messages) == same:
            raise FieldError(f"a pair whose {name} answer is how the other one begins, or the same")
        if messages[same]["role"] != "assistant":
            raise FieldError("a pair whose prompts differ", f"message {same} of {name}")
        if same == 0:
            raise FieldError("a pair without a prompt")
    return Preference(*(_learned_from(messages, same, tools) for messages in (chosen, rejected)))


def _learned_from(messages: Sequence[Message], prompt: int, tools: Sequence[Any] | None) -> Conversation:
    weighted = [{**message, "weight": 0} for message in messages[:prompt]]
    answers = [
        {name: value for name, value in each.items() if name != "weight"} for each in messages[prompt:]
    ]
    return conversation_of([*weighted, *answers], tools)
