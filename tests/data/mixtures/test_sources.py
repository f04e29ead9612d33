"""How a user names the sources of a mixture."""

from __future__ import annotations

from typing import Any

import pytest

from llama_ray.data.mixtures.sources import DataSource, parse_sources, weights

S3 = "s3://bucket/web?scheme=http&endpoint_override=127.0.0.1:9000"


@pytest.mark.parametrize(
    ("text", "source"),
    [
        ("data/web", DataSource("data", "data/web")),
        ("data/web:0.7", DataSource("data", "data/web:0.7")),
        ("./a=b:2", DataSource("data", "./a=b:2")),
        (S3, DataSource("data", S3)),
        ("web=data/web", DataSource("web", "data/web")),
        ("web=data/web:0.7", DataSource("web", "data/web", 0.7)),
        ("web=data/web:2", DataSource("web", "data/web", 2.0)),
        ("web=data/web:1e-3", DataSource("web", "data/web", 1e-3)),
        ("web=data/web:v2", DataSource("web", "data/web:v2")),
        ("web=data/web:v2:.5", DataSource("web", "data/web:v2", 0.5)),
        ("web=a=b:1", DataSource("web", "a=b", 1.0)),
        ("web=data/all#web:0.7", DataSource("web", "data/all", 0.7, "web")),
        ("web=data/all#web", DataSource("web", "data/all", None, "web")),
        (f"web={S3}", DataSource("web", S3)),
        (f"web={S3}:0.7", DataSource("web", S3, 0.7)),
        (f"web={S3}:7", DataSource("web", S3, 7.0)),
        ("web=s3://bucket:9000", DataSource("web", "s3://bucket:9000")),
        ("web=s3://bucket/web:9", DataSource("web", "s3://bucket/web", 9.0)),
        ("web=s3://b/web?region=eu:9", DataSource("web", "s3://b/web?region=eu", 9.0)),
        ("web=http://key:pass@host:80", DataSource("web", "http://key:pass@host:80")),
    ],
)
def test_a_text_names_a_source(text: str, source: DataSource) -> None:
    assert parse_sources(text) == (source,)


def test_sources_are_sorted_by_name_whatever_the_form() -> None:
    expected = (DataSource("code", "data/code", 0.3, None, 4.0), DataSource("web", "data/web", 0.7))
    mapping: dict[str, Any] = {
        "web": "data/web:0.7",
        "code": {"location": "data/code", "weight": 0.3, "max_repetitions": 4.0},
    }
    assert parse_sources(mapping) == expected
    assert weights(expected) == {"code": 0.3, "web": 0.7}
    listed = parse_sources(["web=data/web", "code=data/code"])
    assert [source.name for source in listed] == ["code", "web"]
    assert weights(listed) is None


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "data names no source; write NAME=DIR"),
        (["a=x", "data/y"], "data has several sources, and 'data/y' has no name; write NAME=DIR"),
        (["a=x", "a=y"], "data has two sources named a"),
        (["a=x:1", "b=y"], "data has no weight for source b; give all sources a weight, or none"),
        ("a=", "data has no directory for source a"),
        ({"a b": "x"}, "data has a source named 'a b'; a name must begin with a letter"),
        (
            {"a": {"location": "x", "wieght": 1}},
            "source a has the unknown entry 'wieght'; the entries are label",
        ),
        ({"a": {"weight": 1}}, "source a has no location"),
        (
            {"a": {"location": "x", "weight": "much"}},
            "data has weight 'much' for source a; it must be a number",
        ),
        (
            {"a": {"location": "x", "weight": -1}},
            "data has weight -1 for source a; it must be a number from 0",
        ),
        (
            {"a": {"location": "x", "max_repetitions": float("nan")}},
            "data has max_repetitions nan for source a",
        ),
    ],
)
def test_what_is_no_source_is_refused_in_one_line(data: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        parse_sources(data)
    assert "\n" not in str(error.value)


def test_a_source_does_not_show_the_secrets_of_its_location() -> None:
    [source] = parse_sources("s3://bucket/web?access_key=AKIA&secret_key=hidden")
    assert source.location.endswith("secret_key=hidden")
    assert "secret_key=***" in repr(source)
    assert "hidden" not in repr(source)
