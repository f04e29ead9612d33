"""Conversations to token ids, with the answers marked as what is to be learned.

Nothing is guessed from the look of a text. The prompt of an answer is the conversation before it, rendered as for a
request. It must be how the whole conversation begins, in characters and in tokens: then the answer is what follows, up
to the token that ends its turn, and training sees the ids that serving builds. Where the template says itself what the
model writes (`{% generation %}`), that must agree.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from llama_ray.data.chat.encoding import ChatText, ChatTokens
from llama_ray.data.chat.rendering import MARKS, Cut
from llama_ray.data.chat.template import ChatPrompt
from llama_ray.data.conversations.conversation import Conversation
from llama_ray.data.tokenizing.errors import TokenizerError
from llama_ray.data.tokenizing.tokenizer import Tokenizer
from llama_ray.utils.errors import printable

NO_TEMPLATE = "the tokenizer has no chat template; give one with --chat_template FILE"

_SHOWN_CHARACTERS = 24


class Example(NamedTuple):
    """The token ids of a conversation, and which of them are learned."""

    ids: NDArray[np.uint32]
    learned: NDArray[np.bool_]


class Refusal(NamedTuple):
    """Why a conversation is no example: a reason that others share, and what is wrong in this one."""

    reason: str
    detail: str = ""


class ExampleEncoder:
    """Encodes conversations with the chat template of a tokenizer; `now` is the time that the template sees (ISO)."""

    def __init__(self, tokenizer: Tokenizer, now: str) -> None:
        """Raise TokenizerError for a tokenizer without a chat template, or without a token that ends answers."""
        if tokenizer.chat_template is None:
            raise TokenizerError(NO_TEMPLATE)
        self.end_of_turn_ids = tokenizer.end_of_turn_ids()
        if not self.end_of_turn_ids:
            raise TokenizerError(
                "the chat template ends an answer with no special token, so the model would not learn to end; give "
                "another --chat_template"
            )
        self._tokenizer, self._template, self._now = tokenizer, tokenizer.chat_template, now
        self._encoder = tokenizer.chat_encoder
        self._marks = self._template.marks_answers()
        # What precedes an answer since the last special token is the same in most conversations.
        self._tail = lru_cache(maxsize=1024)(self._encode_tail)

    def encode(self, conversations: Sequence[Conversation]) -> list[list[Example] | Refusal]:
        """Return the examples of each conversation; it ends with its last answer to learn.

        There is one, but where an answer begins within a token of what stands before it (a line break after one): then
        the ids of the whole are not those that requests have, and each answer gets an example of its own.
        """
        rendered = self._encoder.render_cuts(
            self._template,
            [self._prompt(each) for each in conversations],
            [self._cuts(c) for c in conversations],
        )
        whole = [texts for texts in rendered if not isinstance(texts, ValueError)]
        tokens = iter(self._encoder.encode_marked([texts[-1].marked for texts in whole]))
        return [
            Refusal("messages that the chat template refuses", printable(str(texts), limit=200))
            if isinstance(texts, ValueError)
            else self._examples(conversation, texts, next(tokens))
            for conversation, texts in zip(conversations, rendered, strict=True)
        ]

    def _prompt(self, conversation: Conversation) -> ChatPrompt:
        variables = {} if conversation.tools is None else {"tools": conversation.tools}
        return ChatPrompt(conversation.messages, variables=variables, now=self._now)

    def _cuts(self, conversation: Conversation) -> list[Cut]:
        """Return where to render: before and after each answer to learn, the whole last, before it that with marks."""
        trained = _trained(conversation)
        cuts = [cut for i in trained for cut in (Cut(i, True), Cut(i + 1, False))]
        return [*cuts[:-1], *[Cut(trained[-1] + 1, False, True)] * self._marks, cuts[-1]]

    def _examples(
        self, conversation: Conversation, texts: Sequence[ChatText], tokens: ChatTokens
    ) -> list[Example] | Refusal:
        trained = _trained(conversation)
        *parts, whole = texts
        marked = parts.pop() if self._marks else None
        turns = []
        try:
            for n, message in enumerate(trained):
                prompt, turn = [*parts, whole][2 * n : 2 * n + 2]
                for part in (prompt, turn):
                    _check_prefix(part, whole, message)
                turns.append(_Turn(message, prompt.marked, turn.marked))
            if marked is not None:
                roles = [each["role"] for each in conversation.messages[: trained[-1] + 1]]
                turns = _as_marked(turns, roles, marked.marked, whole.marked)
            return self._learned(turns, whole.marked, tokens)
        except _RefusedError as error:
            return error.refusal

    def _learned(self, turns: Sequence[_Turn], whole: str, tokens: ChatTokens) -> list[Example]:
        specials = self._encoder.specials(whole)
        if len(specials) != len(tokens.specials):
            raise _RefusedError("special tokens of the template that the tokenizer does not find")
        learned = np.zeros(len(tokens.ids), np.bool_)
        ends = [self._end(turn, specials, tokens) for turn in turns]
        for turn, (_, end) in zip(turns, ends, strict=True):
            start = self._start(turn, specials, tokens)
            if start is None:
                return [
                    self._separate(turn, whole[:place], tokens.ids[:stop])
                    for turn, (place, stop) in zip(turns, ends, strict=True)
                ]
            learned[start:end] = True
        return [self._checked(tokens.ids, learned)]

    def _start(self, turn: _Turn, specials: Sequence[tuple[int, int]], tokens: ChatTokens) -> int | None:
        """Return the first token of an answer; None if it begins within one.

        Special tokens divide what is encoded, so only what follows the last one is encoded again.
        """
        before = sum(end <= len(turn.prompt) for _, end in specials)
        tail = turn.prompt[specials[before - 1][0] if before else 0 :]
        first = tokens.specials[before - 1] if before else 0
        ids = self._tail(tail)
        return first + len(ids) if tuple(tokens.ids[first : first + len(ids)]) == ids else None

    def _end(self, turn: _Turn, specials: Sequence[tuple[int, int]], tokens: ChatTokens) -> tuple[int, int]:
        """Return the character and the token after the token that ends a turn."""
        last = sum(end <= len(turn.text) for _, end in specials) - 1
        place = specials[last][1] if last >= 0 else 0
        if (
            place <= len(turn.prompt)
            or turn.text[place:].strip()
            or tokens.ids[tokens.specials[last]] not in self.end_of_turn_ids
        ):
            ending = self._encoder.unmarked(turn.text[len(turn.prompt) :])[-_SHOWN_CHARACTERS:]
            raise _RefusedError(
                "an answer to learn without a token that ends its turn", turn.message, f"ends with {ending!r}"
            )
        return place, tokens.specials[last] + 1

    def _separate(self, turn: _Turn, text: str, whole: Sequence[int]) -> Example:
        """Return an example of one answer, after its prompt as a request has it; `text` and `whole` end with it."""
        prompt, answer = self._encoder.encode_marked([turn.prompt, text[len(turn.prompt) :]])
        ids = [*prompt.ids, *answer.ids]
        decode = self._tokenizer.decode
        if decode(ids, skip_special=False) != decode(whole, skip_special=False):
            raise _RefusedError(
                "an answer that begins within a token; take away the white space at its beginning",
                turn.message,
            )
        return self._checked(ids, np.arange(len(ids)) >= len(prompt.ids))

    def _checked(self, ids: Sequence[int], learned: NDArray[np.bool_]) -> Example:
        bos = self._tokenizer.bos_id
        if bos is not None and any(pair == (bos, bos) for pair in pairwise(ids)):
            raise _RefusedError("two bos, one after the other; the chat template must write it once")
        if not learned.any():
            raise _RefusedError("no token to learn")
        return Example(np.array(ids, np.uint32), learned)

    def _encode_tail(self, tail: str) -> tuple[int, ...]:
        [tokens] = self._encoder.encode_marked([tail])
        return tuple(tokens.ids)


@dataclass(frozen=True)
class _Turn:
    """An answer to learn: its message's number, and the texts (of `ChatText.marked`) before it and up to its end."""

    message: int
    prompt: str
    text: str


