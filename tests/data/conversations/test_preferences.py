"""Pairs of answers: the forms in which people keep them, and what becomes of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from llama_ray.data.conversations.examples import Example, Refusal
from llama_ray.data.conversations.pairs import units_of_pair
from llama_ray.data.conversations.preferences import Preference, read_preference
from llama_ray.data.records.fields import FieldError


def said(role: str, content: str) -> dict[str, Any]:
    return {"role": role, "content": content}


ASKED, BETTER, WORSE = said("user", "Who?"), said("assistant", "Ada."), said("assistant", "No idea.")
SYSTEM = said("system", "Be brief.")

FORMS: dict[str, dict[str, Any]] = {
    "texts": {"prompt": "Who?", "chosen": "Ada.", "rejected": "No idea."},
    "messages": {"prompt": [ASKED], "chosen": [BETTER], "rejected": [WORSE]},
    "a text and messages": {"prompt": "Who?", "chosen": [BETTER], "rejected": [WORSE]},
    "answers that repeat the prompt": {
        "prompt": "Who?", "chosen": [ASKED, BETTER], "rejected": [ASKED, WORSE], "score_chosen": 8.0,
    },
    "whole conversations": {"chosen": [ASKED, BETTER], "rejected": [ASKED, WORSE]},
    "Anthropic's texts": {
        "chosen": "\n\nHuman: Who?\n\nAssistant: Ada.", "rejected": "\n\nHuman: Who?\n\nAssistant: No idea.",
    },
    "OpenAI's": {
        "input": {"messages": [ASKED]}, "preferred_output": [BETTER], "non_preferred_output": [WORSE],
    },
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_all_forms_say_the_same(form: str) -> None:
    pair = read_preference(FORMS[form])
    assert pair.chosen.messages == [ASKED, BETTER]
    assert pair.rejected.messages == [ASKED, WORSE]
    assert pair.chosen.trained == pair.rejected.trained == [False, True]
    assert Preference.from_json(pair.to_json()) == pair
    assert "--- rejected:\n\nuser: Who?\n\nassistant: No idea." in pair.transcript()


@pytest.mark.parametrize(
    "form", ["texts", "messages", "answers that repeat the prompt", "whole conversations"]
)
def test_a_system_text_comes_first(form: str) -> None:
    pair = read_preference(FORMS[form] | {"system": "Be brief."})
    assert pair.rejected.messages == [SYSTEM, ASKED, WORSE]
    assert pair.rejected.trained == [False, False, True]


def test_only_what_follows_the_common_beginning_is_learned() -> None:
    before = [ASKED, BETTER, said("user", "When?")]
    pair = read_preference(
        {"chosen": [*before, said("assistant", "1843.")], "rejected": [*before, said("assistant", "1943.")]}
    )
    assert pair.chosen.trained == [False, False, False, True]


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"prompt": "Who?", "completion": "Ada."}, "no pair of answers"),
        ({"prompt": "Who?", "chosen": "Ada.", "rejected": None}, "no pair of answers"),
        ({"prompt": "Who?", "chosen": "Ada.", "rejected": "Ada."}, "or the same"),
        ({"chosen": [ASKED, BETTER], "rejected": [ASKED]}, "is how the other one begins"),
        ({"chosen": [ASKED, BETTER], "rejected": [said("user", "Why?"), WORSE]}, "a pair whose prompts differ"),
        ({"chosen": [BETTER], "rejected": [WORSE]}, "a pair without a prompt"),
        ({"prompt": "Who?", "chosen": "", "rejected": "Ada."}, "an answer without text"),
        ({"chosen": "Ada.", "rejected": "No."}, "is text, and not JSON"),
        (
            {"chosen": "Be kind.\n\nHuman: Who?\n\nAssistant: Ada.", "rejected": "\n\nHuman: Who?\n\nAssistant: No."},
            "field 'chosen' has text before the first of its speakers",
        ),
        ({"system": 7, "prompt": "Who?", "chosen": "Ada.", "rejected": "No."}, "field 'system' is not text"),
        ({"input": "Who?", "preferred_output": [BETTER], "non_preferred_output": [WORSE]}, "no object"),
    ],
)  # fmt: skip
def test_what_is_no_pair_is_refused_with_the_reason(record: dict[str, Any], reason: str) -> None:
    with pytest.raises(FieldError, match=reason):
        read_preference(record)


def example(*ids: int, prompt: int) -> Example:
    return Example(np.array(ids, np.uint32), np.arange(len(ids)) >= prompt)


def test_a_pair_becomes_neighbours_in_a_row() -> None:
    chosen, rejected = example(1, 2, 3, prompt=2), example(1, 2, 4, 5, prompt=2)
    assert units_of_pair([[chosen], [rejected]]) == [[chosen, rejected]]


@pytest.mark.parametrize(
    ("chosen", "rejected", "reason"),
    [
        ([example(1, 2, 3, prompt=2)], [example(1, 7, 3, prompt=2)], "whose prompt has other tokens"),
        ([example(1, 2, prompt=1)], [example(1, 2, prompt=1)], "have the same tokens"),
        ([example(1, 2, prompt=1)] * 2, [example(1, 3, prompt=1)], "several turns"),
        (Refusal("no token to learn"), [example(1, 3, prompt=1)], "no token to learn"),
    ],
)
def test_tokens_that_are_no_pair_are_refused(chosen: Any, rejected: Any, reason: str) -> None:
    refusal = units_of_pair([chosen, rejected])
    assert isinstance(refusal, Refusal)
    assert reason in refusal.reason
