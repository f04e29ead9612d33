"""Token ids of a rendered conversation: special tokens where the template wrote them, and nowhere else."""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import tokenizers
from tokenizers import AddedToken

from llama_ray.data.chat.template import ChatPrompt, ChatTemplate

# Stand-ins are characters for private use; those that a message holds itself are protected, too.
_FIRST = 0xF0000
_STAND_INS = "[\U000f0000-\U0010ffff]"


@dataclass(frozen=True)
class ChatText:
    """A rendered conversation. In `marked` the special tokens that the template wrote have other names, which no
    message can know; `bos` says whether the tokenizer's own post-processor is to begin the prompt.
    """

    text: str
    marked: str
    bos: bool

    def __len__(self) -> int:
        return len(self.text)


class ChatEncoder:
    """Renders and encodes conversations for one tokenizer, given as the text of its `tokenizer.json`.

    A template writes its special tokens as text, between messages that may hold the same text. Only the former become
    special tokens: while the template runs, a private character stands for each special token in a message.
    """

    def __init__(self, tokenizer_json: str) -> None:
        self._backend = tokenizers.Tokenizer.from_str(tokenizer_json)
        self._backend.encode_special_tokens = True
        added = self._backend.get_added_tokens_decoder()
        special = {id: token for id, token in added.items() if token.special and token.content}
        nonce = secrets.token_hex(8)
        self._aliases = {token.content: f"\U0010fffd{nonce}:{id}\U0010fffd" for id, token in special.items()}
        self._backend.add_tokens([_alias(self._aliases[token.content], token) for token in special.values()])
        self._ids = {self._backend.token_to_id(self._aliases[t.content]): id for id, t in special.items()}
        # Of several at one place the longest, as in tokenizers.
        names = "|".join(map(re.escape, sorted(self._aliases, key=len, reverse=True)))
        self._special = re.compile(names or "(?!)")
        self._protected = re.compile(f"{names}|{_STAND_INS}" if names else _STAND_INS)

    def render(self, template: ChatTemplate, prompt: ChatPrompt) -> ChatText:
        """Return a conversation as text. Raises ValueError as `ChatTemplate.render` does."""
        found: dict[str, str] = {}
        messages = [self._protect(message, found) for message in prompt.messages]
        variables = self._protect(prompt.variables, found)
        text = template.render(replace(prompt, messages=messages, variables=variables))
        originals = {stand_in: original for original, stand_in in found.items()}
        marked = self._special.sub(lambda match: self._aliases[match[0]], text)
        return ChatText(_restored(text, originals), _restored(marked, originals), template.is_plain)

    def encode(self, text: ChatText) -> list[int]:
        """Return the token ids of a conversation."""
        [encoding] = self._backend.encode_batch_fast([text.marked], add_special_tokens=text.bos)
        return [self._ids.get(id, id) for id in encoding.ids]

    def _protect(self, value: Any, found: dict[str, str]) -> Any:
        """Return `value` with a stand-in for each special token in its texts; `found` has those that are in use."""
        if isinstance(value, str):
            return self._protected.sub(
                lambda match: found.setdefault(match[0], chr(_FIRST + len(found))), value
            )
        if isinstance(value, Mapping):
            return {key: self._protect(part, found) for key, part in value.items()}
        if isinstance(value, (list, tuple)):
            return [self._protect(part, found) for part in value]
        return value


def _alias(name: str, token: AddedToken) -> AddedToken:
    return AddedToken(
        name,
        single_word=token.single_word,
        lstrip=token.lstrip,
        rstrip=token.rstrip,
        # Some tokenizers find "</s>" only where they would put a space before it; what a template writes always counts.
        normalized=False,
        special=False,
    )


def _restored(text: str, originals: Mapping[str, str]) -> str:
    if not originals:
        return text
    return re.sub(_STAND_INS, lambda match: originals.get(match[0], match[0]), text)
