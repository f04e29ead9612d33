"""The forms of conversations, and what is wrong with those that have none."""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from llama_ray.data.conversations.conversation import Conversation
from llama_ray.data.conversations.fields import ConversationFields
from llama_ray.data.conversations.formats import read_conversation
from llama_ray.data.records.fields import FieldError
from llama_ray.data.sources.left_out import Tally
from tests.data.records.helpers import pieces, taken

USER, ANSWER = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": None}}}
FORMS: dict[str, tuple[dict[str, Any], list[dict[str, Any]], list[bool]]] = {
    "messages": ({"messages": [USER, ANSWER], "id": 7}, [USER, ANSWER], [False, True]),
    "weights": (
        {"messages": [USER, ANSWER | {"weight": 0}, USER, ANSWER | {"weight": 1}]},
        [USER, ANSWER] * 2,
        [False, False, False, True],
    ),
    "parts": (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": t} for t in "ab"]}, ANSWER]},
        [{"role": "user", "content": "a\nb"}, ANSWER],
        [False, True],
    ),
    "tool calls": (
        {"messages": [USER, {"role": "assistant", "content": None, "tool_calls": [CALL]}]},
        [USER, {"role": "assistant", "tool_calls": [CALL]}],
        [False, True],
    ),
    "arguments as JSON": (
        {"messages": [USER, {"role": "assistant", "tool_calls": [
            {"type": "function", "function": {"name": "add", "arguments": '{"a": 1, "b": null}'}}
        ]}]},
        [USER, {"role": "assistant", "tool_calls": [CALL]}],
        [False, True],
    ),
    "prompt and completion": ({"prompt": "Hi", "completion": "Hello!"}, [USER, ANSWER], [False, True]),
    "messages in both": (
        {"prompt": [USER, ANSWER, USER], "completion": [ANSWER]},
        [USER, ANSWER] * 2,
        [False, False, False, True],
    ),
    "alpaca": ({"instruction": "Hi", "input": "", "output": "Hello!"}, [USER, ANSWER], [False, True]),
    "alpaca with input": (
        {"instruction": "Add", "input": "1 2", "output": "3", "system": "Be brief."},
        [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Add\n\n1 2"},
            {"role": "assistant", "content": "3"},
        ],
        [False, False, True],
    ),
    "sharegpt": (
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello!"}] * 2},
        [USER, ANSWER] * 2,
        [False, True] * 2,
    ),
    "fields that are null": (
        {"messages": None, "instruction": "Hi", "output": "Hello!", "input": None},
        [USER, ANSWER],
        [False, True],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FORMS)
def test_each_form_is_recognised(name: str) -> None:
    record, messages, trained = FORMS[name]
    found = read_conversation(record)
    assert (found.messages, found.trained) == (messages, trained)
    assert Conversation.from_json(found.to_json()) == found


def test_tools_are_kept_and_may_be_json() -> None:
    tools = [{"type": "function", "function": {"name": "add"}}]
    for given in (tools, json.dumps(tools)):
        assert read_conversation({"messages": [USER, ANSWER], "tools": given}).tools == tools


@pytest.mark.parametrize("value", [b"x", datetime.date(2024, 7, 26)])
def test_values_of_tables_that_json_does_not_have_make_a_bad_record(value: object) -> None:
    call = {"function": {"name": "add", "arguments": {"a": value}}}
    answer = {"role": "assistant", "tool_calls": [call]}
    for record in ({"messages": [USER, answer]}, {"messages": [USER, ANSWER], "tools": [call]}):
        with pytest.raises(FieldError, match="tools or calls with a value that JSON does not have"):
            ConversationFields().text_of(record)


@pytest.mark.parametrize(
    ("record", "reason", "detail"),
    [
        ({"text": "Hi"}, "no conversation: fields of none of the forms messages, ", ""),
        ({"messages": []}, "field 'messages' is not a list of messages", ""),
        ({"messages": "{"}, "field 'messages' is text, and not JSON", ""),
        ({"messages": [{"content": "x"}]}, "a message without a role", "message 0"),
        (
            {"messages": [USER, {"role": "bot", "content": "x"}]},
            "a message of another role than",
            "message 1 is of 'bot'",
        ),
        ({"messages": [{"role": "user", "content": 7}]}, "a message whose content is no text", "message 0"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "a message whose content", "message 0"),
        ({"messages": [USER, ANSWER | {"name": 7}]}, "a message whose name is no text", "message 1"),
        ({"messages": [USER, ANSWER | {"reasoning_content": {}}]}, "a message whose reasoning_content", "message 1"),
        ({"messages": [USER, ANSWER | {"weight": 0.5}]}, "a message whose weight is neither 0 nor 1", "message 1"),
        ({"messages": [USER, ANSWER | {"weight": 0}]}, "no answer to learn: ", ""),
        ({"messages": [USER]}, "no answer to learn: ", ""),
        ({"prompt": "Hi", "completion": " "}, "an answer without text", "message 1"),
        ({"instruction": "Hi", "output": 7}, "field 'output' is not text", ""),
        (
            {"conversations": [{"from": "cat", "value": "x"}]},
            "a message from somebody else than human, ",
            "message 0 is from 'cat'",
        ),
        ({"conversations": [{"from": "human"}]}, "a message without 'from' and 'value'", "message 0"),
    ],
)  # fmt: skip
def test_what_is_no_conversation_is_told(record: dict[str, Any], reason: str, detail: str) -> None:
    with pytest.raises(FieldError) as refused:
        read_conversation(record)
    assert refused.value.reason.startswith(reason)
    assert refused.value.detail == detail


def test_a_form_can_be_given() -> None:
    both = {"messages": [USER, ANSWER], "prompt": "x", "completion": "y"}
    assert read_conversation(both, "prompt_completion").messages[0]["content"] == "x"
    with pytest.raises(FieldError, match="field 'conversations' is not a list of messages"):
        read_conversation(both, "sharegpt")


def test_every_format_of_records_holds_conversations(tmp_path: Path) -> None:
    record = {"messages": [USER, {"role": "assistant", "tool_calls": [CALL]}], "number": 7}
    whole = json.dumps(record)
    (tmp_path / "a.jsonl").write_text(f"{whole}\n")
    (tmp_path / "b.json").write_text(f"[{whole}]")
    (tmp_path / "c.csv").write_text("prompt,completion,other\nHi,Hello!,x\n")
    # Arrow gives each message and call the fields of all.
    unlike = [record, {"messages": [USER, ANSWER | {"name": "bot"}], "number": 8}]
    parquet.write_table(pa.Table.from_pylist(unlike), tmp_path / "d.parquet")
    texts, lines = taken(tmp_path, ConversationFields())
    found = [Conversation.from_json(text) for text in texts]
    called = read_conversation(record)
    assert found[:2] == [called, called]
    assert found[2] == read_conversation({"prompt": "Hi", "completion": "Hello!"})
    # What is null there may have been missing.
    function = found[3].messages[1]["tool_calls"][0]["function"]
    assert function == {"name": "add", "arguments": {"a": 1}}
    assert found[4].messages[1] == ANSWER | {"name": "bot"}
    assert lines == []


def test_a_table_without_any_column_of_a_conversation_is_refused(tmp_path: Path) -> None:
    parquet.write_table(pa.table({"text": ["x"]}), tmp_path / "a.parquet")
    with pytest.raises(
        ValueError, match=r"a\.parquet has none of the columns messages, .*; its columns are 'text'"
    ):
        pieces(tmp_path, ConversationFields(), Tally())