class _RefusedError(Exception):
    def __init__(self, reason: str, message: int | None = None, detail: str = "") -> None:
        place = "" if message is None else f"message {message}"
        self.refusal = Refusal(reason, " ".join(filter(None, (place, detail))))


def _trained(conversation: Conversation) -> list[int]:
    return [number for number, trained in enumerate(conversation.trained) if trained]


def _check_prefix(part: ChatText, whole: ChatText, message: int) -> None:
    """Refuse a conversation that does not begin as its prompt for `message` does, or as what was up to its answer."""
    if whole.marked.startswith(part.marked):
        return
    place = next(
        (place for place, (a, b) in enumerate(zip(part.text, whole.text, strict=False)) if a != b),
        min(len(part.text), len(whole.text)),
    )
    alone, later = (text.text[place : place + _SHOWN_CHARACTERS] for text in (part, whole))
    raise _RefusedError(
        "a conversation whose earlier turns the chat template rewrites; give another --chat_template, or learn its "
        "last answer only (weight 0 for others)",
        message,
        f"from character {place} on is {alone!r} up to there, and {later!r} in the whole",
    )


def _as_marked(turns: Sequence[_Turn], roles: Sequence[object], marked: str, whole: str) -> list[_Turn]:
    """Return the answers to learn with the ends that the template marks."""
    found: list[tuple[int, int]] = []
    removed = 0
    begin, end = MARKS
    for place, character in enumerate(marked):
        if character == begin:
            found.append((place - removed, len(whole)))
            removed += 1
        elif character == end:
            found[-1] = (found[-1][0], place - removed)
            removed += 1
    answers = [number for number, role in enumerate(roles) if role == "assistant"]
    if len(found) != len(answers) or marked.translate({ord(begin): None, ord(end): None}) != whole:
        raise _RefusedError(
            "answers that the chat template marks otherwise than messages",
            detail=f"{len(found)} times {{% generation %}} for {len(answers)} answers",
        )
    by_message = dict(zip(answers, found, strict=True))
    ended = []
    for turn in turns:
        start, stop = by_message[turn.message]
        if not start <= len(turn.prompt) < stop <= len(turn.text):
            raise _RefusedError(
                "an answer that the chat template marks ({% generation %}) from elsewhere than the end of its prompt",
                turn.message,
            )
        ended.append(_Turn(turn.message, turn.prompt, whole[:stop]))
    return ended
