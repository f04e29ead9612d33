"""How the messages of a conversation become the text that a model was tuned on."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from llama_ray.data.chat.process import TemplateProcess
from llama_ray.data.chat.rendering import Cut, Rendering

Message = Mapping[str, Any]
"""`role` and `content`, and whatever else the template reads."""

DEFAULT = "default"
PLAIN_STOP = ("\nSystem:", "\nUser:", "\nAssistant:", "\nTool:")
"""Where the answer to a plain transcript ends: the model goes on with somebody's next line."""
_PLAIN = (
    "{% for message in messages %}{{ message['role'] | capitalize }}: {{ message['content'] | trim }}\n{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)
# As transformers does it, so that templates which look at the end of a message give the same text.
_END_OF_PREFIX = "CONTINUE_FINAL_MESSAGE_TAG "
_PROBE = "probe"
_GENERATION = re.compile(r"\{%[-+]?\s*generation\b")


@dataclass(frozen=True)
class ChatPrompt:
    """A conversation that a model is to answer, rendered with its own template.

    `continue_final_message` has it go on with the last message, and excludes `add_generation_prompt`, which begins an
    answer. `variables` are further ones of the template, and `now` is the time that the template sees, in ISO format:
    whoever renders the prompt again, later or elsewhere, gets the same text.
    """

    messages: Sequence[Message]
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    template: str = DEFAULT
    variables: Mapping[str, Any] = field(default_factory=dict)
    now: str | None = None


class ChatTemplate:
    """The chat templates of a checkpoint, Jinja programs by name, or a plain transcript (`ChatTemplate.plain`).

    They see `messages`, `add_generation_prompt`, `tools` and `documents` (None unless they are among the prompt's
    variables) and `special_tokens` (`bos_token`, `eos_token`, ...), as in transformers. They run in a process of their
    own, with limits of time, memory and length, since they come from whoever made the checkpoint.
    """

    def __init__(self, templates: Mapping[str, str], special_tokens: Mapping[str, str] | None = None) -> None:
        self.templates = dict(templates)
        self.special_tokens = dict(special_tokens or {})
        self.is_plain = False
        self._process = TemplateProcess(self.templates)

    @classmethod
    def plain(cls) -> ChatTemplate:
        """Return the transcript for a model without a template: a line `User: ...` for each message."""
        template = cls({DEFAULT: _PLAIN})
        template.is_plain = True
        return template

    def __reduce__(self) -> tuple[Any, ...]:
        # The process stays where it is.
        return (
            (ChatTemplate.plain, ())
            if self.is_plain
            else (ChatTemplate, (self.templates, self.special_tokens))
        )

    def render(self, prompt: ChatPrompt) -> str:
        """Return the text of a conversation.

        Messages of the role `developer` are those of `system` for a template that does not know it. Raises ValueError
        for messages that the template refuses, or that there is no template for.
        """
        messages = self._messages(prompt)
        if not prompt.continue_final_message:
            return self._render(prompt, messages)
        if prompt.add_generation_prompt:
            raise ValueError(
                "continue_final_message and add_generation_prompt are both true; set one of them to false"
            )
        return self._render_prefix(prompt, messages)

    def render_cuts(
        self, prompts: Sequence[ChatPrompt], cuts: Sequence[Sequence[Cut]]
    ) -> list[list[str] | ValueError]:
        """Return the texts of each conversation at its `cuts`, or why it has none, as `render` raises it.

        All of them cost one exchange with the process of the templates.
        """
        renderings = [
            Rendering(prompt.template, self._variables(prompt, self._messages(prompt)), prompt.now, of)
            for prompt, of in zip(prompts, cuts, strict=True)
        ]
        found = self._process.render_all(renderings)
        return [_refusal(each) if isinstance(each, ValueError) else each for each in found]

    def marks_answers(self, name: str = DEFAULT) -> bool:
        """Return whether the template says itself, by `{% generation %}`, what the model writes."""
        return _GENERATION.search(self._source(name)) is not None

    def end_of_turn(self) -> str:
        """Return what the template writes after an answer; "" if it cannot tell."""
        messages = [{"role": "user", "content": _PROBE}, {"role": "assistant", "content": _PROBE}]
        try:
            text = self.render(ChatPrompt(messages, add_generation_prompt=False))
        except ValueError:
            return ""
        return text.rpartition(_PROBE)[2] if _PROBE in text else ""

    def _source(self, name: str) -> str:
        if name not in self.templates:
            raise ValueError(
                f"the chat template {name!r} is none of this model's; it has {', '.join(sorted(self.templates))}"
            )
        return self.templates[name]

    def _messages(self, prompt: ChatPrompt) -> list[dict[str, Any]]:
        """Return the messages as the template knows them."""
        if not prompt.messages:
            raise ValueError("messages is an empty list; give at least one message")
        # null means the same as a field that is missing, which templates know.
        messages = [{k: v for k, v in message.items() if v is not None} for message in prompt.messages]
        source = self._source(prompt.template)
        for message in messages:
            if message.get("role") == "developer" and "developer" not in source:
                message["role"] = "system"
        return messages

    def _variables(self, prompt: ChatPrompt, messages: Sequence[Message]) -> dict[str, Any]:
        return {
            "tools": None,
            "documents": None,
            **self.special_tokens,
            **prompt.variables,
            "messages": messages,
            "add_generation_prompt": prompt.add_generation_prompt,
        }

    def _render(self, prompt: ChatPrompt, messages: Sequence[Message]) -> str:
        now = None if prompt.now is None else datetime.fromisoformat(prompt.now)
        try:
            return self._process.render(prompt.template, self._variables(prompt, messages), now)
        except ValueError as error:
            raise _refusal(error) from error

    def _render_prefix(self, prompt: ChatPrompt, messages: list[dict[str, Any]]) -> str:
        """Return the text up to the end of the last message's content."""
        last = messages[-1].get("content")
        if not isinstance(last, str):
            raise ValueError(
                "continue_final_message is true and the last message has no text; give it one to go on with"
            )
        messages[-1]["content"] = last + _END_OF_PREFIX
        text = self._render(prompt, messages)
        end = text.rfind(_END_OF_PREFIX.strip())
        if end < 0 or last.strip() not in text:
            raise ValueError(
                "continue_final_message is true, and the model's chat template does not keep the last message as it is"
            )
        kept = text.startswith(_END_OF_PREFIX, end)
        # A template that trims the mark would have trimmed the message.
        return text[:end] if kept else text[:end].rstrip()


def _refusal(error: ValueError) -> ValueError:
    return ValueError(f"messages cannot be rendered with the model's chat template: {error}")
