"""Token ids of a rendered conversation: special tokens where the template wrote them, and nowhere else."""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import tokenizers
from tokenizers import AddedToken

from llama_ray.data.chat.rendering import Cut
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


class ChatTokens(NamedTuple):
    """The token ids of a conversation, and at which places the special tokens that the template wrote stand."""

    ids: list[int]
    specials: list[int]


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
        self._names = {alias: name for name, alias in self._aliases.items()}
        self._aliased = re.compile(f"\U0010fffd{nonce}:[0-9]+\U0010fffd")
        # Of several at one place the longest, as in tokenizers.
        names = "|".join(map(re.escape, sorted(self._aliases, key=len, reverse=True)))
        self._special = re.compile(names or "(?!)")
        self._protected = re.compile(f"{names}|{_STAND_INS}" if names else _STAND_INS)

    def render(self, template: ChatTemplate, prompt: ChatPrompt) -> ChatText:
        """Return a conversation as text. Raises ValueError as `ChatTemplate.render` does."""
        protected, originals = self._protected_prompt(prompt)
        return self._text(template.render(protected), originals, template)

    def render_cuts(
        self, template: ChatTemplate, prompts: Sequence[ChatPrompt], cuts: Sequence[Sequence[Cut]]
    ) -> list[list[ChatText] | ValueError]:
        """Return each conversation at its cuts, see `ChatTemplate.render_cuts`."""
        protected = [self._protected_prompt(prompt) for prompt in prompts]
        found = template.render_cuts([prompt for prompt, _ in protected], cuts)
        return [
            texts
            if isinstance(texts, ValueError)
            else [self._text(text, originals, template) for text in texts]
            for (_, originals), texts in zip(protected, found, strict=True)
        ]

    def encode(self, text: ChatText) -> list[int]:
        """Return the token ids of a conversation."""
        [tokens] = self.encode_marked([text.marked], add_special_tokens=text.bos)
        return tokens.ids

    def encode_marked(self, texts: Sequence[str], add_special_tokens: bool = False) -> list[ChatTokens]:
        """Return the tokens of texts that are those of `ChatText.marked`, or parts of them."""
        encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=add_special_tokens)
        return [
            ChatTokens(
                [self._ids.get(id, id) for id in encoding.ids],
                [place for place, id in enumerate(encoding.ids) if id in self._ids],
            )
            for encoding in encodings
        ]

    def specials(self, marked: str) -> list[tuple[int, int]]:
        """Return where the special tokens that the template wrote stand in a `ChatText.marked`: begins and ends."""
        return [match.span() for match in self._aliased.finditer(marked)]

    def unmarked(self, marked: str) -> str:
        """Return a part of a `ChatText.marked` as its template wrote it."""
        return self._aliased.sub(lambda match: self._names[match[0]], marked)

    def _text(self, text: str, originals: Mapping[str, str], template: ChatTemplate) -> ChatText:
        marked = self._special.sub(lambda match: self._aliases[match[0]], text)
        return ChatText(_restored(text, originals), _restored(marked, originals), template.is_plain)

    def _protected_prompt(self, prompt: ChatPrompt) -> tuple[ChatPrompt, dict[str, str]]:
        """Return the prompt with stand-ins in its texts, and stand-in -> what it stands for."""
        found: dict[str, str] = {}
        messages = [self._protect(message, found) for message in prompt.messages]
        variables = self._protect(prompt.variables, found)
        originals = {stand_in: original for original, stand_in in found.items()}
        return replace(prompt, messages=messages, variables=variables), originals

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
