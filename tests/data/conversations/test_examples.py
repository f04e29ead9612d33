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
from llama_ray.data.tokenizing.errors import TokenizerError
from llama_ray.data.tokenizing.tokenizer import Tokenizer
from serve_app.protocol.chat import ChatRequest
from tests.data.chat_templates import CHATML, LLAMA_3_1, TEMPLATES, tokenizer_with

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


def test_answers_that_begin_within_a_token_are_learned_after_the_prompts_of_requests(tmp_path: Path) -> None:
    tokenizer = tokenizer_with(tmp_path, CHATML, Tokenizer.train(iter(["x\n\ny"] * 9), 300))
    assert len(tokenizer.encode("\n\n")) == 1
    # After the line break of the prompt.
    answers = [TURNS[2] | {"content": f"\n{text}"} for text in ("one", "two")]
    messages = [QUESTION, answers[0], TURNS[3], answers[1]]
    examples = encoded(tokenizer, *messages)
    assert len(examples) == 2
    for number, (example, answer) in enumerate(zip(examples, answers, strict=True)):
        [(start, stop)] = spans(example)
        assert example.ids[:start].tolist() == requested(tokenizer, messages[: 2 * number + 1])
        text = tokenizer.decode(example.ids[start:stop].tolist(), skip_special=False)
        assert text == f"{answer['content']}<|im_end|>"
        assert stop == len(example.ids)


def test_tools_and_calls_go_to_the_template(tmp_path: Path) -> None:
    tokenizer = tokenizer_with(tmp_path, LLAMA_3_1)
    call = {"type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    messages = [
        QUESTION,
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "content": "3"},
        TURNS[2],
    ]
    [[example]] = ExampleEncoder(tokenizer, NOW).encode([conversation(messages, tools=[{"name": "add"}])])
    text = tokenizer.decode(example.ids.tolist(), skip_special=False)
    assert "Environment: ipython" in text
    assert "Today Date: 26 Jul 2024" in text
    called, answered = (
        tokenizer.decode(example.ids[a:b].tolist(), skip_special=False) for a, b in spans(example)
    )
    assert called == '{"name": "add", "parameters": {"a": 1}}<|eot_id|>'
    assert answered == "I am 漢 🙂.<|eot_id|>"


THINKING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and not loop.last %}"
    "{{ m.content.split('</think>')[-1] }}{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
BODY = "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
BEGIN = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
EACH = "{% for m in messages %}"


@pytest.mark.parametrize(
    ("template", "reason", "detail"),
    [
        (
            THINKING,
            "a conversation whose earlier turns the chat template rewrites",
            "message 2 from character 104 on is '<think>hm</think>I am A.' up to there, and "
            "'I am A.<|im_end|>\\n<|im_s' in the whole",
        ),
        (
            EACH + "{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}",
            "an answer to learn without a token that ends its turn",
            "message 2 ends with 'think>hm</think>I am A.\\n'",
        ),
        (
            EACH + BODY.replace("<|im_end|>", "") + "{% endfor %}" + BEGIN,
            "an answer to learn without a token that ends its turn",
            "message 2 ends with 'think>hm</think>I am A.\\n'",
        ),
        ("<s>{{ bos_token }}" + EACH + BODY + "{% endfor %}" + BEGIN, "two bos, one after the other", ""),
        (EACH + BODY + "{% endfor %}{{ raise_exception('no\nroles') }}", "messages that the chat template refuses",
         "messages cannot be rendered with the model's chat template: no roles"),
        (
            EACH + "{% if m.role == 'user' %}{% generation %}" + BODY + "{% endgeneration %}{% else %}" + BODY
            + "{% endif %}{% endfor %}" + BEGIN,
            "an answer that the chat template marks ({% generation %}) from elsewhere than the end of its prompt",
            "message 2",
        ),
        (
            EACH + BODY + "{% endfor %}{% generation %}{% endgeneration %}" + BEGIN,
            "answers that the chat template marks otherwise than messages",
            "1 times {% generation %} for 2 answers",
        ),
    ],
)  # fmt: skip
def test_a_mask_that_would_be_wrong_is_refused_with_its_place(
    tmp_path: Path, template: str, reason: str, detail: str
) -> None:
    tokenizer = tokenizer_with(tmp_path, template)
    answer = {"role": "assistant", "content": "<think>hm</think>I am A."}
    found = refused(tokenizer, TURNS[0], QUESTION, answer, QUESTION, answer)
    assert found[0].startswith(reason)
    assert found[1] == detail


def test_the_last_answer_alone_can_be_learned_where_earlier_turns_are_rewritten(tmp_path: Path) -> None:
    tokenizer = tokenizer_with(tmp_path, THINKING)
    first = {"role": "assistant", "content": "<think>hm</think>I am A.", "weight": 0}
    [example] = encoded(tokenizer, QUESTION, first, QUESTION, TURNS[4])
    [(start, _)] = spans(example)
    assert example.ids[:start].tolist() == requested(
        tokenizer, [QUESTION, {k: first[k] for k in ("role", "content")}, QUESTION]
    )


def test_what_the_template_marks_may_begin_with_the_prompt_and_end_before_the_turn(tmp_path: Path) -> None:
    marked = EACH + (
        "{% if m.role == 'assistant' %}{% generation %}<|im_start|>assistant\n{{ m.content }}<|im_end|>"
        "{% endgeneration %}<|eot_id|>{% else %}" + BODY + "{% endif %}{% endfor %}" + BEGIN
    )
    tokenizer = tokenizer_with(tmp_path, marked)
    [example] = encoded(tokenizer, *TURNS[:3])
    [(start, stop)] = spans(example)
    assert tokenizer.decode(example.ids[start:stop].tolist(), skip_special=False) == "I am 漢 🙂.<|im_end|>"


def test_a_tokenizer_without_a_template_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match="has no chat template; give one with --chat_template FILE"):
        ExampleEncoder(tokenizer_with(tmp_path, None), NOW)


def test_a_conversation_gives_the_same_example_in_any_company(tmp_path: Path) -> None:
    encoder = ExampleEncoder(tokenizer_with(tmp_path, CHATML), NOW)
    few = [
        conversation(TURNS[1:3]),
        conversation(TURNS),
        conversation([QUESTION | {"content": "x"}, TURNS[2]]),
    ]
    together = encoder.encode(few)
    alone = [encoder.encode([each])[0] for each in few]
    for first, second in zip(together, alone, strict=True):
        assert not isinstance(first, Refusal)
        assert not isinstance(second, Refusal)
        assert [(e.ids.tolist(), e.learned.tolist()) for e in first] == [
            (e.ids.tolist(), e.learned.tolist()) for e in second
        ]
