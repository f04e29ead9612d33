from __future__ import annotations

import json
from pathlib import Path

import pytest

from llama_ray.data.records.fields import WAY_OUT, TextFields, TextFieldsError
from tests.data.records.helpers import found, taken, texts


def test_dots_lead_into_nested_objects(tmp_path: Path) -> None:
    record = {"a": {"b": {"c": "deep"}, "text": "in a"}, "a.b": "one name", "text": "top"}
    (tmp_path / "a.jsonl").write_text(json.dumps(record))
    for field, text in {"text": "top", "a.text": "in a", "a.b.c": "deep", "a.b": "one name"}.items():
        assert texts(tmp_path, TextFields(field)) == [text]
    assert taken(tmp_path, TextFields("a.b.c.d"))[1] == [
        f"left out 1 record (a.jsonl:1): no field 'a.b.c.d', or two; {WAY_OUT}"
    ]


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{title}\n\n{body.text}", "T\n\nB"),
        (r"{title}\n\t{title}", "T\n\tT"),
        ("{{{title}}}{{}}", "{T}{}"),
        ("# {title}", "# T"),
    ],
)
def test_a_template_joins_fields(tmp_path: Path, template: str, text: str) -> None:
    (tmp_path / "a.jsonl").write_text('{"title": "T", "body": {"text": "B"}}')
    assert texts(tmp_path, TextFields(template=template)) == [text]


def test_a_record_that_lacks_a_field_of_the_template_is_bad(tmp_path: Path) -> None:
    records = [
        {"title": "T", "body": "B"},
        {"title": "T"},
        {"title": None, "body": "B"},
        {"title": 3, "body": "B"},
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, records)))
    texts, tally = found(tmp_path, TextFields(template="{title}: {body}"))
    assert [text.text for text in texts] == ["T: B"]
    assert sorted(tally.lines()) == [
        f"left out 1 record (a.jsonl:2): no field 'body', or two; {WAY_OUT}",
        "left out 1 record (a.jsonl:3): field 'title' is null",
        "left out 1 record (a.jsonl:4): field 'title' is not text",
    ]


@pytest.mark.parametrize("field", ["", " ", ".", "a.", ".a", "a..b"])
def test_a_field_without_a_name_is_refused(field: str) -> None:
    with pytest.raises(
        TextFieldsError, match=r"^text_field is '.*'; it must be the name of a field, with dots"
    ):
        TextFields(field)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("", "it must name a field in braces, as in '{title}'"),
        ("no field {{}}", "it must name a field in braces"),
        ("{title} {", "'{' at character 9 must be the name of a field in braces; write {{ and }} for braces"),
        ("{title}}", "'}' at character 8 must be"),
        ("{}", "'{}' at character 1 must be"),
        ("{a..b}", "'{a..b}' at character 1"),
    ],
)
def test_a_wrong_template_is_refused_with_the_place(template: str, message: str) -> None:
    with pytest.raises(TextFieldsError) as raised:
        TextFields(template=template)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_field_beside_a_template_is_refused() -> None:
    with pytest.raises(TextFieldsError, match="text_field and template are both given; give one of them"):
        TextFields("content", "{title}")
