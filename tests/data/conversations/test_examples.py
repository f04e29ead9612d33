"""What of a conversation is learned, held against what a request builds of the same messages."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_ray.data.chat.template import ChatPrompt
from llama_ray.data.conversations.conversation import Conversation
from llama_ray.data.conversations.examples import Example, ExampleEncoder, Refusal
from llama_ray.data.conversations.formats import read_conversation
from llama_ray.data.tokenizing.tokenizer import Tokenizer
from serve_app.protocol.chat import ChatRequest
from tests.data.chat_templates import CHATML, TEMPLATES, tokenizer_with

NOW = "2024-07-26T00:00:00"
KINDS = ["byte_level", "byte_fallback", "metaspace"]
QUESTION = {"role": "user", "content": "Who are you, é?"}
TURNS = [
    {"role": "system", "content": "Be brief."},
    QUESTION,
    {"role": "assistant", "content": "I am 漢 🙂."},
    {"role": "user", "content": "And\n\nwhy?"},
    {"role": "assistant", "content": "Because of </s> and <|im_end|>."},
]


def conversation(messages: list[dict[str, Any]], **fields: Any) -> Conversation:
    return read_conversation({"messages": messages, **fields})


def encoded(tokenizer: Tokenizer, *messages: dict[str, Any]) -> list[Example]:
    [found] = ExampleEncoder(tokenizer, NOW).encode([conversation(list(messages))])
    assert not isinstance(found, Refusal), found
    return found


def refused(tokenizer: Tokenizer, *messages: dict[str, Any]) -> tuple[str, str]:
    [found] = ExampleEncoder(tokenizer, NOW).encode([conversation(list(messages))])
    assert isinstance(found, Refusal), found
    return found


def spans(example: Example) -> list[tuple[int, int]]:
    """Return where what is learned begins and ends."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], example.learned.astype(int), [0]])))
    return [(int(start), int(stop)) for start, stop in edges.reshape(-1, 2)]


def requested(tokenizer: Tokenizer, messages: list[dict[str, Any]]) -> list[int]:
    """Return the ids of the prompt that serving builds of a request with these messages."""
    request = ChatRequest.model_validate({"model": "m", "messages": messages})
    [prompt] = request.generation_request(None).prompts
    assert isinstance(prompt, ChatPrompt)
    return tokenizer.encode_chat(tokenizer.render_chat(replace(prompt, now=NOW)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_each_answer_follows_the_ids_of_a_request_and_ends_its_turn(
    tmp_path: Path, name: str, kind: str
) -> None:
    tokenizer = tokenizer_with(tmp_path, TEMPLATES[name], kind)
    [example] = encoded(tokenizer, *TURNS)
    found = spans(example)
    assert len(found) == 2
    for (start, stop), message in zip(found, (2, 4), strict=True):
        assert example.ids[:start].tolist() == requested(tokenizer, TURNS[:message])
        answer = tokenizer.decode(example.ids[start:stop].tolist(), skip_special=False)
        assert answer.strip().startswith(TURNS[message]["content"])
        assert int(example.ids[stop - 1]) in tokenizer.end_of_turn_ids()


def test_only_answers_of_weight_1_are_learned_and_what_follows_the_last_is_left_out(tmp_path: Path) -> None:
    tokenizer = tokenizer_with(tmp_path, CHATML)
    first, second = TURNS[2] | {"weight": 0}, TURNS[4] | {"weight": 1}
    [example] = encoded(tokenizer, *TURNS[:2], first, TURNS[3], second, QUESTION)
    [(start, stop)] = spans(example)
    assert example.ids[:start].tolist() == requested(tokenizer, TURNS[:4])
    # The line break after the end of the turn.
    assert stop == len(example.ids) - 1


ANSWERS = st.text(st.sampled_from("a \n\t<|/s>é漢"), min_size=1).filter(lambda text: bool(text.strip()))


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=40, deadline=None)
@given(st.lists(ANSWERS, min_size=2, max_size=4))
def test_each_answer_follows_the_ids_of_a_request_wherever_it_begins(
    tmp_path_factory: pytest.TempPathFactory, kind: str, contents: list[str]
) -> None:
    tokenizer = cached(tmp_path_factory, kind)
    messages = [
        {"role": role, "content": content}
        for content, role in zip(contents, ["user", "assistant"] * 2, strict=False)
    ]
    [found] = ExampleEncoder(tokenizer, NOW).encode([conversation(messages)])
    answers = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
    if isinstance(found, Refusal):
        # What a SentencePiece tokenizer encodes has no unique rest.
        assert kind != "byte_level"
        assert found.reason.startswith("an answer that begins within a token")
        return
    learned = [(example, span) for example in found for span in spans(example)]
    for message, (example, (start, stop)) in zip(answers, learned, strict=True):
        assert example.ids[:start].tolist() == requested(tokenizer, messages[:message])
        text = tokenizer.decode(example.ids[start:stop].tolist(), skip_special=False)
        assert text.removesuffix("<|im_end|>").strip(" ") == messages[message]["content"].strip(" ")


_CACHED: dict[str, Tokenizer] = {}


def cached(factory: pytest.TempPathFactory, kind: str) -> Tokenizer:
    if kind not in _CACHED:
        _CACHED[kind] = tokenizer_with(factory.mktemp("tokenizer"), CHATML, kind)
    return _CACHED[kind]
